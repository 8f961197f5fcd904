"""Every figure that README.md marks is the one in the committed report, at the precision shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_graft.errors import ConfigError
from tools import report as tool

REPOSITORY = Path(__file__).resolve().parents[2]
OPENING = "<!-- figure:"


def figure_faults(text: str, root: Path) -> list[str]:
    """What is wrong with the marked figures of a README that lies in ``root``."""
    marks = list(tool.MARK.finditer(text))
    faults = []
    if len(marks) != text.count(OPENING):
        faults.append(f"{text.count(OPENING)} figures are opened, {len(marks)} are well formed")
    if "runs/results" in text and not marks:
        faults.append("names runs/results but marks no figure")
    for mark in marks:
        try:
            right = tool.updated_figures(mark[0], root)
        except ConfigError as error:
            faults.append(str(error))
            continue
        if right != mark[0]:
            faults.append(f"shows {mark['shown']!r}, the report says {right}")
    return faults


@pytest.fixture
def root(tmp_path: Path) -> Path:
    report = {
        "held_out": {"loss": 5.0149},
        "hit": 0.5849,
        "rows": 50000,
        "donor": "a-donor",
        "gain": 0.25,
        "none": None,
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    return tmp_path


def mark(key: str, shown: str) -> str:
    return f"a <!-- figure: report.json#{key} -->{shown}<!-- /figure --> b"


def test_the_readme_shows_what_was_measured() -> None:
    readme = REPOSITORY / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    faults = figure_faults(text, REPOSITORY)
    assert not faults, "\n".join([*faults, "tools/report.py --update-readme README.md rewrites the figures"])


RIGHT = [
    ("held_out.loss", "5.01"), ("held_out.loss", "5.0149"), ("held_out.loss", "5"), ("hit", "58%"), ("hit", "58.5 %"),
    ("rows", "50,000"), ("rows", "50000"), ("donor", "a-donor"), ("gain", "+0.25"),
]  # fmt: skip
WRONG = [
    ("held_out.loss", "5.02"), ("held_out.loss", "5.0150"), ("held_out.loss", "-5.01"), ("hit", "59%"), ("hit", "58"),
    ("rows", "50,001"), ("donor", "a-donor "), ("gain", "-0.25"), ("held_out.loss", "?"), ("held_out.loss", ""),
    ("held_out", "5"), ("absent", "5"), ("none", "0"), ("held_out.loss.deeper", "5"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "shown"), RIGHT)
def test_a_right_figure_passes(root: Path, key: str, shown: str) -> None:
    assert not figure_faults(mark(key, shown), root)


@pytest.mark.parametrize(("key", "shown"), WRONG)
def test_a_wrong_figure_fails(root: Path, key: str, shown: str) -> None:
    assert figure_faults(mark(key, shown), root)


@pytest.mark.parametrize(
    "text",
    [
        "see runs/results/graft_moe",
        "<!-- figure: report.json#hit -->58%",
        "<!-- figure: report.json -->58%<!-- /figure -->",
        "<!-- figure: report.json#hit -->58% <b>x</b><!-- /figure -->",
        mark("hit", "58%").replace("report.json", "absent.json"),
    ],
)
def test_a_missing_or_malformed_mark_fails(root: Path, text: str) -> None:
    assert figure_faults(text, root)


def test_the_command_rewrites_the_figures_in_their_form(root: Path) -> None:
    readme = root / "README.md"
    readme.write_text("\n".join(mark(key, shown) for key, shown in [
        ("held_out.loss", "9.99"), ("hit", "1.0%"), ("rows", "1,000"), ("gain", "-1.00"), ("gain", "+1.00"),
        ("rows", "?"),
    ]))  # fmt: skip
    assert tool.main(["--update-readme", str(readme)]) == 0
    shown = [found["shown"] for found in tool.MARK.finditer(readme.read_text())]
    assert shown == ["5.01", "58.5%", "50,000", "0.25", "+0.25", "50000"]
    assert not figure_faults(readme.read_text(), root)


def test_the_command_names_a_readme_that_is_not_there(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--update-readme", str(root / "MISSING.md")]) == 2
    assert "error: --update-readme: is no file" in capsys.readouterr().err


def test_the_command_leaves_a_readme_with_a_dead_mark_alone(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = root / "README.md"
    readme.write_text(mark("hit", "1%") + mark("absent", "1"))
    before = readme.read_text()
    assert tool.main(["--update-readme", str(readme)]) == 2
    assert "report.json#absent" in capsys.readouterr().err
    assert readme.read_text() == before
