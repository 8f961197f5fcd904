"""Planning a run from its own flags, from the shell: tables, figures, and what cannot be planned."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.helpers.main_job import REPOSITORY
from tests.helpers.tiny_run import CPU_FLAGS, MODEL_FLAGS, MOE_FLAGS, TRAINING_FLAGS

pytestmark = [pytest.mark.slow, pytest.mark.functional]
RUN = [*MODEL_FLAGS, *MOE_FLAGS, *TRAINING_FLAGS, *CPU_FLAGS, "--train-iters", 4, "--tokenizer-type", "NullTokenizer"]
RUN += ["--vocab-size", 1000, "--graft-bank", "not-built-yet", "--graft-layers", 2, "--mock-data"]


def plan(*options: object, flags: tuple[object, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPOSITORY / "tools" / "plan.py", "train", *options, "--", *RUN, *flags]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)


def test_a_run_whose_bank_is_not_built_yet() -> None:
    done = plan("--world-size", 4, "--bank-shape", "1e6x64,64:int8", "--step-seconds", 0.5)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("| run |")
    assert "1,000,000 rows × 128 int8" in done.stdout
    assert "What binds first" in done.stdout


def test_more_ranks_hold_and_move_less_each() -> None:
    options = ("--bank-shape", "1e6x64", "--json", "--step-seconds", 0.5)
    one, four = (json.loads(plan("--world-size", ranks, *options).stdout) for ranks in (1, 4))
    assert one["stages"][0]["dense"] == four["stages"][0]["dense"]
    assert one["stages"][0]["rows"] == 4 * four["stages"][0]["rows"]
    assert not one["stages"][0]["collectives"] and four["stages"][0]["collectives"]
    shares = [demand["share"] for demand in one["demands"]]
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--world-size", 3), "--world-size: does not suit the run's flags"),
        (("--world-size", 4, "--bank-shape", "many"), "--bank-shape: is malformed"),
        (("--world-size", 4, "--bank-shape", "0x64"), "--bank-shape: is out of range"),
        (("--world-size", 4, "--bank-shape", "1e400x64"), "--bank-shape: is out of range"),
        (("--world-size", 4, "--bank-shape", "1e6x0"), "--bank-shape: is out of range"),
        (("--world-size", 4, "--bank-shape", "1e6x64", "--bank-max-order", 9), "--bank-max-order: is no n-gram's"),
        (("--world-size", 4, "--bank-shape", "1e6x64", "--step-seconds", 0), "--step-seconds: is out of range"),
        (("--world-size", 4, "--bank-shape", "1e6x64", "--mfu", 0), "--mfu: is out of range"),
    ],
)
def test_what_cannot_be_planned_says_why(options: tuple[object, ...], message: str) -> None:
    done = plan(*(options if "--bank-shape" in options else (*options, "--bank-shape", "1e6x64")))
    assert done.returncode == 2
    assert message in done.stderr


def state(world_size: int, *flags: object) -> float:
    """Bytes of the stock model's state on its fullest rank, with Megatron's distributed optimizer."""
    done = plan(
        "--world-size", world_size, "--bank-shape", "1e6x64", "--json", "--step-seconds", 1,
        flags=("--use-distributed-optimizer", *flags),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return float(json.loads(done.stdout)["backbone_state"])


def test_optimizer_state_is_shared_by_all_ranks_that_hold_the_same_parameters() -> None:
    """Of float32: 8 bytes a parameter and gradient, and 8 shared out; experts by those that hold the same experts."""
    parameters = state(1) / 16
    assert state(4) == pytest.approx(parameters * (8 + 8 / 4))
    assert state(4, "--context-parallel-size", 2) == pytest.approx(state(4))
    experts = 4 * 4 * 3 * 64 * 128  # layers, experts, matrices of one
    apart = (parameters - experts) * (8 + 8 / 4) + experts / 4 * (8 + 8)
    assert state(4, "--expert-model-parallel-size", 4) == pytest.approx(apart)


def test_uneven_stages_are_not_planned() -> None:
    uneven = ("--pipeline-model-parallel-size", 2, "--decoder-first-pipeline-num-layers", 1)
    done = plan("--world-size", 4, "--bank-shape", "1e6x64", flags=uneven)
    assert done.returncode == 2
    assert "--decoder-first-pipeline-num-layers: gives pipeline stages different numbers of layers" in done.stderr
