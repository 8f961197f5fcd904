"""Control banks: the same keys with other rows. They show whether the donor's knowledge pays.

Shapes: N rows, D width of one donor layer.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_graft.bank.bf16 import bf16_from_float32, float32_from_bf16
from megatron_graft.bank.manifest import Control
from megatron_graft.bank.quantise import StoredRows
from megatron_graft.errors import ConfigError

_MATCHING_ROUNDS = 4


def control_rows(rows: StoredRows, control: Control) -> StoredRows:
    """Rows of a control bank, made from the rows of the real one.

    ``shuffled`` gives every key another key's row, the same one in every layer, with its scale if it has one.
    ``random`` draws normal rows with the real rows' mean and standard deviation per dimension and each real row's norm.

    Args:
        rows: the real ones.
        control: kind and seed.

    Returns:
        rows of the same type and shape; the same input always gives the same bytes.

    Raises:
        ConfigError: there are too few rows to shuffle, or random rows are wanted in a type with scales.
    """
    if control.kind == "shuffled":
        num_rows = len(next(iter(rows.layers.values())))
        sources = single_cycle(num_rows, control.seed)
        return replace(
            rows,
            layers={layer: elements[sources] for layer, elements in rows.layers.items()},
            scales={layer: scales[sources] for layer, scales in rows.scales.items()},
        )
    if rows.row_dtype not in ("bfloat16", "float16"):
        raise ConfigError(
            "--control random",
            "cannot be made from stored rows of this type",
            got=rows.row_dtype,
            expected="bfloat16 or float16",
            remedy="Build it from the data: its rows are drawn before they are stored.",
        )
    drawn = {
        layer: _random_rows(elements, np.random.default_rng([control.seed, layer]))
        for layer, elements in rows.layers.items()
    }
    return replace(rows, layers=drawn)


def single_cycle(num_rows: int, seed: int) -> np.ndarray:
    """A random permutation (int64 ``[N]``) of one cycle: no row stays where it was.

    Raises:
        ConfigError: there are fewer than two rows.
    """
    if num_rows < 2:
        raise ConfigError("--control", "cannot shuffle a bank of one row", expected="at least 2 rows")
    around = np.random.default_rng(seed).permutation(num_rows)
    sources = np.empty(num_rows, dtype=np.int64)
    sources[around] = np.roll(around, 1)
    return sources


def _random_rows(rows_ND: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    real = rows_ND.astype(np.float32) if rows_ND.dtype == np.float16 else float32_from_bf16(rows_ND)
    mean, deviation = real.mean(axis=0, dtype=np.float64), real.std(axis=0, dtype=np.float64)
    norms = np.linalg.norm(real, axis=1, keepdims=True)
    noise = generator.standard_normal(real.shape, dtype=np.float32)
    # Scaling the rows moves the moments a little and the other way round, so the two take turns.
    for _ in range(_MATCHING_ROUNDS):
        spread = np.maximum(noise.std(axis=0, dtype=np.float64), np.finfo(np.float32).tiny)
        scale = deviation / spread
        offset = mean - noise.mean(axis=0, dtype=np.float64) * scale
        noise = noise * scale.astype(np.float32) + offset.astype(np.float32)
        lengths = np.linalg.norm(noise, axis=1, keepdims=True)
        noise *= np.divide(norms, lengths, out=np.zeros_like(norms), where=lengths > 0)
    return noise.astype(np.float16) if rows_ND.dtype == np.float16 else bf16_from_float32(noise)
