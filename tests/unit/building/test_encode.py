from __future__ import annotations

import numpy as np
import pytest

from megatron_graft.bank.bf16 import bf16_from_float32, float32_from_bf16
from megatron_graft.bank.manifest import Processing
from megatron_graft.building.encode import rows_from_states
from megatron_graft.errors import DonorError

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
