"""``--graft-verify``: a fault between the bank and the model stops the run; a sound run is not touched by it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.layouts import LAYOUTS, world_flags
from tests.helpers.tiny_run import GLOBAL_BATCH_SIZE, SEQ_LENGTH, Finished, World, launch

STEPS, EVERY, PER_STEP = 6, 2, GLOBAL_BATCH_SIZE // 2  # micro-batches of two
LAYOUT = LAYOUTS["TP=2, sequence parallel"]


def run(world: World, directory: Path, every: int, fault: tuple[int, int, str] | None = None) -> Finished:
    """Six steps, with a fault (rank, step, section) in the last micro-batch of a step."""
    flags: list[Any] = [*world_flags(world, "exclusive"), *LAYOUT.flags, "--train-iters", STEPS]
    flags += ["--graft-verify", every, "--save", directory / "checkpoints"]
    if fault is None:
        return launch(directory, flags, processes=LAYOUT.processes)
    rank, step, section = fault
    first = [rank, step * PER_STEP - 1, section]
    module = "tests.helpers.pretrain_with_fault"
    return launch(directory, flags, processes=LAYOUT.processes, module=module, arguments_first=first)


@pytest.fixture(scope="module")
def sound(world: World) -> Finished:
    return run(world, world.directory / "sound", 0).require_success()


def test_a_sound_run_passes_and_is_the_same_run(world: World, sound: Finished, tmp_path: Path) -> None:
    assert run(world, tmp_path / "verified", 1).require_success().losses == sound.losses


@pytest.mark.parametrize(
    ("section", "what"),
    [
        ("rows.0", "byte of the bank's row"),
        ("order.0", "length of match"),
        ("reads.0", "place of a hashed row"),
        ("requests.0", "hash id"),
    ],
)
def test_a_fault_in_a_verified_step_stops_the_run_by_step_rank_and_position(
    section: str, what: str, world: World, sound: Finished, tmp_path: Path
) -> None:
    stopped = run(world, tmp_path / "stopped", EVERY, fault=(1, 4, section))
    assert stopped.returncode != 0
    assert stopped.losses == {step: loss for step, loss in sound.losses.items() if step < 4}
    place = r"step 4, rank 1, sequence \d of the micro-batch, position (\d+)"
    message = re.search(rf"error: --graft-verify: {place}: the (.*) is not", stopped.stderr)
    assert message, stopped.stderr[-3000:]
    assert message[2] == what
    # The other rank may have asked for the row of this one's share.
    first = 0 if section == "requests.0" else SEQ_LENGTH // 2
    assert first <= int(message[1]) < SEQ_LENGTH


def test_other_steps_are_not_looked_at(world: World, sound: Finished, tmp_path: Path) -> None:
    unseen = run(world, tmp_path / "unseen", EVERY, fault=(1, 3, "rows.0")).require_success()
    assert unseen.losses[2] == sound.losses[2]
    assert unseen.losses[STEPS] != sound.losses[STEPS], "the fault must matter"
