"""The faults of megatron-core that the package works round, or refuses for: each is still there.

A test here that fails says that Megatron has mended something: then what the package does about it can go.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.resharding import train
from tests.helpers.tiny_run import Finished, World

Runs = Callable[[str], Finished]


@pytest.mark.parametrize(
    ("part", "error"),
    [("state first", "assert len(steps) == 1"), ("step kept", "Error: ")],
)
def test_the_distributed_optimizer_cannot_load_what_it_saved(
    part: str, error: str, world: World, half_of: Runs, tmp_path: Path
) -> None:
    failed = train(world, "single", tmp_path / "run", load=half_of("single").checkpoints, leave_out=part)
    assert failed.returncode != 0 and failed.records == []
    assert error in failed.stderr


def test_loaded_parameters_share_one_step_and_train_otherwise(
    world: World, half_of: Runs, rest_of: Runs, tmp_path: Path
) -> None:
    wrong = train(world, "single", tmp_path / "run", load=half_of("single").checkpoints, leave_out="steps apart")
    right = rest_of("single").losses
    assert wrong.require_success().losses.keys() == right.keys()
    assert wrong.losses != pytest.approx(right, rel=1e-4)


@pytest.mark.parametrize(
    ("source", "target"),
    [("single", "EP=2"), ("EP=2", "single"), ("single, for data-parallel ranks only", "TP=2, SP")],
)
def test_optimizer_state_does_not_go_from_one_to_the_other(
    source: str, target: str, world: World, half_of: Runs, tmp_path: Path
) -> None:
    checkpoints = half_of(source).checkpoints
    failed = train(world, target, tmp_path / "run", load=checkpoints, leave_out="refusal of layouts")
    assert failed.returncode != 0 and failed.records == []
    assert "error: --" not in failed.stderr, "it was Megatron that failed"
