"""Rows trained under a bank's keys, in real runs: from the stock model on, to the last bit, in every served layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_graft.bank.reader import open_bank
from megatron_graft.commands import EXIT_BAD_INPUT
from tests.distributed.test_resume import assert_same_steps
from tests.helpers.layouts import DISTRIBUTED_OPTIMIZER, MODEL_ONLY, SP, TP2, WORLDS
from tests.helpers.saved_tensors import Split, digests, largest_difference, read_checkpoint, read_gradients
from tests.helpers.tiny_run import DONOR_WIDTH, Finished, World, launch

STEPS, HALF = 6, 3
LEARNING_RATE = 1e-3  # of tiny runs, at its highest
STARTS = ["trained", "fresh"]
# Layer 2 reads donor layer 4 of the bank and a table, layer 3 donor layer 8, layer 4 a table.
SITES = {2: (0, DONOR_WIDTH), 3: (DONOR_WIDTH, 2 * DONOR_WIDTH)}
LAYOUTS = {
    "DP=2, distributed optimizer": (DISTRIBUTED_OPTIMIZER, Split()),
    "TP=2, sequence parallel": ((*TP2, *SP), Split(tensor=2, sequence_parallel=True)),
}


def flags_of(world: World, start: str) -> list[Any]:
    rates = ["--graft-rows-lr-mult", 3] if start != "frozen" else []
    rows = ["--graft-rows", start, *rates, "--graft-lr-mult", 2, "--graft-verify", 2, "--weight-decay", 0.1]
    return [*world.flags(world.bank), *WORLDS["exclusive"], *rows, "--train-iters", STEPS]


@dataclass(frozen=True)
class Trained:
    """A run that was never stopped, and one in two halves."""

    whole: Finished
    first_half: Finished
    second_half: Finished


@pytest.fixture(scope="module")
def trained_of(world: World) -> Callable[[str], Trained]:
    made: dict[str, Trained] = {}

    def run(start: str) -> Trained:
        if start not in made:
            directory, flags = world.directory / f"rows {start}", flags_of(world, start)
            halves = ["--load", directory / "halves", "--save", directory / "halves", "--save-interval", HALF]
            made[start] = Trained(
                launch(directory / "whole", [*flags, "--save", directory / "whole" / "checkpoints"]).require_success(),
                launch(directory / "first half", [*flags, *halves, "--exit-interval", HALF]).require_success(),
                launch(directory / "second half", [*flags, *halves]).require_success(),
            )
        return made[start]

    return run


@pytest.fixture(scope="module")
def going_on(world: World, trained_of: Callable[[str], Trained]) -> Callable[[str], Finished]:
    """The last steps again from the weights at half, in a layout of :data:`LAYOUTS` or in one process ("")."""
    made: dict[str, Finished] = {}

    def run(name: str) -> Finished:
        if name not in made:
            directory = world.directory / f"rows going on {''.join(filter(str.isalnum, name))}"
            halves = halves_of(trained_of("trained"))
            layout = LAYOUTS[name][0] if name else ()
            flags = [*flags_of(world, "trained"), *MODEL_ONLY, "--load", halves, "--ckpt-step", HALF, *layout]
            flags += ["--save", directory / "checkpoints", "--save-wgrads-interval", HALF + 1]
            made[name] = launch(directory, flags, processes=2 if name else 1).require_success()
        return made[name]

    return run


def halves_of(runs: Trained) -> Path:
    """Checkpoints of the run in two halves."""
    return runs.first_half.directory.parent / "halves"


def table(checkpoint: dict[str, torch.Tensor], layer: int) -> torch.Tensor:
    return checkpoint[f"decoder.layers.memory_{layer}.graft.table"]


@pytest.mark.parametrize("start", STARTS)
def test_first_loss_equals_the_stock_model(start: str, trained_of: Callable[[str], Trained], stock: Finished) -> None:
    whole = trained_of(start).whole
    assert whole.losses[1] == stock.losses[1]
    assert whole.losses[2] != stock.losses[2]


@pytest.mark.parametrize("start", STARTS)
def test_a_stopped_run_goes_on_to_the_last_bit(start: str, trained_of: Callable[[str], Trained]) -> None:
    runs = trained_of(start)
    assert_same_steps(runs.first_half, runs.whole, 1, HALF)
    assert_same_steps(runs.second_half, runs.whole, HALF + 1, STEPS)
    expected_of = read_checkpoint(runs.whole.checkpoints, STEPS)
    actual_of = read_checkpoint(halves_of(runs), STEPS)
    assert expected_of.keys() == actual_of.keys()
    assert any("exp_avg" in key and key.endswith("graft.table") for key in expected_of)
    assert not [key for key, expected in expected_of.items() if not torch.equal(actual_of[key], expected)]


@pytest.mark.parametrize("start", STARTS)
def test_rows_that_are_read_learn_and_the_others_stay_to_the_last_bit(
    start: str, world: World, trained_of: Callable[[str], Trained]
) -> None:
    """Which the run's weight decay would not let them; and by more than the run's learning rate can move them."""
    bank, runs = open_bank(world.bank), trained_of(start)
    middle, end = read_checkpoint(halves_of(runs), HALF), read_checkpoint(runs.whole.checkpoints, STEPS)
    for layer, columns in SITES.items():
        assert table(end, layer).shape == (bank.num_rows, DONOR_WIDTH)
        difference = (table(end, layer) - table(middle, layer)).abs()
        still = ~difference.any(dim=1)
        assert 0 < still.sum() < bank.num_rows
        assert float(difference.max()) > 2 * LEARNING_RATE  # the sum of the run's own over these steps is half of it
        if start == "trained":
            values = torch.from_numpy(bank.float_rows(np.arange(bank.num_rows), columns))
            assert torch.equal(table(end, layer)[still], values[still])
            assert float((table(end, layer) - values).abs().max()) < STEPS * 3 * LEARNING_RATE


def test_the_frozen_bank_is_as_it_was(trained_of: Callable[[str], Trained], world: World, bank_before: Any) -> None:
    trained_of("trained")
    assert digests(world.bank) == bank_before


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_train_alike(name: str, going_on: Callable[[str], Finished]) -> None:
    expected, actual = going_on(""), going_on(name)
    assert list(actual.losses) == list(range(HALF + 1, STEPS + 1))
    assert actual.losses == pytest.approx(expected.losses, rel=1e-5)
    norms = [[record["grad_norm"] for record in run.records] for run in (actual, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    single, saved = (read_checkpoint(run.checkpoints, STEPS) for run in (expected, actual))
    for layer in SITES:
        assert (table(saved, layer) - table(single, layer)).norm() <= 1e-4 * table(single, layer).norm()


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_of_the_rows_are_those_of_one_process(name: str, going_on: Callable[[str], Finished]) -> None:
    """Shares of the ranks are told apart by their order; each holds its own rows' gradients, complete."""
    expected_of = read_gradients(going_on("").checkpoints, HALF + 1)
    copies_of = read_gradients(going_on(name).checkpoints, HALF + 1, LAYOUTS[name][1])
    for layer in SITES:
        key = f"decoder.layers.{layer - 1}.memory.graft.table"
        (expected,), shares = expected_of[key], copies_of[key]
        assert len(shares) == LAYOUTS[name][1].tensor
        assert float(expected.abs().max()) > 0
        assert largest_difference(torch.cat(shares), expected) <= 1e-5


def test_a_checkpoint_of_trained_rows_is_refused_by_frozen_ones(
    world: World, trained_of: Callable[[str], Trained], tmp_path: Path
) -> None:
    halves = halves_of(trained_of("trained"))
    refused = launch(tmp_path, [*flags_of(world, "frozen"), "--load", halves])
    assert refused.returncode == EXIT_BAD_INPUT
    assert "was trained with other sites of its memory" in refused.stderr
    assert refused.records == []
