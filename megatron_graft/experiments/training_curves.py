"""Loss against tokens: what an arm was ahead of others by, in the course of training.

A batch's loss is taken before the step that learns from it: while no token comes twice, it is the loss on text that
the weights have not seen. A bank's keys were counted on this very text, so more of its positions match than of others'.
All arms of a seed read the same batches in the same order; so their difference has little noise where each loss has
much.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_graft.experiments.records import RunRecord
from megatron_graft.experiments.statistics import mean_and_sd

SHARES = (15, 25, 50, 75, 100)  # per cent of the tokens at which differences are told
_WINDOW = 20  # a difference at a share of the tokens is the mean over a twentieth of the run that ends there


def curve_of(runs: Mapping[int, RunRecord], rivals: Mapping[str, Mapping[int, RunRecord]]) -> dict[str, Any] | None:
    """An arm's training losses over the tokens, mean of its seeds, and the differences to other arms.

    Args:
        runs: the arm's, by seed.
        rivals: by name, the runs of the others.

    Returns:
        ``tokens`` [bins] at the end of each bin, ``loss`` [bins], and ``minus.<name>`` with ``curve``, ``sd`` (over
        seeds) [bins], ``at.<per cent>``, and ``reached``: the share of the tokens after which the arm's loss, averaged
        over a twentieth of the run, is as low as the other's at its end, or None. Differences are taken over the seeds
        that both have, and only where both have the same bins. None if the arm's own bins differ or there are none.
    """
    tokens = _tokens(runs)
    if tokens is None:
        return None
    losses = _losses(runs)
    found: dict[str, Any] = {"tokens": tokens, "loss": np.mean(list(losses.values()), axis=0).tolist(), "minus": {}}
    for name, rival in rivals.items():
        theirs = _losses(rival)
        seeds = sorted(losses.keys() & theirs.keys())
        if seeds and _tokens(rival) == tokens:
            own_SN, their_SN = (np.stack([one[seed] for seed in seeds]) for one in (losses, theirs))
            found["minus"][name] = _difference(own_SN, their_SN, tokens)
    return found


def _difference(own_SN: np.ndarray, their_SN: np.ndarray, tokens: list[float]) -> dict[str, Any]:
    difference_SN = own_SN - their_SN
    return {
        "curve": difference_SN.mean(axis=0).tolist(),
        "sd": difference_SN.std(axis=0, ddof=1).tolist() if len(difference_SN) > 1 else None,
        "at": {str(share): mean_and_sd(_at(difference_SN, tokens, share)) for share in SHARES},
        "reached": _reached(own_SN.mean(axis=0), their_SN.mean(axis=0), tokens),
    }


def _reached(own_N: np.ndarray, their_N: np.ndarray, tokens: list[float]) -> float | None:
    width = max(1, len(tokens) // _WINDOW)
    smooth = np.convolve(own_N, np.full(width, 1 / width), mode="valid")  # of the bins that end at width - 1 and later
    low = np.flatnonzero(smooth <= their_N[-width:].mean())
    return tokens[low[0] + width - 1] / tokens[-1] if low.size else None


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
