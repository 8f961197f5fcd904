"""A run that was stopped and goes on is the run that was never stopped, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_graft.bank.reader import open_bank
from megatron_graft.commands import EXIT_BAD_INPUT
from tests.helpers.layouts import LAYOUTS, STEPS, WORLDS, world_flags
from tests.helpers.saved_tensors import read_checkpoint
from tests.helpers.tiny_run import Finished, World, launch, read_records

# In its other form the distributed optimizer's state has gaps between parameters that nobody writes.
# Under PP=2 the second stage has no site, so it fetches nothing and has none of the groups of parameters.
RESUMED = {
    "DP=2, distributed optimizer": ("--dist-ckpt-optim-fully-reshardable",),
    "TP=2, sequence parallel": (),
    "EP=2": (),
    "PP=2": ("--graft-layers", 2, "--graft-donor-layers", 4, "--engram-layers", 2),
    "PP=2, interleaved": (),
    "CP=2": (),
    "MTP, PP=2": (),
}


def in_parts(flags: list[Any], directory: Path, checkpoints: Path, *more: Any, **options: Any) -> Finished:
    """Part of a run of ten steps that goes on from ``checkpoints``, if there are any, and saves there."""
    flags = [*flags, "--train-iters", STEPS, "--load", checkpoints, "--save", checkpoints, *more]
    return launch(directory, flags, **options)


def assert_same_steps(part: Finished, whole: Finished, first: int, last: int) -> None:
    """Losses and gradient norms as Python floats: equal means equal in every bit."""
    figures = [
        {record["iteration"]: (record["lm loss"], record["grad_norm"]) for record in run.records}
        for run in (part, whole)
    ]
    assert list(figures[0]) == list(range(first, last + 1))
    assert figures[0] == {iteration: figures[1][iteration] for iteration in figures[0]}


def assert_same_checkpoint(part: Path, whole: Path) -> None:
    """Parameters and optimizer state, tensor by tensor."""
    expected_of, actual_of = read_checkpoint(whole, STEPS), read_checkpoint(part, STEPS)
    assert expected_of.keys() == actual_of.keys()
    assert any("exp_avg" in key for key in expected_of)
    different = [key for key, expected in expected_of.items() if not torch.equal(actual_of[key], expected)]
    assert not different


def test_stopped_killed_and_resumed_equals_uninterrupted(world: World, fresh: Finished, tmp_path: Path) -> None:
    flags, checkpoints = world_flags(world, "exclusive"), tmp_path / "checkpoints"
    stopped = in_parts(flags, tmp_path / "stopped", checkpoints, "--exit-interval", 3).require_success()
    assert_same_steps(stopped, fresh, 1, 3)

    def two_steps_past_the_checkpoint() -> bool:
        return len(read_records(tmp_path / "killed")) >= 4

    killed = in_parts(
        flags, tmp_path / "killed", checkpoints, "--save-interval", 5, kill_when=two_steps_past_the_checkpoint
    )
    assert killed.returncode != 0
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == "5"
    assert_same_steps(killed, fresh, 4, killed.records[-1]["iteration"])

    resumed = in_parts(flags, tmp_path / "resumed", checkpoints).require_success()
    assert_same_steps(resumed, fresh, 6, STEPS)
    assert_same_checkpoint(checkpoints, fresh.checkpoints)


@pytest.mark.parametrize("name", RESUMED)
def test_every_layout_resumes_to_the_last_bit(name: str, world: World, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    flags = [*world_flags(world, layout.world), *RESUMED[name], *layout.flags]

    def run(part: str, checkpoints: Path, *more: Any) -> Finished:
        finished = in_parts(flags, tmp_path / part, checkpoints, *more, processes=layout.processes)
        return finished.require_success()

    whole = run("whole", tmp_path / "whole-checkpoints")
    run("stopped", tmp_path / "checkpoints", "--exit-interval", 5)
    resumed = run("resumed", tmp_path / "checkpoints")
    assert_same_steps(resumed, whole, 6, STEPS)
    assert_same_checkpoint(tmp_path / "checkpoints", tmp_path / "whole-checkpoints")


class TestAnotherMemoryIsRefused:
    """Before the first step, with both sides named and the exit code of bad input."""

    def refusal(self, directory: Path, flags: list[Any], checkpoints: Path) -> str:
        refused = launch(directory, [*flags, "--train-iters", STEPS + 1, "--load", checkpoints])
        assert refused.returncode == EXIT_BAD_INPUT, refused.stderr[-2000:]
        assert refused.records == []
        (message,) = (line for line in refused.stderr.splitlines() if line.startswith("error: "))
        assert str(checkpoints) in message
        return message + refused.stderr.partition(message)[2]

    def test_another_bank(self, world: World, fresh: Finished, tmp_path: Path) -> None:
        flags = [*world.flags(world.many_rows), *WORLDS["exclusive"]]
        message = self.refusal(tmp_path, flags, fresh.checkpoints)
        assert open_bank(world.bank).digest in message
        assert open_bank(world.many_rows).digest in message
        assert "--graft-bank" in message

    def test_other_layers(self, world: World, fresh: Finished, tmp_path: Path) -> None:
        flags = [*world.flags(world.bank, layers=(2, 4)), *WORLDS["exclusive"]]
        assert "other sites of its memory" in self.refusal(tmp_path, flags, fresh.checkpoints)

    def test_other_tables(self, world: World, fresh: Finished, tmp_path: Path) -> None:
        flags = [*world_flags(world, "exclusive"), "--engram-seed", 1]
        assert "other engram of its memory" in self.refusal(tmp_path, flags, fresh.checkpoints)

    def test_a_bank_for_a_stock_checkpoint(self, world: World, stock: Finished, tmp_path: Path) -> None:
        message = self.refusal(tmp_path, world.flags(world.bank), stock.checkpoints)
        assert open_bank(world.bank).digest in message
        assert "without a memory" in message

    def test_no_bank_for_a_checkpoint_with_memory(self, world: World, fresh: Finished, tmp_path: Path) -> None:
        message = self.refusal(tmp_path, world.flags(), fresh.checkpoints)
        assert open_bank(world.bank).digest in message
        assert "with a memory" in message
