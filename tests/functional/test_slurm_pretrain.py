"""Training on two nodes of a real Slurm: told to stop in the middle, the job saves, requeues itself and goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.main_job import REPOSITORY, SCRIPT, SMALL_FLAGS
from tests.helpers.ports import free_port
from tests.helpers.slurm import NODES, Slurm, wait_until
from tests.helpers.tiny_run import World, make_world, read_records

pytestmark = [pytest.mark.slow, pytest.mark.functional]

BATCH_SCRIPT = REPOSITORY / "examples/slurm/pretrain.sbatch"
STAGE_BANK = REPOSITORY / "tools/stage_bank.py"
STEPS = 40
# --exit-interval ends a run without finishing it: its evaluation, which is no part of this, is left out.
FLAGS = tuple(map(str, (
    *SMALL_FLAGS, "--train-iters", 1000, "--exit-interval", STEPS, "--lr-decay-iters", STEPS, "--log-interval", 1,
    "--save-interval", 1000, "--eval-interval", 1000,
)))  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def variables(world: World, directory: Path) -> dict[str, str]:
    """The settings of the example script."""
    return {
        "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
        "DATA_PATH": str(world.data),
        "TOKENIZER_MODEL": str(world.tokenizer),
        "SPLIT": "80,20,0",
        "GRAFT_BANK": str(world.bank),
        "GRAFT_LAYERS": "1 2",
        "RUNS_DIR": str(directory / "runs"),
        "WORK_DIR": str(directory / "work"),
        "DEVICE": "cpu",
        "GRAFT_THREADS": "1",
    }


def metrics(directory: Path) -> list[dict[str, Any]]:
    return read_records(directory / "runs/graft_moe")


def figures(directory: Path) -> dict[int, tuple[float, float]]:
    """Step -> loss and gradient norm in full precision; a step stands there once."""
    records = metrics(directory)
    steps = {record["iteration"]: (record["lm loss"], record["grad_norm"]) for record in records}
    assert len(steps) == len(records)
    return steps


def train_uninterrupted(world: World, directory: Path) -> dict[int, tuple[float, float]]:
    """The same flags and the same two ranks, without Slurm."""
    finished = subprocess.run(
        ["torchrun", "--nproc-per-node=2", f"--master-port={free_port()}", str(SCRIPT), *FLAGS],
        cwd=REPOSITORY,
        env=Slurm(directory).environment | variables(world, directory),
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return figures(directory)


def test_a_job_told_to_stop_saves_requeues_itself_and_trains_as_if_never_stopped(
    slurm: Slurm, world: World, tmp_path: Path
) -> None:
    log = tmp_path / "job.log"
    copies = tmp_path / "node-local"
    job = slurm.submit(
        "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", f"--output={log}",
        BATCH_SCRIPT, *FLAGS, "--bank-node-copy", copies,
        cwd=REPOSITORY, MASTER_ADDR="127.0.0.1", **variables(world, tmp_path),
    )  # fmt: skip
    wait_until(lambda: len(metrics(tmp_path)) >= 3, "three steps of training", 240)
    slurm.run("scancel", "--batch", "--signal=USR1", job)  # what Slurm sends before the time limit
    states = slurm.wait(job, 300)
    output = log.read_text()
    assert states == ["COMPLETED"], output[-4000:]
    (fields,) = slurm.show(job)
    assert (fields["Restarts"], fields["NumNodes"]) == ("1", str(len(NODES)))
    assert output.count(f"checkpoint saved before the time limit; requeueing job {job}") == 1
    assert output.count("successfully loaded checkpoint from") == 1
    stopped_at = int(output.split("successfully loaded checkpoint from")[1].split("at iteration")[1].split()[0])
    assert 3 <= stopped_at < STEPS, "the signal came too late to show anything"
    assert output.count(" is there already") >= 1, "the second start uses the first one's copy of the bank"

    resumed = figures(tmp_path)
    assert list(resumed) == list(range(1, STEPS + 1))
    assert resumed == train_uninterrupted(world, tmp_path / "whole")
    run = json.loads((tmp_path / "runs/graft_moe/run.json").read_text())
    assert run


def test_a_bank_is_staged_once_on_each_node_before_training(slurm: Slurm, world: World, tmp_path: Path) -> None:
    """``srun --ntasks-per-node=1`` as the documentation has it; here each node's disk is the task's own TMPDIR."""
    script = f'{sys.executable} {STAGE_BANK} {world.bank} "$TMPDIR/banks" --verify full'
    printed = slurm.run("srun", "--nodes=2", "--ntasks-per-node=1", "bash", "-c", script, cwd=tmp_path).split()
    assert len(set(printed)) == 2
    for path, original in ((Path(path) / file.name, file) for path in printed for file in world.bank.iterdir()):
        assert path.read_bytes() == original.read_bytes()
