"""Before its first step, the model with fresh memory sites is the stock model, bit for bit."""

from __future__ import annotations

import torch

from tests.helpers.saved_tensors import read_gradients
from tests.helpers.tiny_run import Finished


def test_first_loss_equals_the_stock_model(fresh: Finished, stock: Finished) -> None:
    assert fresh.losses[1] == stock.losses[1]


def test_first_gradients_equal_the_stock_model(fresh: Finished, stock: Finished) -> None:
    with_sites = read_gradients(fresh.checkpoints, 1)
    for name, (gradient,) in read_gradients(stock.checkpoints, 1).items():
        assert torch.equal(with_sites.pop(name)[0], gradient), name
    # What is left is the sites' own, of which the value projections learn at once, hence their gradients are not zero.
    assert {name.partition(".memory.")[0] for name in with_sites} == {f"decoder.layers.{n}" for n in (1, 2, 3)}
    values = [name for name in with_sites if name.endswith("value_weight")]
    assert len(values) == 4, "two banks' and two tables'"
    assert all(float(with_sites[name][0].abs().max()) > 0 for name in values)


def test_the_memory_is_learnt_from_then_on(fresh: Finished, stock: Finished) -> None:
    assert fresh.losses[10] != stock.losses[10]
    ratios = [fresh.records[step]["graft/delta_ratio_layer_2"] for step in (0, 9)]
    assert ratios[0] == 0 < ratios[1]
    assert 0.2 < fresh.records[0]["graft/hit_rate"] < 0.99
