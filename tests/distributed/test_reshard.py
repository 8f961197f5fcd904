"""A checkpoint of one layout, optimizer state included, goes on in another as it would have in its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_graft.commands import EXIT_BAD_INPUT
from tests.helpers.resharding import HALF, SIDES, WHOLE, train
from tests.helpers.saved_tensors import read_checkpoint
from tests.helpers.tiny_run import Finished, World

LOSSES, PARAMETERS, MOMENTS = 1e-5, 1e-4, 1e-3  # relative, as in test_layouts
Runs = Callable[[str], Finished]
PAIRS = [
    ("single", "DP=2"), ("single", "TP=2, SP"), ("single", "PP=2"), ("TP=2, SP", "PP=2"), ("PP=2", "single"),
    ("single", "CP=2"), ("CP=2", "PP=2, interleaved"),
    ("EP=2", "TP=2, SP, EP=2"), ("EP=2", "PP=2, EP=2"), ("PP=2, EP=2", "EP=2"),
    ("single, plain optimizer", "TP=2, SP, plain optimizer"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda name: name)
def test_it_goes_on_as_in_its_own_layout(
    source: str, target: str, world: World, half_of: Runs, rest_of: Runs, tmp_path: Path
) -> None:
    checkpoints = half_of(source).checkpoints
    expected, actual = rest_of(source), train(world, target, tmp_path / "run", load=checkpoints).require_success()
    assert list(actual.losses) == list(range(HALF + 1, WHOLE + 1))
    assert actual.losses == pytest.approx(expected.losses, rel=LOSSES)
    wanted_of, saved_of = (read_checkpoint(run.checkpoints, WHOLE) for run in (expected, actual))
    moments = [key for key in wanted_of if "exp_avg" in key and key.endswith("engram.table")]
    assert len(moments) == 4, "two moments of two tables"
    compared = [key for key, value in wanted_of.items() if value.is_floating_point() and "rng" not in key]
    assert not [key for key in compared if key not in saved_of]
    for key in compared:
        tolerance = MOMENTS if "exp_avg" in key else PARAMETERS
        assert saved_of[key].shape == wanted_of[key].shape
        assert (saved_of[key] - wanted_of[key]).norm() <= tolerance * wanted_of[key].norm(), key


@pytest.mark.parametrize(
    ("source", "target", "flag"),
    [
        ("single", "EP=2", "--expert-model-parallel-size"),
        ("single", "single, plain optimizer", "--use-distributed-optimizer"),
        ("single, for data-parallel ranks only", "TP=2, SP", "--tensor-model-parallel-size"),
    ],
)
def test_what_megatron_cannot_reshard_is_refused_by_flag(
    source: str, target: str, flag: str, world: World, half_of: Runs, tmp_path: Path
) -> None:
    refused = train(world, target, tmp_path / "run", load=half_of(source).checkpoints)
    assert refused.returncode != 0 and refused.records == []
    assert f"error: {flag}: " in refused.stderr and "--no-load-optim" in refused.stderr
    if SIDES[target].processes == 1:
        assert refused.returncode == EXIT_BAD_INPUT


def test_the_weights_alone_go_from_one_expert_layout_to_the_other(world: World, half_of: Runs, tmp_path: Path) -> None:
    """With fresh moments: the first loss is the loaded model's own."""
    checkpoints = half_of("single").checkpoints
    split = train(world, "EP=2", tmp_path / "split", "--no-load-optim", load=checkpoints).require_success()
    whole = train(world, "single", tmp_path / "whole", "--no-load-optim", load=checkpoints).require_success()
    assert split.losses[HALF + 1] == pytest.approx(whole.losses[HALF + 1], rel=1e-6)
