"""Runs whose flags one process cannot have, or that count samples instead of steps, are evaluated all the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_graft.commands import without_flags
from tests.helpers.tiny_run import World, launch

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLES = 8
OF_MANY = ["--tp-comm-overlap", "--hierarchical-context-parallel-sizes", "2", "1", "--eval-global-batch-size", "3"]


def test_flags_go_with_all_their_values() -> None:
    flags = ["--one", "1", "--several", "2", "3", "--switch", "--joined=4", "--last", "-5"]
    left_out = {"--several", "--switch", "--joined"}
    assert without_flags(left_out, flags) == ["--one", "1", "--last", "-5"]


def test_a_run_that_counts_samples_and_had_many_processes_is_evaluated(world: World, tmp_path: Path) -> None:
    flags: list[Any] = [*without_flags({"--global-batch-size"}, world.flags(world.bank))]
    flags += ["--split", "8,2,0", "--train-samples", SAMPLES, "--save", tmp_path / "run" / "checkpoints"]
    run = launch(tmp_path / "run", flags)
    run.require_success()
    recorded = tmp_path / "run" / "run.json"
    known = json.loads(recorded.read_text())
    places = ["--load", str(run.checkpoints)]
    recorded.write_text(json.dumps(known | {"arguments": [*known["arguments"], *OF_MANY, *places]}))
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
