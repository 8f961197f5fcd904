"""The bank is read and never written, and nothing of it enters model, optimizer or checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_graft.bank.reader import open_bank
from tests.helpers.layouts import STEPS, WORLDS
from tests.helpers.saved_tensors import digests, read_checkpoint, read_gradients
from tests.helpers.tiny_run import DONOR_WIDTH, MANY_ROWS, NUM_ROWS, Finished, World, launch


def size_of(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def on_many_rows(world: World) -> Finished:
    """The same run on a bank with four times the rows."""
    directory = world.directory / "many-rows"
    flags = [*world.flags(world.many_rows), *WORLDS["exclusive"], "--train-iters", STEPS, "--exit-interval", 1]
    return launch(directory, [*flags, "--save", directory / "checkpoints"]).require_success()


def test_training_leaves_every_byte_of_the_bank(world: World, bank_before: dict[str, str], fresh: Finished) -> None:
    assert len(fresh.losses) == STEPS
    assert digests(world.bank) == bank_before
    open_bank(world.bank, verify="full")


def test_no_parameter_or_saved_tensor_has_the_shape_of_the_bank(world: World, fresh: Finished) -> None:
    bank = open_bank(world.bank)
    parameters = {name: copies[0] for name, copies in read_gradients(fresh.checkpoints, 1).items()}
    saved = read_checkpoint(fresh.checkpoints, STEPS)
    assert bank.num_rows == NUM_ROWS
    assert any(".exp_avg." in key for key in saved)
    for name, tensor in (parameters | saved).items():
        assert not {NUM_ROWS, NUM_ROWS * bank.row_dim} & set(tensor.shape), name
    own = [(64,), (64,), (64,), (4, 64)]
    graft, engram = [(64, DONOR_WIDTH)] * 2, [(64, 45)] * 2  # three orders of 15 elements
    shapes = sorted(tuple(tensor.shape) for name, tensor in parameters.items() if ".memory." in name)
    tables = [shape for shape in shapes if shape[1:] == (5,)]  # 15 elements over three heads
    assert len(tables) == 2 and min(tables)[0] > 3 * (101 + 67 + 53), "trained, and no bank's"
    assert sorted(shapes) == sorted([*own * 3, *graft * 2, *engram * 2, *tables])


def test_a_larger_bank_makes_no_larger_checkpoint(world: World, fresh: Finished, on_many_rows: Finished) -> None:
    shapes = [
        {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in read_checkpoint(run.checkpoints, step).items()}
        for run, step in ((fresh, STEPS), (on_many_rows, 1))
    ]
    assert shapes[0] == shapes[1]
    small, large = (size_of(run.checkpoints / f"iter_{step:07d}") for run, step in ((fresh, STEPS), (on_many_rows, 1)))
    assert open_bank(world.many_rows).num_rows == MANY_ROWS
    assert size_of(world.many_rows) - size_of(world.bank) > 50_000
    assert abs(large - small) < 2_000
