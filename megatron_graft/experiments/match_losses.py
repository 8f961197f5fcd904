"""Losses by what the bank had: by order of the longest match, and by how frequent the matched key is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from megatron_graft.experiments.experiment import Experiment
from megatron_graft.experiments.records import Records, RunRecord, number_of
from megatron_graft.experiments.statistics import mean_and_sd

MISS = "miss"
type Cells = dict[str, tuple[int, float]]  # part of the positions -> their tokens and mean loss


def hit_rates_of(runs: Mapping[int, RunRecord], texts: Iterable[str]) -> dict[str, Any] | None:
    """Share of each text's positions that match a key of the arm's bank, in all and by order; None without a bank."""
    first = next(iter(runs.values()))
    if not first.data.get("bank"):
        return None
    rates = {}
    for name in texts:
        if name not in first.texts:
            continue
        parts = first.texts[name].summary["by_order"]
        tokens = sum(part["tokens"] for part in parts.values())
        shares = {order: part["tokens"] / tokens for order, part in parts.items() if order != MISS}
        rates[name] = {"any": sum(shares.values())} | shares
    return rates


def by_order_of(records: Records, arm: str, text: str, rivals: Mapping[str, str]) -> dict[str, Any]:
    """Loss of an arm by order of the match, and its differences to other arms where these were split by the same keys.

    ``rivals`` maps the name that a difference is shown under to the arm. Empty if the arm's losses were not split.
    """
    own = _by_seed(records, arm, text, _orders)
    parts = _alike(own)
    if set(parts) <= {MISS}:
        return {}
    total = sum(parts.values())
    minus = {
        name: _minus(own, _by_seed(records, other, text, _orders)) for name, other in rivals.items() if other != arm
    }
    return {
        part: {
            "tokens": tokens,
            "share": tokens / total,
            "loss": mean_and_sd([cells[part][1] for cells in own.values()]),
            "minus": {other: found[part] for other, found in minus.items() if part in found},
        }
        for part, tokens in parts.items()
    }


def contributions_of(records: Records, first: str, second: str, text: str) -> dict[str, Any]:
    """What each part of the positions adds to the difference of two arms on a text: its share times its difference.

    ``mean`` and ``sd`` (over seeds) by part; together they are the text's difference. Empty where the arms' losses were
    not split by the same keys.
    """
    own = _by_seed(records, first, text, _orders)
    parts = _alike(own)
    shares = {part: tokens / sum(parts.values()) for part, tokens in parts.items()}
    return {
        part: {"mean": shares[part] * found["mean"], "sd": found["sd"] and shares[part] * found["sd"]}
        for part, found in _minus(own, _by_seed(records, second, text, _orders)).items()
    }


def grids_of(experiment: Experiment, records: Records) -> dict[str, Any]:
    """Differences by order x count of the key: each arm with a real bank that a hypothesis favours, minus its rivals.

    ``grids.<arm>.<rival>.<order>.<counts>`` has ``tokens``, ``mean`` and ``sd`` (over seeds). The baseline is among the
    rivals.
    """
    grids: dict[str, Any] = {}
    pairs = [(one.better, one.worse) for one in experiment.hypotheses]
    for arm in dict.fromkeys(better for better, _ in pairs):
        if not _has_real_bank(records, arm):
            continue
        own = _by_seed(records, arm, experiment.primary, _buckets)
        for rival in dict.fromkeys([experiment.baseline, *(worse for better, worse in pairs if better == arm)]):
            cells = _minus(own, _by_seed(records, rival, experiment.primary, _buckets))
            for part, found in cells.items():
                order, counts = part.split("/")
                grid = grids.setdefault(arm, {}).setdefault(rival, {})
                grid.setdefault(order, {})[counts] = {"tokens": _alike(own)[part]} | found
    return grids


def _minus(own: Mapping[int, Cells], other: Mapping[int, Cells]) -> dict[str, Any]:
    """Mean and deviation over the common seeds of every part's difference; empty if the parts are not the same."""
    seeds = sorted(own.keys() & other.keys())
    parts = _alike(own)
    if not seeds or not parts or parts != _alike(other):
        return {}
    return {part: mean_and_sd([own[seed][part][1] - other[seed][part][1] for seed in seeds]) for part in parts}


def _by_seed(records: Records, arm: str, text: str, cells: Any) -> dict[int, Cells]:
    runs = records.runs.get(arm, {})
    return {seed: cells(run.texts[text].summary) for seed, run in runs.items() if text in run.texts}


def _alike(by_seed: Mapping[int, Cells]) -> dict[str, int]:
    """Tokens of every part, if all seeds were split alike; else empty."""
    split = [{part: tokens for part, (tokens, _) in cells.items()} for cells in by_seed.values()]
    return split[0] if split and all(one == split[0] for one in split) else {}


def _orders(summary: Mapping[str, Any]) -> Cells:
    return _filled(summary.get("by_order") or {})


def _buckets(summary: Mapping[str, Any]) -> Cells:
    cells: Cells = {}
    for order, buckets in (summary.get("by_order_and_count") or {}).items():
        if order != MISS:
            cells |= {f"{order}/{counts}": cell for counts, cell in _filled(buckets).items()}
    return cells


def _filled(parts: Mapping[str, Any]) -> Cells:
    return {name: (int(part["tokens"]), number_of(part["loss"])) for name, part in parts.items() if part["tokens"]}


def _has_real_bank(records: Records, arm: str) -> bool:
    runs = records.runs.get(arm)
    bank = next(iter(runs.values())).data.get("bank") if runs else None
    return bank is not None and not bank.get("control")
