"""Differences of two arms in full: their mean, both intervals, each seed's, and their standard deviation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_graft.experiments import comparison_numbers as shown
from megatron_graft.reporting.page import markdown_table

type Difference = Mapping[str, Any] | None


def seeds_of(differences: Iterable[Difference]) -> list[str]:
    """Every seed that one of them has, in order."""
    return list(dict.fromkeys(seed for one in differences if one for seed in one["by_seed"]))


def heads(seeds: Sequence[str]) -> list[str]:
    """Of the columns that :func:`cells` fills."""
    return ["mean", "over documents", "over seeds", *(f"seed {seed}" for seed in seeds), "SD"]


def cells(one: Difference, seeds: Sequence[str]) -> list[str]:
    """One difference as a part of a table's line."""
    found: Mapping[str, Any] = one or {}
    return [
        shown.signed(found.get("mean")), *(shown.interval(found.get(kind)) for kind in ("documents", "over_seeds")),
        *(shown.signed(found.get("by_seed", {}).get(seed)) for seed in seeds), shown.loss(found.get("sd")),
    ]  # fmt: skip


def table(differences: Mapping[tuple[str, str], Difference]) -> str:
    """A line for each pair of arms."""
    seeds = seeds_of(differences.values())
    lines = [[f"`{first}` − `{second}`", *cells(one, seeds)] for (first, second), one in differences.items()]
    return markdown_table(["A − B", *heads(seeds)], lines)
