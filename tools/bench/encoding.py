"""How fast a donor runs packs, beside the same texts run whole: one sequence a text, equal lengths together.

Both ways run the same texts on the same loaded model, with the same threads, in turn: what the machine does
meanwhile hits both.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_graft.building.donor import DonorDtype, HuggingFaceDonor, in_threads
from megatron_graft.building.donor_model import DonorModel
from megatron_graft.building.packs import DEFAULT_PACK_TOKENS, Packs, flat_token_lists, plan_packs

BATCH_TOKENS = 1024
"""Most tokens of one pass of whole texts."""

FLOAT64_BATCHES = 4
"""Batches of whole texts that run in float64 too."""


def measure_encoding(
    donor_directory: Path,
    texts: Sequence[str],
    layers: Sequence[int],
    *,
    pack_tokens: int = DEFAULT_PACK_TOKENS,
    sample_packs: int = 16,
    rounds: int = 3,
    threads: int = 1,
    dtype: DonorDtype = "float32",
) -> dict[str, Any]:
    """Pack all of ``texts``; run evenly spread packs, and their texts whole, ``rounds`` times in turn.

    Args:
        donor_directory: a Hugging Face directory.
        texts: of a bank's keys, in any order.
        layers: ascending.
        pack_tokens: most donor tokens of a pack.
        sample_packs: packs to run.
        rounds: times that each way runs; medians are reported.
        threads: passes at a time, one CPU thread each.
        dtype: of the donor.

    Returns:
        plain JSON values: donor tokens a row of all packs and of whole texts, rows a second both ways, the median
        of the rounds' ratios, and by layer the differences between a row's two states as shares of its norm, and
        those of both from float64.
    """
    donor = HuggingFaceDonor(donor_directory, dtype=dtype, pack_tokens=pack_tokens, threads=threads, device="cpu")
    ids, lengths = flat_token_lists(donor.token_lists(texts))
    packs = plan_packs(ids, lengths, pack_tokens)
    chosen = np.unique(np.linspace(0, len(packs) - 1, min(sample_packs, len(packs))).astype(np.int64))
    places = np.concatenate([packs.taken_in(pack, pack + 1) for pack in chosen])
    batches = _equal_lengths(packs, places)
    model = donor.model(layers)
    _run_packs(model, packs, chosen[:1], threads), _run_whole(model, batches[:1], threads, len(places))  # warm up
    seconds: dict[str, list[float]] = {"packs": [], "whole": []}
    for _ in range(rounds):
        started = time.perf_counter()
        packed = _run_packs(model, packs, chosen, threads)
        middle = time.perf_counter()
        whole = _run_whole(model, batches, threads, len(places))
        seconds["packs"].append(middle - started)
        seconds["whole"].append(time.perf_counter() - middle)
    rows = int(np.isin(packs.node_of_row, places).sum())
    return {
        "donor": donor.name,
        "layers": list(layers),
        "dtype": dtype,
        "threads": threads,
        "pack_tokens": pack_tokens,
        "rows": packs.num_rows,
        "sampled_rows": rows,
        "tokens_per_row": {
            "packs": round(len(packs.tokens) / packs.num_rows, 4),
            "whole": round(float(lengths.mean()), 4),
        },
        "rows_per_second": {way: round(rows / statistics.median(taken), 1) for way, taken in seconds.items()},
        "speed_up": round(statistics.median(b / a for a, b in zip(*seconds.values(), strict=True)), 2),
        "difference": {str(layer): _differences(packed[layer], whole[layer]) for layer in layers},
        "from_float64": _from_float64(donor, layers, batches, {"packs": packed, "whole": whole}),
    }


def _from_float64(
    donor: HuggingFaceDonor,
    layers: Sequence[int],
    batches: Sequence[tuple[np.ndarray, np.ndarray]],
    found: dict[str, dict[int, np.ndarray]],
) -> dict[str, Any]:
    """How far both ways are from the same texts in float64, for some of the texts: layer -> way -> differences."""
    exact = DonorModel(
        donor.directory, dtype="float64", device="cpu", num_layers=donor.num_layers, layers=layers
    )  # fmt: skip
    some = batches[:: max(1, len(batches) // FLOAT64_BATCHES)]
    numbers = np.concatenate([batch_numbers for _, batch_numbers in some])
    num_states = len(next(iter(found["packs"].values())))
    states = _run_whole(exact, some, 1, num_states)
    return {
        str(layer): {way: _differences(ways[layer][numbers], states[layer][numbers]) for way, ways in found.items()}
        for layer in layers
    }


def _equal_lengths(packs: Packs, places: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The places' texts in batches of one length: tokens ``[B, S]`` and numbers in ``places`` ``[B]``."""
    paths: dict[int, list[tuple[int, list[int]]]] = {}
    for number, place in enumerate(places):
        path = packs.token_path(int(place))
        paths.setdefault(len(path), []).append((number, path))
    return [
        (np.array([path for _, path in group]), np.array([number for number, _ in group]))
        for length, alike in sorted(paths.items())
        for group in itertools.batched(alike, max(1, BATCH_TOKENS // length))
    ]


def _run_packs(model: DonorModel, packs: Packs, chosen: Sequence[int], threads: int) -> dict[int, np.ndarray]:
    def run(pack: int) -> dict[int, np.ndarray]:
        nodes = packs.taken_in(pack, pack + 1) - packs.pack_starts[pack]
        (states,) = model.run([packs[pack]], [nodes])
        return states

    found = list(in_threads(run, iter(chosen), threads))
    return {layer: np.concatenate([states[layer] for states in found]) for layer in model.layers}


def _run_whole(
    model: DonorModel, batches: Sequence[tuple[np.ndarray, np.ndarray]], threads: int, num_states: int
) -> dict[int, np.ndarray]:
    def run(batch: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        states = model.run_sequences(batch[0])
        return batch[1], {layer: state[:, -1].float().cpu().numpy() for layer, state in states.items()}

    out: dict[int, np.ndarray] = {}
    for numbers, states in in_threads(run, iter(batches), threads):
        for layer, found in states.items():
            out.setdefault(layer, np.zeros((num_states, found.shape[1]), dtype=np.float32))[numbers] = found
    return out


def _differences(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Norms of the differences of rows over the rows' norms: the largest, the 99th percentile and the median."""
    shares = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    percentiles = {"largest": 100, "p99": 99, "median": 50}
    return {name: float(f"{np.percentile(shares, percent):.3g}") for name, percent in percentiles.items()}
