"""Loss against tokens: what an arm was ahead of the baseline by, in the course of training.

Every token is seen once, so the training loss is the loss on text not seen before. All arms of a seed read the same
batches in the same order; so their difference has little noise where each loss has much.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_graft.experiments.records import RunRecord
from megatron_graft.experiments.statistics import mean_and_sd

SHARES = (25, 50, 75, 100)  # per cent of the tokens at which differences are told
_WINDOW = 20  # a difference at a share of the tokens is the mean over a twentieth of the run that ends there


def curve_of(
    runs: Mapping[int, RunRecord], name: str, baseline_runs: Mapping[int, RunRecord], baseline: str
) -> dict[str, Any] | None:
    """An arm's training losses over the tokens, mean of its seeds, and the differences to the baseline.

    Returns:
        ``tokens`` [bins] at the end of each bin, ``loss`` [bins], and ``minus.<baseline>`` with ``curve``, ``sd`` (over
        seeds) [bins] and ``at.<per cent>``; None if the runs' bins differ or there are none. Differences are taken over
        the seeds that both have, and only where both have the same bins.
    """
    tokens = _tokens(runs)
    if tokens is None:
        return None
    losses, theirs = _losses(runs), _losses(baseline_runs)
    found: dict[str, Any] = {
        "tokens": tokens,
        "loss": np.mean(list(losses.values()), axis=0).tolist(),
        "minus": {},
    }
    seeds = sorted(losses.keys() & theirs.keys())
    if name != baseline and seeds and _tokens(baseline_runs) == tokens:
        differences_SN = np.stack([losses[seed] - theirs[seed] for seed in seeds])
        found["minus"][baseline] = {
            "curve": differences_SN.mean(axis=0).tolist(),
            "sd": differences_SN.std(axis=0, ddof=1).tolist() if len(seeds) > 1 else None,
            "at": {str(share): mean_and_sd(_at(differences_SN, tokens, share)) for share in SHARES},
        }
    return found


def _at(differences_SN: np.ndarray, tokens: list[float], share: int) -> list[float]:
    """Each seed's mean over the last bins up to a share of the tokens."""
    end = max(1, int(np.searchsorted(tokens, share / 100 * tokens[-1] * (1 + 1e-9), side="right")))
    start = max(0, end - max(1, len(tokens) // _WINDOW))
    means: list[float] = differences_SN[:, start:end].mean(axis=1).tolist()
    return means


def _losses(runs: Mapping[int, RunRecord]) -> dict[int, np.ndarray]:
    return {
        seed: np.array((run.data.get("training") or {}).get("loss", []), dtype=np.float64) for seed, run in runs.items()
    }


def _tokens(runs: Mapping[int, RunRecord]) -> list[float] | None:
    """Where the bins end, if they end alike in all runs."""
    ends = [(run.data.get("training") or {}).get("tokens") for run in runs.values()]
    return ends[0] if ends and ends[0] and all(one == ends[0] for one in ends) else None
