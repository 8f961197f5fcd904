"""The figures that are promised, taken from a run's JSON and set beside what was promised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Results = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Target:
    """One promise.

    Attributes:
        name: what is promised.
        limit: the figure to reach, or not to pass.
        figure: finds the figure in a run's results; KeyError if the run did not measure it.
        unit: what the figure is counted in.
        at_most: whether lower is better.
    """

    name: str
    limit: float
    figure: Callable[[Results], float]
    unit: str
    at_most: bool = False


def _worst(*path: str, of: tuple[str, ...] = ("text", "adversarial"), suffix: str) -> Callable[[Results], float]:
    """The lower figure of the two workloads."""

    def find(results: Results) -> float:
        place = results
        for name in path:
            place = place[name]
        return float(min(place[f"{workload}_{suffix}"] for workload in of))

    return find


def _ungrouped_ratio(results: Results) -> float:
    bodies = results["lookup"]["bodies"]
    names = ("text_mpos_per_s", "adversarial_mpos_per_s")
    return float(min(bodies["auto"][name] / bodies["ungrouped"][name] for name in names))


def _best_table_ratio(results: Results) -> float:
    """Against the fastest table on either workload."""
    tables = results["lookup"]["tables"].values()
    return float(min(table[f"{workload}_ratio"] for table in tables for workload in ("text", "adversarial")))


def _small_page_ratio(results: Results) -> float:
    pages = results["lookup"]["pages"]
    names = ("text_mpos_per_s", "adversarial_mpos_per_s")
    return float(min(pages[kind][name] / pages["huge"][name] for name in names for kind in ("small", "file")))


def _all_mismatches(results: Results) -> float:
    """Sum of the mismatches that every part of a run counted. KeyError if none compared any answers."""
    found = [value for key, value in _leaves(results) if key == "mismatches"]
    if not found:
        raise KeyError("mismatches")
    return float(sum(found))


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, name)
    else:
        yield name, value


def _gather_share(threads: int) -> Callable[[Results], float]:
    def find(results: Results) -> float:
        return float(results["gather"]["threads"][str(threads)]["gathers"]["2048 uniform"]["share_of_copy_limit"])

    return find


TARGETS = (
    Target(
        name="lookup: share of the random-line limit",
        limit=0.55,
        figure=_worst("lookup", "pages", "huge", suffix="share_of_limit"),
        unit="",
    ),
    Target(name="lookup: against the same walk without grouping", limit=3.5, figure=_ungrouped_ratio, unit="x"),
    Target(name="lookup: against the best general hash table", limit=4.0, figure=_best_table_ratio, unit="x"),
    Target(
        name="lookup: against torch.searchsorted, 1 M entries",
        limit=10.0,
        figure=_worst("python", "searchsorted", suffix="ratio"),
        unit="x",
    ),
    Target(
        name="lookup: against a Python dict, 1 M entries",
        limit=40.0,
        figure=_worst("python", "dict", suffix="ratio"),
        unit="x",
    ),
    Target(
        name="lookup: two threads against one",
        limit=1.8,
        figure=_worst("lookup", "threads", suffix="speedup"),
        unit="x",
    ),
    Target(name="lookup: 4 KiB pages against huge pages", limit=0.4, figure=_small_page_ratio, unit="x"),
    Target(
        name="index: bytes per entry, vocabulary 2^17",
        limit=13.0,
        figure=lambda results: results["lookup"]["build"]["bytes_per_entry"],
        unit="bytes",
        at_most=True,
    ),
    Target(
        name="open of the whole bank, from disk",
        limit=50.0,
        figure=lambda results: results["open"]["from_disk_ms"],
        unit="ms",
        at_most=True,
    ),
    Target(
        name="gather of 2 KiB rows: share of the copy limit, one thread",
        limit=0.70,
        figure=_gather_share(1),
        unit="",
    ),
    Target(
        name="gather of 2 KiB rows: share of the copy limit, two threads",
        limit=0.80,
        figure=_gather_share(2),
        unit="",
    ),
    Target(
        name="gather of 2 KiB rows: against torch.index_select(out=)",
        limit=1.3,
        figure=lambda results: min(results["python_gather"][f"threads_{count}"]["ratio"] for count in (1, 2)),
        unit="x",
    ),
    Target(name="answers that differ between designs", limit=0.0, figure=_all_mismatches, unit="", at_most=True),
)


ANSWERS = TARGETS[-1]  # the one promise that holds at any size


BUILD_TARGETS = (
    Target(
        name="count, orders 2 to 5 of real text: M tokens a second and core",
        limit=3.0,
        figure=lambda results: results["count"]["ours"]["mtok_per_cpu_s"],
        unit="",
    ),
    Target(
        name="count: against KenLM's lmplz, processor seconds",
        limit=4.0,
        figure=lambda results: results["count"]["ratio"],
        unit="x",
    ),
    Target(
        name="count: peak memory over the bound, corpus five times as large",
        limit=1.0,
        figure=lambda results: results["memory"]["peak_mib"] / results["memory"]["memory_mib"],
        unit="",
        at_most=True,
    ),
    Target(
        name="encode: donor tokens a row",
        limit=1.3,
        figure=lambda results: results["encode"]["tokens_per_row"]["packs"],
        unit="",
        at_most=True,
    ),
    Target(
        name="encode: rows a second against batches of whole texts",
        limit=2.0,
        figure=lambda results: results["encode"]["speed_up"],
        unit="x",
    ),
    Target(
        name="encode: largest difference of a row, over its norm",
        limit=1e-5,
        figure=lambda results: max(layer["largest"] for layer in results["encode"]["difference"].values()),
        unit="",
        at_most=True,
    ),
)
"""What is promised of building."""


def judge(results: Results, targets: Iterable[Target]) -> list[Results]:
    """Every target with its figure (None if it was not measured) and the verdict."""
    judged = []
    for target in targets:
        try:
            figure: float | None = target.figure(results)
        except KeyError:
            figure = None
        met = figure is not None and (figure <= target.limit if target.at_most else figure >= target.limit)
        judged.append(
            {
                "name": target.name,
                "figure": figure,
                "limit": target.limit,
                "unit": target.unit,
                "at_most": target.at_most,
                "met": None if figure is None else met,
            }
        )
    return judged
