"""The figures, the page, the plot and the comparison, through ``write_report`` and ``tools/report.py``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_graft.bank.manifest import Control
from megatron_graft.errors import ConfigError
from megatron_graft.reporting import figures
from megatron_graft.reporting.figures import round_all
from megatron_graft.reporting.report import FILES, load_report, write_report
from megatron_graft.reporting.run_files import read_run
from tools import report as tool

PNG = b"\x89PNG\r\n\x1a\n"


def changed(run: Path, **members: object) -> Path:
    path = run / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | members))
    return run


def test_every_figure_comes_from_its_file(make_run, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    (work / "stages.json").write_text('{"corpus": 12.5, "bank": 30.0}')
    report = write_report(make_run("graft"), work_dir=work)
    assert report["config"] | {"steps": 40, "lr": 0.002, "graft_layers": [2, 3], "seed": 1234} == report["config"]
    assert (report["bank"]["num_rows"], report["bank"]["row_dim"], report["bank"]["donor"]["layers"]) == (3, 4, [12])
    assert report["tokenizer"]["fingerprint"] == "f0" * 32
    assert report["training_loss"] == {"first": 8.9, "last": 5.0, "mean_last_20": 5.95}
    assert report["held_out"]["by_order"]["3"] == {"tokens": 200, "share": 0.2, "loss": 4.5, "loss_memory_off": 5.5}
    assert report["held_out"]["memory_off"] == {"loss": 5.5, "bits_per_byte": 2.75, "difference": 0.5}
    assert report["held_out"]["bigram"] == {"loss": 5.25, "difference": 0.25}
    assert report["held_out"]["beats_bigram"] is True
    assert report["hit_rate"]["training"] == {"any": 0.25, "2": 0.15, "3": 0.1}
    assert report["hit_rate"]["held_out"] == {"any": 0.5, "2": 0.3, "3": 0.2}
    told = {"gate_p10": 0.1, "gate_p50": 0.5, "gate_p90": 0.9, "delta_ratio": 0.04, "participation": 1.5}
    assert report["sites"] == {"2": {"gate_mean": 0.2} | told, "3": {"gate_mean": 0.3} | told}
    assert report["engram"] is None and report["further_banks"] == []
    # Intervals 100, 200, 300, 400 tokens/s: the first is not steady, but its time was spent all the same.
    assert report["speed"]["tokens_per_second"] == 300
    assert report["speed"]["stall_ms"] == {"median": 3.0, "max": 4.0}
    training = 40 * 16 * 256 / 4 * (1 / 100 + 1 / 200 + 1 / 300 + 1 / 400)
    assert report["seconds"] == {"corpus": 12.5, "bank": 30.0, "training": round_all(training), "evaluation": None}
    assert report["machine"]["cores"] >= 1 and report["machine"]["torch"] and report["machine"]["megatron-core"]


def test_coverage_tells_of_texts_that_were_not_evaluated(make_run):
    run = make_run("graft")
    bank = run.parents[1] / "bank"
    shares = {"positions": 10, "hit_rate": 0.7, "share_by_order": {"2": 0.4, "3": 0.3}}
    coverage = {"bank": json.loads((bank / "bank.json").read_text())["digest"]}
    coverage["data_sets"] = {"train": shares, "heldout": shares, "foreign": shares}
    bank.with_name("bank.coverage.json").write_text(json.dumps(coverage))
    rates = write_report(run)["hit_rate"]
    assert (rates.keys(), rates["foreign"]["any"]) == ({"training", "held_out", "foreign"}, 0.7)
    assert rates["held_out"]["any"] == 0.5, "what was evaluated says more than the coverage"
    bank.with_name("bank.coverage.json").write_text(json.dumps(coverage | {"bank": "of another bank"}))
    assert "foreign" not in write_report(run)["hit_rate"]


FIRST = {"": 0.9, "_order_2": 0.7, "_order_3": 0.1}


def test_of_several_banks_the_hit_rate_in_training_is_the_firsts_too(make_run):
    """As in evaluation; without a number it is the mean over all."""
    run = read_run(make_run("graft"))
    first = [record | {f"graft/bank_1/hit_rate{of}": rate for of, rate in FIRST.items()} for record in run.metrics]
    several = replace(run, banks=run.banks * 2, metrics=tuple(first))
    assert figures._hit_rates(several)["training"] == pytest.approx({"any": 0.9, "2": 0.7, "3": 0.1})
    single = figures._trained(first[-1], "graft/bank_1/hit_rate", ["1", "2", "3"])
    assert single == pytest.approx({"any": 0.9, "1": 0.1, "2": 0.7, "3": 0.1})


def test_a_stock_run_has_no_memory_to_tell_of(make_run, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.tokenizer.json").write_text('{"fingerprint": "ab", "vocab_size": 9}')
    report = write_report(make_run("stock", bank=None))
    assert [report[name] for name in ("bank", "hit_rate", "sites")] == [None] * 3
    assert report["held_out"]["by_order"] is None and report["held_out"]["memory_off"] is None
    assert (report["tokenizer"]["fingerprint"], report["tokenizer"]["vocab_size"]) == ("ab", 9)


def test_a_run_with_hashed_tables_alone_tells_of_them(make_run):
    run = make_run("tables", bank=None, engram="")
    report = write_report(run)
    assert (report["bank"], report["hit_rate"]) == (None, None)
    assert report["engram"]["heads"] == 2 and report["sites"].keys() == {"2", "3"}
    page = (run / "report.md").read_text()
    assert "| hashed tables | deepseek, layers 2, 3, orders 2 to 3, 2 heads of 101, 67 rows or more, 8 elements" in page
    assert "layer 3: gate 0.300 (10 % to 90 %: 0.10 to 0.90), |δ|/|h| 0.040, participation 1.5" in page.replace(
        "\\|", "|"
    )
    assert "loss, memory off" in page and "hit rate" not in page


def test_the_page_names_what_matters(make_run):
    run = make_run("graft")
    write_report(run, command="make pretrain")
    page = (run / "report.md").read_text()
    for wanted in ("**5.0000**", "below the 5.2500", "](loss.png)", "3 rows × 4", "gate 0.200", "make pretrain"):
        assert wanted in page
    assert "NOT below" not in page and "None" not in page and "nan" not in page


def test_a_loss_above_the_bigram_model_is_said_aloud(make_run):
    run = make_run("graft", loss=5.5)
    assert write_report(run)["held_out"]["beats_bigram"] is False
    assert "NOT below the 5.2500" in (run / "report.md").read_text()


def test_figures_are_rounded_and_never_infinite():
    assert round_all({"a": [123456.789, float("nan"), 7, True]}) == {"a": [123460.0, None, 7, True]}


def test_other_arms_stand_beside_the_run(make_run):
    shuffled = make_run("shuffled", loss=5.125, bank="other", control=Control(kind="shuffled", seed=1))
    run, stock = make_run("graft"), make_run("stock", loss=5.2, bank=None)
    compared = write_report(run, compare_with=[stock, shuffled])["comparison"]
    assert [compared[name]["arm"] for name in ("stock", "shuffled")] == ["no memory", "shuffled rows"]
    assert [compared[name]["held_out"]["difference"] for name in ("stock", "shuffled")] == [0.2, 0.125]
    assert "| stock | no memory | 5.2000 | 2.6000 | +0.2000 | 300 |" in (run / "report.md").read_text()
    assert load_report(run / "report.json")["comparison"] == compared


@pytest.mark.parametrize(("flag", "value"), [("--seed", "1"), ("--global-batch-size", "8"), ("--seq-length", "128")])
def test_an_arm_of_another_seed_or_batch_is_refused(make_run, flag, value):
    run, other = make_run("graft"), make_run("stock", bank=None, flags=(flag, value))
    with pytest.raises(ConfigError, match=f"differs from .* in its {flag}"):
        write_report(run, compare_with=[other])
    assert not (run / "report.json").exists()


@pytest.mark.parametrize(("member", "value", "named"), [
    ("train_iters", 30, "--train-iters"),
    ("training_text", {"tokens_seen": 1, "tokens_available": 2, "passes": 0.5}, "training text"),
    ("bigram_loss", {"heldout": 5.2501}, "bigram loss"),
])  # fmt: skip
def test_an_arm_of_other_steps_or_data_is_refused(make_run, member, value, named):
    flags = ("--train-iters", "30") if member == "train_iters" else ()
    run, other = make_run("graft"), changed(make_run("stock", bank=None, flags=flags), **{member: value})
    with pytest.raises(ConfigError, match=named):
        write_report(run, compare_with=[other])


def test_an_unfinished_arm_and_one_of_the_same_name_are_refused(make_run):
    run, other = make_run("graft"), make_run("stock", bank=None)
    with pytest.raises(ConfigError, match="name of another run"):
        write_report(run, compare_with=[run])
    (other / "evaluation.json").unlink()
    with pytest.raises(ConfigError, match="is not finished"):
        write_report(run, compare_with=[other])


def test_the_command_writes_and_copies_three_files(make_run, tmp_path, capsys):
    run, target = make_run("graft"), tmp_path / "results" / "graft"
    assert tool.main([str(run), "--work-dir", str(tmp_path), "--copy-to", str(target)]) == 0
    assert capsys.readouterr().out.startswith("# Run `graft`")
    assert {file.name for file in target.iterdir()} == set(FILES) == {"report.json", "report.md", "loss.png"}
    assert all((target / name).read_bytes() == (run / name).read_bytes() for name in FILES)
    assert (target / "loss.png").read_bytes().startswith(PNG)


def test_an_unfinished_run_is_told_how_to_go_on_and_nothing_is_written(make_run, tmp_path, capsys):
    run = make_run("graft")
    (run / "evaluation.json").unlink()
    before = set(run.iterdir())
    assert tool.main([str(run), "--copy-to", str(tmp_path / "target")]) == 0
    said = capsys.readouterr().out
    assert "not finished" in said and "resume" in said and said.count("\n") == 1
    assert set(run.iterdir()) == before and not (tmp_path / "target").exists()


def test_a_directory_that_is_no_run_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert tool.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_default_command_names_no_place_of_this_machine(make_run, tmp_path):
    run = make_run("graft")
    command = write_report(run, work_dir=tmp_path)["command"]
    assert command.startswith("torchrun -m megatron_graft.training.pretrain --num-layers 4")
    assert str(tmp_path) not in command and "--graft-bank work/bank" in command
