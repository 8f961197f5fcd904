"""The plots of a comparison. All show differences to the baseline: below zero, the arm is better than it."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_graft.experiments.comparison import Summary
from megatron_graft.experiments.comparison_details import arms_of, parts_of, sweeps_of
from megatron_graft.experiments.comparison_numbers import level
from megatron_graft.experiments.experiment import CORE
from megatron_graft.experiments.match_losses import MISS
from megatron_graft.reporting.plot import COLOURS, STYLE

_GREY = "#5f6368"
NAMES = ("differences", "by_order", "tokens", "sweeps", "coverage")
_PANELS_A_LINE = 3
_TITLE_WIDTH = 32  # characters of a panel's title
_MANY_TICKS = 5  # longer axes have their words set aslant
_ALL = "all"


def plots_of(summary: Summary) -> dict[str, bytes]:
    """Every plot that there are figures for, by name, as the bytes of a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds: list[Callable[[Summary, Any], Any]] = [_differences, _by_order, _tokens, _sweeps, _coverage]
    plots = {}
    with pyplot.rc_context(STYLE):
        for name, draw in zip(NAMES, kinds, strict=True):
            figure = draw(summary, pyplot)
            if figure is not None:
                stream = io.BytesIO()
                figure.savefig(stream, format="png", metadata={"Software": None})  # one file for one matplotlib
                pyplot.close(figure)
                plots[name] = stream.getvalue()
    return plots


def _differences(summary: Summary, pyplot: Any) -> Any:
    """Each arm's difference with its interval over documents, and every seed's."""
    baseline = summary["references"][0]
    found = _minus_baseline(summary, arms_of(summary, CORE))
    if not found:
        return None
    figure, axes = pyplot.subplots(figsize=(9, 1.3 + 0.5 * len(found)), layout="constrained")
    colours = _colours(summary)
    for place, (name, one) in enumerate(found.items()):
        if one["documents"]:
            bounds = [one["documents"]["low"], one["documents"]["high"]]
            axes.plot(bounds, [place, place], color=colours[name], linewidth=6, alpha=0.35, solid_capstyle="butt")
        seeds = list(one["by_seed"].values())
        axes.plot(seeds, [place] * len(seeds), "|", color=colours[name], markersize=11, markeredgewidth=1.4)
        axes.plot([one["mean"]], [place], "o", color=colours[name], markersize=7)
    axes.axvline(0, color=_GREY, linewidth=1)
    axes.set_yticks(range(len(found)), [f"{summary['arms'][name]['label']} ({name})" for name in found])
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.grid(axis="x", color="#e6e6e6")
    axes.grid(axis="y", visible=False)
    axes.set(title=f"Loss on {summary['primary']} minus that of {baseline}")
    axes.set_xlabel(f"nats per token (point: mean, strokes: seeds, bar: {level(summary['level'])} over documents)")
    return figure


def _by_order(summary: Summary, pyplot: Any) -> Any:
    """Each arm's difference by length of match."""
    primary, baseline = summary["primary"], summary["references"][0]
    arms = {name: arm for name, arm in arms_of(summary, CORE).items() if name != baseline}
    parts = parts_of(arms.values(), primary)
    found = {
        name: by_order
        for name, arm in arms.items()
        if (by_order := arm["texts"].get(primary, {}).get("by_order"))
        and all(baseline in part["minus"] for part in by_order.values())
    }
    if not found:
        return None
    figure, axes = pyplot.subplots(figsize=(10, 4.6), layout="constrained")
    colours = _colours(summary)
    for number, (name, by_order) in enumerate(found.items()):
        offset = 0.11 * (number - (len(found) - 1) / 2)
        known = [part for part in parts if part in by_order]
        xs = [parts.index(part) + 1 + offset for part in known]
        minus = [by_order[part]["minus"][baseline] for part in known]
        axes.plot(xs, _numbers([one["mean"] for one in minus]), color=colours[name], alpha=0.3, linewidth=1)
        _points(axes, xs, [one["mean"] for one in minus], [one["sd"] for one in minus], colours[name], name)
        whole = arms[name]["texts"][primary]["minus"].get(baseline)
        if whole:
            _points(axes, [offset], [whole["mean"]], [whole["sd"]], colours[name], None)
    axes.axhline(0, color=_GREY, linewidth=1)
    shares = {part: one["share"] for part, one in next(iter(found.values())).items()}
    words = [part if part == MISS else f"order {part}" for part in parts]
    ticks = [f"{_ALL}\n ", *(f"{word}\n{shares.get(part, 0):.0%}" for word, part in zip(words, parts, strict=True))]
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set(
        title=f"Loss on {primary} minus that of {baseline}, by longest match", ylabel="nats per token (± SD over seeds)"
    )
    axes.set_xlabel("tokens in the longest match, and share of positions")
    axes.legend(ncols=2)
    return figure


def _tokens(summary: Summary, pyplot: Any) -> Any:
    """Each arm's difference in training loss against the tokens seen, with the spread of the seeds."""
    baseline = summary["references"][0]
    arms = {
        name: arm["training"]
        for name, arm in arms_of(summary, CORE).items()
        if arm["training"] and baseline in arm["training"]["minus"]
    }
    if not arms:
        return None
    figure, axes = pyplot.subplots(figsize=(10, 4.6), layout="constrained")
    colours = _colours(summary)
    for name, training in arms.items():
        minus, millions = training["minus"][baseline], [tokens / 1e6 for tokens in training["tokens"]]
        axes.plot(millions, _numbers(minus["curve"]), color=colours[name], linewidth=1.7, label=name)
        if minus["sd"]:
            mean, sd = _numbers(minus["curve"]), _numbers(minus["sd"])
            axes.fill_between(millions, mean - sd, mean + sd, color=colours[name], alpha=0.15, linewidth=0)
    axes.axhline(0, color=_GREY, linewidth=1)
    axes.set(title=f"Training loss minus that of {baseline}, same batches", xlabel="million tokens seen")
    axes.set_ylabel("nats per token (band: ± SD over seeds)")
    axes.margins(x=0.01)
    axes.legend(ncols=2)
    return figure


def _sweeps(summary: Summary, pyplot: Any) -> Any:
    """A panel for each sweep: the difference against the value."""
    panels = {sweep: minus_stand_in(summary, arms) for sweep, arms in sweeps_of(summary).items()}
    panels = {sweep: found for sweep, found in panels.items() if found}
    if not panels:
        return None
    columns = min(_PANELS_A_LINE, len(panels))
    lines = math.ceil(len(panels) / columns)
    size = (max(5.5, 3.9 * columns), 3.4 * lines)
    figure, grid = pyplot.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False, sharey=True)
    for axes, (sweep, found) in zip(grid.flat, panels.items(), strict=False):
        means, bars = _means_and_bars(found.values())
        axes.plot(range(len(found)), means, color=COLOURS[0], alpha=0.4, linewidth=1)
        axes.errorbar(range(len(found)), means, yerr=bars, fmt="o", color=COLOURS[0], markersize=6, elinewidth=1.4)
        _reference_line(axes, summary, found)
        words = [summary["arms"][name]["sweeps"][sweep] for name in found]
        aslant = {"rotation": 30, "ha": "right"} if max(map(len, words)) * len(words) > _MANY_TICKS * 6 else {}
        axes.set_xticks(range(len(words)), words, **aslant)
        axes.set_title(textwrap.fill(sweep, _TITLE_WIDTH))
        axes.margins(x=0.12)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    figure.supylabel(
        f"{summary['primary']} loss minus that of {summary['references'][0]} of as many steps, nats per token",
        fontsize=11,
    )
    return figure


def _coverage(summary: Summary, pyplot: Any) -> Any:
    """Of sweeps whose banks differ in size: size, and share of matching positions, against the difference."""
    primary, baseline = summary["primary"], summary["references"][0]
    sweeps = {}
    for sweep, arms in sweeps_of(summary).items():
        known = {name: arm for name, arm in arms.items() if arm["bank"] and (arm["hit_rate"] or {}).get(primary)}
        found = _minus_baseline(summary, known)
        if len({summary["arms"][name]["bank"]["rows"] for name in found}) > 1:
            sweeps[sweep] = dict(sorted(found.items(), key=lambda one: summary["arms"][one[0]]["bank"]["rows"]))
    if not sweeps:
        return None
    import matplotlib

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained", sharey=True)
    for number, (sweep, found) in enumerate(sweeps.items()):
        colour = COLOURS[number % len(COLOURS)]
        means, bars = _means_and_bars(found.values())
        points = [summary["arms"][name] for name in found]
        for axes, xs in (
            (left, [arm["bank"]["rows"] for arm in points]),
            (right, [arm["hit_rate"][primary]["any"] for arm in points]),
        ):
            axes.plot(xs, means, color=colour, alpha=0.4, linewidth=1)
            axes.errorbar(xs, means, yerr=bars, fmt="o", color=colour, markersize=6, elinewidth=1.4, label=sweep)
    for axes in (left, right):
        _reference_line(axes, summary, {name: one for found in sweeps.values() for name, one in found.items()})
    left.set_xscale("log")
    left.set(title="Size of the bank", xlabel="rows", ylabel=f"{primary} loss minus that of {baseline}, nats")
    right.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
    right.set(title="Coverage", xlabel=f"share of positions of {primary} that match")
    right.legend()
    return figure


def _minus_baseline(summary: Summary, arms: Mapping[str, Any]) -> dict[str, Any]:
    """Differences of arms to the baseline on the primary text, of those that have one that is finite."""
    baseline = summary["references"][0]
    found = {
        name: arm["texts"].get(summary["primary"], {}).get("minus", {}).get(baseline) for name, arm in arms.items()
    }
    return {name: one for name, one in found.items() if one and one["mean"] is not None}


def minus_stand_in(summary: Summary, arms: Mapping[str, Any]) -> dict[str, Any]:
    """Differences of a sweep's arms to the baseline, nats per token, with the arm that stands in for it at zero."""
    baseline, found = summary["references"][0], _minus_baseline(summary, arms)
    stand_ins = {arms[name]["against"].get(baseline, baseline) for name in found}
    zero: dict[str, Any] = {"mean": 0.0, "documents": None, "by_seed": {}}
    return {name: found.get(name, zero) for name in arms if name in found or name in stand_ins}


def _means_and_bars(found: Any) -> tuple[list[float], list[list[float]]]:
    """Means, and how far their intervals over documents reach below and above them."""
    ones = list(found)
    means = [one["mean"] for one in ones]
    bounds = [one["documents"] or {"low": one["mean"], "high": one["mean"]} for one in ones]
    below = [max(0.0, mean - bound["low"]) for mean, bound in zip(means, bounds, strict=True)]
    above = [max(0.0, bound["high"] - mean) for mean, bound in zip(means, bounds, strict=True)]
    return means, [below, above]


def _reference_line(axes: Any, summary: Summary, points: Mapping[str, Mapping[str, Any]]) -> None:
    """The rival's difference on the seeds of some arms, if it has been run, as a dashed line; the baseline is 0."""
    axes.axhline(0, color=_GREY, linewidth=1)
    arms, seeds = summary["arms"], {seed for point in points.values() for seed in point["by_seed"]}
    for rival in summary["references"][1:]:
        compared = [arms[name] for name, point in points.items() if point["by_seed"]]
        standing_in = {arm["against"].get(rival, rival) for arm in compared} & arms.keys()
        found = _minus_baseline(summary, {name: arms[name] for name in standing_in})
        same = [value for one in found.values() for seed, value in one["by_seed"].items() if seed in seeds]
        if same:
            height = float(np.mean(same))
            axes.axhline(height, color=_GREY, linewidth=1.2, linestyle=(0, (4, 2)))
            axes.annotate(
                rival, (1.0, height), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                fontsize=9, color=_GREY,
            )  # fmt: skip


def _points(
    axes: Any,
    xs: Sequence[float],
    means: Sequence[float | None],
    sds: Sequence[float | None],
    colour: str,
    label: str | None,
) -> None:
    bars = [sd or 0.0 for sd in sds]
    axes.errorbar(xs, _numbers(means), yerr=bars, fmt="o", color=colour, markersize=6, elinewidth=1.2, label=label)


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    """Figures of a summary, where None stands for what is not finite, as float64."""
    return np.array(values, dtype=np.float64)


def _colours(summary: Summary) -> dict[str, str]:
    """One colour for each arm of the core but the baseline, the same in all plots."""
    names = [name for name in arms_of(summary, CORE) if name != summary["references"][0]]
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
