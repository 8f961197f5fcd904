"""A stock checkpoint goes on in a model with sites, and one with sites in the stock model, weights untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.layouts import STEPS, world_flags
from tests.helpers.saved_tensors import read_checkpoint
from tests.helpers.tiny_run import Finished, World, launch

ADOPT = ("--graft-adopt-checkpoint", "--no-load-optim", "--no-load-rng")


def go_on(directory: Path, flags: list[Any], checkpoints: Path, steps: int) -> Finished:
    """Go on from a checkpoint of step ten with fresh moments up to ``steps``, and save."""
    flags = [*flags, "--load", checkpoints, "--train-iters", steps, "--save", directory / "checkpoints"]
    return launch(directory, flags).require_success()


@pytest.fixture(scope="module")
def adopted(world: World, stock: Finished) -> Finished:
    """The stock model's checkpoint of step ten, loaded into a model with sites and saved again, nothing trained."""
    flags = [*world_flags(world, "exclusive"), *ADOPT]
    return go_on(world.directory / "adopted", flags, stock.checkpoints, STEPS)


@pytest.fixture(scope="module")
def next_loss(world: World, stock: Finished) -> float:
    """What the stock model makes of the eleventh step."""
    flags = [*world.flags(), "--no-load-optim", "--no-load-rng"]
    return go_on(world.directory / "stock-goes-on", flags, stock.checkpoints, STEPS + 1).losses[STEPS + 1]


def test_the_backbone_is_the_stock_one_and_the_sites_are_fresh(stock: Finished, adopted: Finished) -> None:
    before, after = read_checkpoint(stock.checkpoints, STEPS), read_checkpoint(adopted.checkpoints, STEPS)
    backbone = [key for key in before if key.startswith(("embedding.", "decoder.", "output_layer."))]
    assert len(backbone) == 10
    assert [key for key in backbone if not torch.equal(after[key], before[key])] == []
    sites = {key: value for key, value in after.items() if key.startswith("decoder.layers.memory_")}
    assert {key.split(".")[2] for key in sites} == {"memory_2", "memory_3", "memory_4"}
    assert all(float(value.abs().max()) == 0 for key, value in sites.items() if key.endswith("value_weight"))
    assert all(float(value.abs().max()) > 0 for key, value in sites.items() if key.endswith(("key_weight", "table")))


def test_its_next_loss_is_the_stock_models(
    world: World, stock: Finished, adopted: Finished, next_loss: float, tmp_path: Path
) -> None:
    flags = [*world_flags(world, "exclusive"), *ADOPT]
    assert go_on(tmp_path / "from-stock", flags, stock.checkpoints, STEPS + 1).losses == {STEPS + 1: next_loss}
    own = [*world_flags(world, "exclusive"), "--no-load-optim", "--no-load-rng"]
    assert go_on(tmp_path / "from-its-own", own, adopted.checkpoints, STEPS + 1).losses == {STEPS + 1: next_loss}


def test_a_run_that_adopts_a_pretrained_checkpoint_goes_on_from_its_own(
    world: World, stock: Finished, tmp_path: Path
) -> None:
    """As a job that Slurm puts back into the queue: the same flags again."""
    own = ("--load", tmp_path / "own", "--save", tmp_path / "own", "--pretrained-checkpoint", stock.checkpoints)
    flags = [*world_flags(world, "exclusive"), "--graft-adopt-checkpoint", *own, "--train-iters", 4]
    first = launch(tmp_path / "first", [*flags, "--exit-interval", 2]).require_success()
    second = launch(tmp_path / "second", flags).require_success()
    whole = launch(tmp_path / "whole", [*flags, "--load", tmp_path / "none", "--save", tmp_path / "whole"])
    assert first.losses | second.losses == whole.require_success().losses
    assert (list(first.losses), list(second.losses)) == ([1, 2], [3, 4])


def test_and_back_again(world: World, adopted: Finished, next_loss: float, tmp_path: Path) -> None:
    back = go_on(tmp_path / "back", [*world.flags(), *ADOPT], adopted.checkpoints, STEPS + 1)
    assert back.losses == {STEPS + 1: next_loss}
    assert not [key for key in read_checkpoint(back.checkpoints, STEPS + 1) if "memory" in key]


def test_without_the_flag_and_with_the_optimizer_it_is_refused(world: World, stock: Finished, tmp_path: Path) -> None:
    flags = [*world_flags(world, "exclusive"), "--load", stock.checkpoints, "--train-iters", STEPS + 1]
    refused = launch(tmp_path / "without", [*flags, "--no-load-optim"])
    assert refused.returncode == 2 and "--graft-adopt-checkpoint" in refused.stderr
    refused = launch(tmp_path / "with-optimizer", [*flags, "--graft-adopt-checkpoint"])
    assert refused.returncode == 2 and "--no-load-optim" in refused.stderr
