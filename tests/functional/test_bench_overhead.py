"""The overhead bench at a small size: that every part runs and is told; its figures mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.layouts import world_flags
from tests.helpers.tiny_run import launch, make_world

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = "tools/bench/overhead.py"
PAIRS = 3


def run(*words: object) -> str:
    ended = subprocess.run(
        [sys.executable, TOOL, *map(str, words)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


@pytest.fixture(scope="module")
def results_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("overhead")
    world = make_world(tmp_path_factory.mktemp("world"))
    recorded = launch(directory / "run", [*world_flags(world, "sum"), "--train-iters", 1]).require_success()
    small = ("--run", recorded.directory, "--pairs", PAIRS, "--rows", 3000, "--build-dir", directory / "build")
    path = directory / "build" / "overhead.json"
    run(*small, "--only", "memory", "wide")
    before = json.loads(path.read_text())
    run(*small, "--only", "rows")
    assert {part: json.loads(path.read_text())[part] for part in before} == before, "other parts are kept"
    return path


@pytest.fixture(scope="module")
def results(results_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(results_path.read_text())
    return found


@pytest.mark.parametrize("part", ["memory", "wide", "rows"])
def test_every_run_is_timed_in_every_pair(results: dict[str, Any], part: str) -> None:
    for one in results[part]["runs"].values():
        assert len(one["block_seconds"]) == PAIRS and min(one["block_seconds"]) > 0
        assert one["steps"] == PAIRS
    assert results[part]["low"] <= results[part]["ratio"] <= results[part]["high"]


def test_the_runs_differ_in_their_memory_alone(results: dict[str, Any]) -> None:
    for part in ("memory", "wide"):
        own, stock = (results[part]["runs"][name] for name in ("with", "without"))
        assert own["parameters"] > stock["parameters"]
        assert (
            own["flops"]["backbone"] == stock["flops"]["backbone"] and own["flops"]["share"] > stock["flops"]["share"]
        )
        assert own["look_ahead_ms_per_step"] > 0 == stock["look_ahead_ms_per_step"]
    many, few = results["rows"]["runs"].values()
    assert (many["parameters"], many["flops"]) == (few["parameters"], few["flops"])
    wide, usual = (results[part]["runs"]["with"]["tokens_per_step"] for part in ("wide", "memory"))
    assert wide * 4 == usual
    assert results["wide"]["runs"]["without"]["parameters"] > 4 * results["memory"]["runs"]["without"]["parameters"]


def test_the_table_has_a_line_for_each(results_path: Path) -> None:
    table = run("--markdown", results_path)
    assert all(title in table for title in ("with memory / without |", "four times as wide", "many rows / few rows"))
