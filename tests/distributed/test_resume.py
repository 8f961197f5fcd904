"""A run that was stopped and goes on is the run that was never stopped, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_graft.bank.reader import open_bank
from megatron_graft.commands import EXIT_BAD_INPUT
from tests.helpers.layouts import STEPS
from tests.helpers.saved_tensors import read_checkpoint
from tests.helpers.tiny_run import Finished, World, launch, read_records


def in_parts(world: World, directory: Path, checkpoints: Path, *flags: Any, **options: Any) -> Finished:
    """Part of a run of ten steps that goes on from ``checkpoints``, if there are any, and saves there."""
    flags = (*world.flags(world.bank), "--train-iters", STEPS, "--load", checkpoints, "--save", checkpoints, *flags)
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
    checkpoints = tmp_path / "checkpoints"
    stopped = in_parts(world, tmp_path / "stopped", checkpoints, "--exit-interval", 3).require_success()
    assert_same_steps(stopped, fresh, 1, 3)

    def two_steps_past_the_checkpoint() -> bool:
        return len(read_records(tmp_path / "killed")) >= 4

    killed = in_parts(
        world, tmp_path / "killed", checkpoints, "--save-interval", 5, kill_when=two_steps_past_the_checkpoint
    )
    assert killed.returncode != 0
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == "5"
    assert_same_steps(killed, fresh, 4, killed.records[-1]["iteration"])

    resumed = in_parts(world, tmp_path / "resumed", checkpoints).require_success()
    assert_same_steps(resumed, fresh, 6, STEPS)
    assert_same_checkpoint(checkpoints, fresh.checkpoints)


def test_distributed_optimizer_resumes_to_the_last_bit(world: World, tmp_path: Path) -> None:
    def run(name: str, checkpoints: Path, *flags: Any) -> Finished:
        flags = ("--use-distributed-optimizer", *flags)
        return in_parts(world, tmp_path / name, checkpoints, *flags, processes=2).require_success()

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
        message = self.refusal(tmp_path, world.flags(world.many_rows), fresh.checkpoints)
        assert open_bank(world.bank).digest in message
        assert open_bank(world.many_rows).digest in message
        assert "--graft-bank" in message

    def test_other_layers(self, world: World, fresh: Finished, tmp_path: Path) -> None:
        message = self.refusal(tmp_path, world.flags(world.bank, layers=(2, 4)), fresh.checkpoints)
        assert "[2, 3]" in message
        assert "[2, 4]" in message

    def test_a_bank_for_a_stock_checkpoint(self, world: World, stock: Finished, tmp_path: Path) -> None:
        message = self.refusal(tmp_path, world.flags(world.bank), stock.checkpoints)
        assert open_bank(world.bank).digest in message
        assert "without a memory" in message

    def test_no_bank_for_a_checkpoint_with_memory(self, world: World, fresh: Finished, tmp_path: Path) -> None:
        message = self.refusal(tmp_path, world.flags(), fresh.checkpoints)
        assert open_bank(world.bank).digest in message
        assert "with a memory" in message
