"""``loss.png``: the training loss of the compared runs, and their held-out loss by length of match."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_graft.reporting.figures import LOSS, MISS
from megatron_graft.reporting.run_files import HELD_OUT, Run

# Okabe and Ito's colours, told apart by most colour-blind readers. The first is the reported run's.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_GREY = "#5f6368"
_ALL = "all tokens"
_STEEP_PART = 20  # a twentieth of the steps
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 11, "axes.titlesize": 12, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.grid.axis": "y", "grid.color": "#e6e6e6", "axes.axisbelow": True, "axes.edgecolor": "#9aa0a6",
    "legend.frameon": False, "legend.fontsize": 10, "figure.dpi": 130,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Series:
    """Held-out losses of one arm: over all tokens, and by match where that is known."""

    label: str
    colour: str
    filled: bool
    losses: dict[str, float]


def plot_png(run: Run, others: Sequence[Run]) -> bytes:
    """The plot of a run beside other arms, as the bytes of a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(11.5, 4.4), width_ratios=(1, 1.15), layout="constrained")
        _training_panel(left, [run, *others])
        _held_out_panel(right, run, others)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", metadata={"Software": None})  # one file for one matplotlib
        pyplot.close(figure)
    return stream.getvalue()


def _training_panel(axes: Any, runs: Sequence[Run]) -> None:
    lows, highs = [], []
    for run, colour in zip(runs, _colours(runs), strict=True):
        points = [(record["iteration"], record[LOSS]) for record in run.metrics if LOSS in record]
        steps, losses = np.array(points).T
        if run is runs[0]:
            axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(losses), color=colour, linewidth=1.8, label=_label(run))
        lows.append(np.nanmin(losses))
        highs.append(np.nanmax(losses[losses.size // _STEEP_PART :]))
    # The steep first steps, alike in all arms, would flatten the rest.
    axes.set_ylim(min(lows) - 0.1, max(highs) + 0.1)
    axes.set(title="Training", xlabel="step", ylabel="loss (nats per token)")
    axes.locator_params(axis="x", integer=True)
    axes.margins(x=0.01)
    axes.legend(loc="upper right")


def _smooth(losses: np.ndarray) -> np.ndarray:
    """Mean of each step and those before it, over a fortieth of the run, fewer at its start."""
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    ends = np.arange(1, losses.size + 1)
    starts = ends - np.clip(ends // 8, 1, max(1, losses.size // 40))
    smoothed: np.ndarray = (sums[ends] - sums[starts]) / (ends - starts)
    return smoothed


def _held_out_panel(axes: Any, run: Run, others: Sequence[Run]) -> None:
    series = _series(run, others)
    shares = _shares(run)
    places = [_ALL, *shares]
    for number, one in enumerate(series):
        offset = 0.12 * (number - (len(series) - 1) / 2)
        known = [place for place in places if place in one.losses]
        xs = [places.index(place) + offset for place in known]
        axes.plot(xs[1:], [one.losses[place] for place in known[1:]], color=one.colour, alpha=0.35, linewidth=1)
        axes.plot(
            xs, [one.losses[place] for place in known], "o", markersize=7, label=one.label, color=one.colour,
            markerfacecolor=one.colour if one.filled else "white", markeredgewidth=1.6,
        )  # fmt: skip
    bigram = run.evaluation["bigram_loss"].get(HELD_OUT)
    if bigram is not None:
        axes.plot([-0.4, 0.4], [bigram] * 2, color=_GREY, linestyle=(0, (4, 2)), linewidth=1.4, label="bigram counts")
    ticks = [f"{place}\n{shares[place]:.0%}" if place in shares else f"{place}\n " for place in places]
    axes.set_xticks(range(len(places)), ticks)
    axes.set(title="Held-out, by longest match", ylabel="loss (nats per token)")
    axes.set_xlabel("tokens in the longest match, and share of positions" if shares else "")
    axes.margins(x=0.06, y=0.08)
    axes.legend()


def _series(run: Run, others: Sequence[Run]) -> list[_Series]:
    series = []
    for arm, colour in zip([run, *others], _colours([run, *others]), strict=True):
        measured = arm.evaluation["data"][HELD_OUT]
        series.append(_Series(label=_label(arm), colour=colour, filled=True, losses=_losses(measured)))
        if arm is run and "memory_off" in measured:
            off = _losses(measured["memory_off"])
            series.append(_Series(label=f"{run.name}, memory off", colour=colour, filled=False, losses=off))
    return series


def _losses(measured: dict[str, Any]) -> dict[str, float]:
    by_order = {order: part["loss"] for order, part in measured["by_order"].items()}
    return {_ALL: measured["loss"]} | (by_order if set(by_order) != {MISS} else {})


def _shares(run: Run) -> dict[str, float]:
    """Share of the positions by match, where the run looked anything up."""
    measured = run.evaluation["data"][HELD_OUT]
    parts = measured["by_order"]
    if set(parts) == {MISS}:
        return {}
    return {order: part["tokens"] / measured["tokens"] for order, part in parts.items()}


def _colours(runs: Sequence[Run]) -> list[str]:
    """One colour a run; the stock model's is grey."""
    coloured = iter(COLOURS * len(runs))
    return [_GREY if run.bank is None and run is not runs[0] else next(coloured) for run in runs]


def _label(run: Run) -> str:
    return f"{run.name} ({run.arm})" if run.arm not in run.name else run.name
