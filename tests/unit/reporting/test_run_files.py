"""Reading a run's directory."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from megatron_graft.bank.manifest import Control
from megatron_graft.errors import BankError, ConfigError, IdentityError
from megatron_graft.reporting import run_files
from megatron_graft.reporting.run_files import parse_flags, read_metrics, read_run

PACKAGE = Path(run_files.__file__).parents[1]


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines))
    return path


def step(iteration: int, loss: float) -> str:
    return json.dumps({"iteration": iteration, "lm loss": loss})


def test_the_last_record_of_a_repeated_step_counts(tmp_path):
    path = written(tmp_path / "m", step(1, 9.0), step(2, 8.0), step(3, 7.0), step(2, 6.0), step(3, 5.0))
    assert [record["lm loss"] for record in read_metrics(path, 3)] == [9.0, 6.0, 5.0]


def test_a_broken_last_line_is_left_out(tmp_path):
    path = written(tmp_path / "m", step(1, 9.0), step(2, 8.0)[:-6])
    assert [record["iteration"] for record in read_metrics(path, 3)] == [1]


def test_a_record_joined_to_a_broken_line_is_found(tmp_path):
    path = written(tmp_path / "m", step(1, 9.0), step(2, 8.0)[:-6] + step(2, 7.5), step(3, 7.0))
    assert [record["lm loss"] for record in read_metrics(path, 3)] == [9.0, 7.5, 7.0]


def test_steps_after_the_evaluated_one_are_of_another_run(tmp_path):
    path = written(tmp_path / "m", step(1, 9.0), step(2, 8.0))
    assert len(read_metrics(path, 1)) == 1


def test_metrics_without_a_step_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no step"):
        read_metrics(written(tmp_path / "m", "{", "[1]", ""), 3)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_metrics(tmp_path / "absent", 3)


def test_the_last_flag_wins_and_defaults_are_megatrons():
    flags = parse_flags(("--seed=1", "--lr", "1e-3", "--seed", "7", "--graft-layers", "2", "3", "--unknown", "x"))
    assert (flags["seed"], flags["lr"], flags["graft_layers"]) == (7, 1e-3, [2, 3])
    assert (parse_flags(())["seed"], parse_flags(())["tensor_model_parallel_size"]) == (1234, 1)


def test_an_unfinished_run_is_none(make_run):
    run = make_run("a")
    assert read_run(run) is not None
    (run / "evaluation.json").unlink()
    assert read_run(run) is None


def test_a_run_prolonged_after_its_evaluation_is_unfinished(make_run):
    assert read_run(make_run("a", flags=("--train-iters", "41"))) is None


def test_what_is_no_run_or_lacks_the_held_out_text_is_refused(make_run, tmp_path):
    with pytest.raises(ConfigError, match="run.json"):
        read_run(tmp_path)
    with pytest.raises(ConfigError, match="held-out"):
        read_run(make_run("a", evaluation={"data": {}}))


def test_a_bank_that_is_gone_or_another_is_refused(make_run):
    run = make_run("a")
    make_run("b", bank="other", control=Control(kind="shuffled", seed=1))
    bank, other = (run.parents[1] / name for name in ("bank", "other"))
    bank.rename(bank.with_name("away"))
    with pytest.raises(BankError):
        read_run(run)
    other.rename(bank)
    with pytest.raises(IdentityError, match="does not hold the rows of the run"):
        read_run(run)


SHUFFLED = Control(kind="shuffled", seed=1)


@pytest.mark.parametrize(("bank", "control", "engram", "arm"), [
    (None, None, None, "no memory"), ("bank", None, None, "memory"), ("bank", SHUFFLED, None, "shuffled rows"),
    (None, None, "", "hashed tables"), ("bank", None, "", "memory + hashed tables"),
    ("bank", SHUFFLED, "sum", "shuffled rows + hashed tables (sum)"),
])  # fmt: skip
def test_an_arm_says_what_the_memory_is(make_run, bank, control, engram, arm):
    assert read_run(make_run("a", bank=bank, control=control, engram=engram)).arm == arm


def test_file_names_are_those_that_training_writes():
    # Read as text: this room and its tests run without torch.
    constants = {}
    for name in ("run", "evaluate_run"):
        for node in ast.parse((PACKAGE / "training" / f"{name}.py").read_text()).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                constants[node.targets[0].id] = node.value.value
    names = (constants["RUN_FILE"], constants["METRICS_FILE"], constants["RESULT_FILE"])
    assert names == (run_files.RUN_FILE, run_files.METRICS_FILE, run_files.EVALUATION_FILE)
