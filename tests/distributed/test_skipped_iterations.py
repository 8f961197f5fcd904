"""Iterations that Megatron is told to skip: their data pass by, and the memory that was read ahead for them with it."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.layouts import TABLES
from tests.helpers.tiny_run import World, launch

STEPS, SKIPPED = 5, (1, 3)


def test_what_follows_a_skipped_iteration_is_trained_on_its_own_data_and_memory(world: World, tmp_path: Path) -> None:
    """At a learning rate of 0 a step's loss is its data's and memory's alone."""
    flags = [*world.flags(world.bank), *TABLES, "--train-iters", STEPS, "--lr", 0, "--min-lr", 0, "--graft-verify", 1]
    whole = launch(tmp_path / "whole", flags).require_success()
    skipping = launch(tmp_path / "skipping", [*flags, "--iterations-to-skip", *SKIPPED]).require_success()
    rest = {step: loss for step, loss in whole.losses.items() if step not in SKIPPED}
    assert skipping.losses == rest and len(set(rest.values())) == STEPS - len(SKIPPED)
