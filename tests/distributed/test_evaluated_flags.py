"""Runs are evaluated by what they saved, with flags that one process can have, also those that count samples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_graft.commands import value_of, without_flags
from tests.helpers.tiny_run import World, launch
from tools import evaluate

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLES = 8
OF_MANY = ["--tp-comm-overlap", "--hierarchical-context-parallel-sizes", "2", "1", "--eval-global-batch-size", "3"]

# Of a run that began from a checkpoint of others, and has another name for what it saved.
BEGINNING = ["--load", "elsewhere", "--ckpt-step", "3", "--finetune", "--graft-adopt-checkpoint"]


def test_the_last_value_of_a_flag_counts() -> None:
    flags = ["--save", "a", "--saved", "b", "--save=c=d", "--load", "e", "--last"]
    assert [value_of(flag, flags) for flag in ("--save", "--load", "--last", "--none")] == ["c=d", "e", None, None]


def test_flags_go_with_all_their_values() -> None:
    flags = ["--one", "1", "--several", "2", "3", "--switch", "--joined=4", "--last", "-5"]
    left_out = {"--several", "--switch", "--joined"}
    assert without_flags(left_out, flags) == ["--one", "1", "--last", "-5"]


@pytest.mark.parametrize(("done", "left"), [("1", True), ("2", False), ("release", False), (None, False)])
def test_files_tell_that_a_run_has_steps_left(done: str | None, left: bool, tmp_path: Path) -> None:
    recorded = {"arguments": ["--train-iters", "9", "--save", str(tmp_path), "--train-iters", "2"]}
    assert not evaluate._has_steps_left(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(recorded))
    if done:
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(done)
    assert evaluate._has_steps_left(tmp_path) == left


def test_a_run_that_counts_samples_had_many_processes_and_began_elsewhere_is_evaluated(
    world: World, tmp_path: Path
) -> None:
    flags: list[Any] = [*without_flags({"--global-batch-size"}, world.flags(world.bank))]
    flags += ["--split", "8,2,0", "--train-samples", SAMPLES, "--save", tmp_path / "run" / "checkpoints"]
    run = launch(tmp_path / "run", flags)
    run.require_success()
    recorded = tmp_path / "run" / "run.json"
    known = json.loads(recorded.read_text())
    recorded.write_text(json.dumps(known | {"arguments": [*known["arguments"], *OF_MANY, *BEGINNING]}))
    command = [sys.executable, REPOSITORY / "tools" / "evaluate.py", tmp_path / "run", "--if-finished"]
    finished = subprocess.run(
        [*command, "--data", f"text={world.data}"], capture_output=True, text=True,
        env=os.environ | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert result["iteration"] == result["train_iters"] == len(run.records) > 0
    assert result["training_text"]["tokens_seen"] == SAMPLES * 64
    assert result["data"]["text"]["loss"] > 0
