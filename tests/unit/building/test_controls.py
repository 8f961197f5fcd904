from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from megatron_graft.bank.bf16 import bf16_from_float32, float32_from_bf16
from megatron_graft.bank.manifest import Control
from megatron_graft.bank.quantise import StoredRows, stored_as
from megatron_graft.building.controls import control_rows
from megatron_graft.errors import ConfigError

SHUFFLED, RANDOM = Control(kind="shuffled", seed=3), Control(kind="random", seed=3)


def controlled(layers: dict[int, np.ndarray], control: Control) -> Mapping[int, np.ndarray]:
    """``control_rows`` of bfloat16 rows."""
    rows = control_rows(StoredRows(row_dtype="bfloat16", layers=layers), control)
    assert rows.row_dtype == "bfloat16" and not rows.scales
    return rows.layers


def real_rows(num_rows: int = 4000, width: int = 24) -> dict[int, np.ndarray]:
    """Two layers of rows with unequal means, spreads and norms."""
    layers = {}
    for layer in (6, 12):
        generator = np.random.default_rng(layer)
        rows = generator.standard_normal((num_rows, width)) * generator.uniform(0.2, 2, width)
        rows += generator.uniform(-1, 1, width)
        layers[layer] = bf16_from_float32((rows * generator.uniform(0.8, 1.2, (num_rows, 1))).astype(np.float32))
    return layers


def test_shuffled_rows_are_one_permutation_for_all_layers_that_leaves_no_row_in_place() -> None:
    real = real_rows()
    numbered = {6: real[6], 12: np.arange(4000, dtype=np.uint16)[:, None].repeat(24, axis=1)}
    shuffled = controlled(numbered, SHUFFLED)
    sources = shuffled[12][:, 0].astype(np.int64)
    assert sorted(sources.tolist()) == list(range(4000))
    assert (sources != np.arange(4000)).all()
    np.testing.assert_array_equal(shuffled[6], real[6][sources])


def test_random_rows_match_norms_and_moments_and_nothing_else() -> None:
    real = real_rows()
    for layer, bits in controlled(real, RANDOM).items():
        want, got = float32_from_bf16(real[layer]), float32_from_bf16(bits)
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), np.linalg.norm(want, axis=1), rtol=5e-3)
        np.testing.assert_allclose(got.mean(axis=0), want.mean(axis=0), atol=0.02)
        np.testing.assert_allclose(got.std(axis=0), want.std(axis=0), rtol=0.02)
        correlation = [np.corrcoef(want[:, column], got[:, column])[0, 1] for column in range(24)]
        assert np.abs(correlation).max() < 0.2


def test_random_layers_are_drawn_apart() -> None:
    one_layer = real_rows()[6]
    drawn = controlled({6: one_layer, 12: one_layer}, RANDOM)
    assert (drawn[6] != drawn[12]).mean() > 0.9


@pytest.mark.parametrize("kind", ["shuffled", "random"])
def test_the_seed_decides_every_bit(kind: str) -> None:
    real = real_rows(100)
    first, again, other = (controlled(real, Control(kind=kind, seed=seed))[6] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_one_row_cannot_be_shuffled() -> None:
    with pytest.raises(ConfigError, match="at least 2 rows"):
        controlled({6: np.zeros((1, 4), dtype=np.uint16)}, SHUFFLED)


def test_shuffled_rows_keep_their_scales() -> None:
    real = stored_as("int8", real_rows(100))
    shuffled = control_rows(real, SHUFFLED)
    assert shuffled.row_dtype == "int8"
    for layer, elements in real.layers.items():
        pairs = zip(elements, real.scales[layer], strict=True)
        places = {(bytes(row), float(scale)): place for place, (row, scale) in enumerate(pairs)}
        moved = zip(shuffled.layers[layer], shuffled.scales[layer], strict=True)
        found = [places[bytes(row), float(scale)] for row, scale in moved]
        assert sorted(found) == list(range(100)) and all(place != row for row, place in enumerate(found))


def test_random_rows_cannot_be_drawn_from_quantised_ones() -> None:
    with pytest.raises(
        ConfigError, match="--control random: cannot be made .*got int8; expected bfloat16.*from the data"
    ):
        control_rows(stored_as("int8", real_rows(100)), RANDOM)
