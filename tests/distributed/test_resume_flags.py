"""Flags beyond layouts under which a run goes on, or a checkpoint is looked for in another place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_graft.commands import EXIT_BAD_INPUT
from tests.distributed.test_resume import assert_same_steps
from tests.helpers.layouts import TABLES
from tests.helpers.tiny_run import Finished, World, launch

STEPS, HALF = 4, 2

# By what a resume could go wrong, without the distributed optimizer, whose state is found by other means.
RESUMED: dict[str, tuple[Any, ...]] = {
    "trained rows, the run's own rates": ("--graft-rows", "trained", "--graft-layers", 2, "--graft-donor-layers", 4),
    "tables, the run's own rate": (*TABLES, "--engram-lr-mult", 1),
    "tables, the run's own rate and decay": (*TABLES, "--engram-lr-mult", 1, "--engram-wd-mult", 1),
    "dropout": ("--hidden-dropout", 0.1),
    "dropout, loader processes": ("--hidden-dropout", 0.1, "--num-workers", 1),
}


def flags_of(world: World, *more: Any, steps: int = STEPS) -> list[Any]:
    return [*world.flags(world.bank), "--train-iters", steps, "--weight-decay", 0.1, *more]


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one(name: str, world: World, tmp_path: Path) -> None:
    flags = flags_of(world, *RESUMED[name])
    halves = [*flags, "--load", tmp_path / "halves", "--save", tmp_path / "halves"]
    whole = launch(tmp_path / "whole", flags).require_success()
    launch(tmp_path / "first", [*halves, "--exit-interval", HALF]).require_success()
    second = launch(tmp_path / "second", halves).require_success()
    assert_same_steps(second, whole, HALF + 1, STEPS)


@pytest.fixture(scope="module")
def trained(world: World) -> Finished:
    """A run with a bank that was evaluated after every step, and saved after the last."""
    directory = world.directory / "found in other places"
    flags = [*flags_of(world, *EVALUATED), "--save", directory / "checkpoints"]
    return launch(directory, flags).require_success()


EVALUATED = ("--split", "8,2,0", "--eval-iters", 2, "--eval-interval", 1)


def refusal(directory: Path, flags: list[Any]) -> str:
    refused = launch(directory, flags)
    assert refused.returncode == EXIT_BAD_INPUT, refused.stderr[-2000:]
    (message,) = (line for line in refused.stderr.splitlines() if line.startswith("error: "))
    return message


@pytest.mark.parametrize("memory", ["another", "none"])
def test_another_memory_is_refused_where_only_a_pretrained_checkpoint_is_named(
    memory: str, world: World, trained: Finished, tmp_path: Path
) -> None:
    other = ("--graft-bank", world.many_rows) if memory == "another" else ()
    flags = flags_of(world, *other) if other else [*world.flags(), "--train-iters", STEPS]
    message = refusal(
        tmp_path, [*flags, "--load", tmp_path / "nothing", "--pretrained-checkpoint", trained.checkpoints]
    )
    assert message.startswith(f"error: --pretrained-checkpoint {trained.checkpoints}: was trained with ")


def test_the_same_memory_is_fine_tuned_from_it_in_another_layout(
    world: World, trained: Finished, tmp_path: Path
) -> None:
    flags = flags_of(world, "--use-distributed-optimizer", steps=1)  # whose state it does not have
    launch(tmp_path, [*flags, "--pretrained-checkpoint", trained.checkpoints]).require_success()


def test_another_memory_is_refused_where_a_step_is_named_and_no_newest_is_noted(
    world: World, trained: Finished, tmp_path: Path
) -> None:
    untracked = tmp_path / "checkpoints"
    untracked.mkdir()
    name = f"iter_{STEPS:07}"
    (untracked / name).symlink_to(trained.checkpoints / name)
    flags = flags_of(world, "--graft-bank", world.many_rows, "--load", untracked)
    assert "was trained with other banks" in refusal(tmp_path / "run", [*flags, "--ckpt-step", STEPS])
    assert "has no iter_0000009" in refusal(tmp_path / "none", [*flags, "--ckpt-step", 9])


def test_without_training_the_first_validation_samples_are_measured(
    world: World, trained: Finished, tmp_path: Path
) -> None:
    flags = flags_of(world, *EVALUATED, "--skip-train", "--graft-verify", 1)
    measured = launch(tmp_path, [*flags, "--load", trained.checkpoints]).require_success()
    assert "validation loss at iteration" in measured.stdout


def test_the_stock_model_goes_on_from_formats_that_hold_no_identity_and_a_memory_does_not(
    world: World, tmp_path: Path
) -> None:
    checkpoints = tmp_path / "checkpoints"
    places = ("--load", checkpoints, "--save", checkpoints)
    stock = [*world.flags(), "--train-iters", STEPS, "--ckpt-format", "torch", *places]
    launch(tmp_path / "first", [*stock, "--exit-interval", HALF]).require_success()
    second = launch(tmp_path / "second", stock).require_success()
    assert list(second.losses) == list(range(HALF + 1, STEPS + 1))
    message = refusal(tmp_path / "memory", flags_of(world, "--load", checkpoints, "--auto-detect-ckpt-format"))
    assert "does not have the format in which a memory's identity is kept" in message


def test_flags_that_a_file_would_replace_are_refused(world: World, tmp_path: Path) -> None:
    assert "--yaml-cfg: is not supported here" in refusal(tmp_path, flags_of(world, "--yaml-cfg", "run.yaml"))
