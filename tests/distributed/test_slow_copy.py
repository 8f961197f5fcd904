"""A device that is slow to reach: nothing is read before it has arrived or after it is gone, and waiting is told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.layouts import LAYOUTS, MODEL_ONLY, START, STEPS, Start, world_flags
from tests.helpers.tiny_run import SEQ_LENGTH, Finished, World, launch

SLOW = "tests.helpers.pretrain_with_slow_copy"
DELAY_MS = 40
MICRO_BATCHES = 4


@pytest.fixture
def slow_run(world: World, start_of: Callable[[str], Start], tmp_path: Path) -> Callable[..., Finished]:
    """The ten steps of a layout once more, by way of slow copies."""

    def run(name: str, *more: Any, times: str = "once") -> Finished:
        layout = LAYOUTS[name]
        flags = [*world_flags(world, layout.world), *MODEL_ONLY, "--train-iters", START + STEPS, *layout.flags, *more]
        flags += ["--load", start_of(layout.world).run.checkpoints]
        first = (DELAY_MS, times)
        return launch(
            tmp_path / "slow", flags, processes=layout.processes, module=SLOW, arguments_first=first
        ).require_success()

    return run


def figures(run: Finished) -> dict[int, tuple[float, float]]:
    """Iteration -> loss and gradient norm, in full precision."""
    return {record["iteration"]: (record["lm loss"], record["grad_norm"]) for record in run.records}


def used(run: Finished, rank: int = 0) -> dict[str, int]:
    found: dict[str, int] = json.loads((run.directory / f"slow-{rank}.json").read_text())
    return found


@pytest.mark.parametrize("name", ["single", "PP=2, full recompute", "PP=2, interleaved"])
def test_training_is_the_same_to_the_last_bit(
    name: str, slow_run: Callable[..., Finished], run_of: Callable[[str], Finished]
) -> None:
    assert figures(slow_run(name)) == figures(run_of(name))


def test_waiting_is_reported(slow_run: Callable[..., Finished]) -> None:
    stalls = [record["graft/stall_ms"] for record in slow_run("single").records if "graft/stall_ms" in record]
    assert stalls and min(stalls) > 0


def test_the_look_ahead_waits_for_the_model_and_drops_nothing(slow_run: Callable[..., Finished]) -> None:
    found = used(slow_run("single", "--graft-look-ahead", 2))
    assert found["most"] <= 2 + 2  # two waiting, one in the thread's hands, one that the model has asked for
    assert STEPS * MICRO_BATCHES <= found["copies"] <= STEPS * MICRO_BATCHES + 3


def test_a_step_that_is_run_again_gets_the_same_memory(
    slow_run: Callable[..., Finished], run_of: Callable[[str], Finished]
) -> None:
    again = slow_run("single", times="twice")
    assert figures(again) == figures(run_of("single"))
    assert used(again)["copies"] >= 2 * STEPS * MICRO_BATCHES


def test_a_batch_size_that_grows_and_validation_in_between_are_served(world: World, tmp_path: Path) -> None:
    flags = [*world_flags(world, "exclusive"), "--train-iters", STEPS]
    place = flags.index("--global-batch-size")
    flags[place : place + 2] = ["--step-batch-size-schedule", f"0:4 {4 * 4 * SEQ_LENGTH}:8"]
    flags += ["--split", "8,2,0", "--eval-interval", 3, "--eval-iters", 2]
    plain = launch(tmp_path / "plain", flags).require_success()
    slow = launch(tmp_path / "slow", flags, module=SLOW, arguments_first=(DELAY_MS, "once")).require_success()
    assert figures(slow) == figures(plain)
    told = [
        re.findall(r"validation loss at iteration (\d+) .*?lm loss value: (\S+)", run.stdout) for run in (slow, plain)
    ]
    assert told[0] == told[1] and [step for step, _ in told[0]] == ["3", "6", "9", "10"]
    sizes = [record["consumed_samples"] for record in plain.records]
    assert {after - before for before, after in zip(sizes, sizes[1:], strict=False)} == {4, 8}


def test_a_stopped_run_goes_on(world: World, fresh: Finished, tmp_path: Path) -> None:
    flags = [*world_flags(world, "exclusive"), "--train-iters", STEPS, "--save", tmp_path / "saved"]
    for part, more in (("first", ["--exit-interval", 5]), ("rest", ["--load", tmp_path / "saved"])):
        run = launch(tmp_path / part, [*flags, *more], module=SLOW, arguments_first=(DELAY_MS, "once"))
        assert figures(run.require_success()) == {
            iteration: figure for iteration, figure in figures(fresh).items() if (iteration <= 5) == (part == "first")
        }
