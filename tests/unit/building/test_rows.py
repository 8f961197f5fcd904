from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_graft.bank.bf16 import bf16_from_float32, float32_from_bf16
from megatron_graft.bank.manifest import Processing
from megatron_graft.building.rows import process_layer
from megatron_graft.errors import ConfigError, DonorError
from tests.helpers.states import StatesInMemory, rows_from_states

PROCESSED = Processing(centred=True, normalised=True)


def states(num_rows: int = 500, seed: int = 0) -> np.ndarray:
    """States with a large common direction, as a donor's have."""
    generator = np.random.default_rng(seed)
    common = 5 * generator.standard_normal(16)
    return (common + generator.standard_normal((num_rows, 16))).astype(np.float32)


def test_rows_have_rms_one_and_no_common_direction() -> None:
    rows = float32_from_bf16(rows_from_states(states(), PROCESSED))
    assert np.sqrt((rows**2).mean(axis=1)) == pytest.approx(np.ones(500), abs=5e-3)
    assert np.abs(rows.mean(axis=0)).max() < 0.1


def test_raw_rows_are_the_states_rounded() -> None:
    rows = rows_from_states(states(), Processing(centred=False, normalised=False))
    np.testing.assert_array_equal(rows, bf16_from_float32(states()))


def test_centring_alone_takes_the_mean_away() -> None:
    rows = float32_from_bf16(rows_from_states(states(), Processing(centred=True, normalised=False)))
    np.testing.assert_allclose(rows, states() - states().mean(axis=0), atol=0.02)


def test_a_few_huge_states_do_not_show_in_the_other_rows() -> None:
    plain = states()
    spiked = states()
    spiked[:10, 3] = 1e5
    others = slice(10, None)
    before = float32_from_bf16(rows_from_states(plain, PROCESSED))[others]
    after = float32_from_bf16(rows_from_states(spiked, PROCESSED))[others]
    cosine = (before * after).sum(axis=1) / np.linalg.norm(before, axis=1) / np.linalg.norm(after, axis=1)
    assert cosine.min() > 0.9


def test_equal_states_give_zero_rows_and_not_nan() -> None:
    rows = float32_from_bf16(rows_from_states(np.ones((4, 16), dtype=np.float32), PROCESSED))
    assert np.abs(rows).max() < 1e-2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_refused(value: float) -> None:
    broken = states()
    broken[17, 2] = value
    with pytest.raises(DonorError, match="text number 17"):
        rows_from_states(broken, PROCESSED)


def test_rows_come_in_blocks_and_are_the_rows_of_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = process_layer(StatesInMemory({7: states()}), 7, PROCESSED)
    monkeypatch.setattr("megatron_graft.building.rows._BLOCK_ROWS", 64)
    blocks = process_layer(StatesInMemory({7: states()}), 7, PROCESSED, path=tmp_path / "rows.npy")
    difference = float32_from_bf16(whole.rows) - float32_from_bf16(np.load(tmp_path / "rows.npy"))
    assert np.abs(difference).max() <= 2**-6  # one step of bfloat16: the mean was summed in another order
    np.testing.assert_array_equal(blocks.raw_norms, whole.raw_norms)


def test_statistics_tell_what_was_taken_away_and_how_long_states_were() -> None:
    processed = process_layer(StatesInMemory({3: states()}), 3, Processing(centred=True, normalised=False))
    found = processed.statistics()
    np.testing.assert_allclose(found["mean"], states().mean(axis=0), rtol=1e-5)
    assert found["state_norm_quantiles"]["0.5"] == pytest.approx(np.median(np.linalg.norm(states(), axis=1)))
    raw = process_layer(StatesInMemory({3: states()}), 3, Processing(centred=False, normalised=False))
    assert raw.statistics()["mean"] is None


def test_float16_rows_are_rounded_once() -> None:
    raw = Processing(centred=False, normalised=False)
    rows = process_layer(StatesInMemory({0: states()}), 0, raw, row_dtype="float16").rows
    np.testing.assert_array_equal(rows, states().astype(np.float16))


def test_a_value_beyond_float16_is_refused() -> None:
    large = states()
    large[3, 3] = 7e4
    with pytest.raises(ConfigError, match="--row-dtype float16: cannot hold a value of the rows .got 70000"):
        process_layer(StatesInMemory({0: large}), 0, Processing(centred=False, normalised=False), row_dtype="float16")
