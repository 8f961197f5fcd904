"""How far the formulas of ``cost`` are from a build that was run: predicted and measured, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_graft.building.cost import BuildShape, Fleet, Rates, build_cost
from megatron_graft.building.log_summary import StageSummary
from megatron_graft.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One figure of a build."""

    name: str
    predicted: float
    measured: float

    @property
    def ratio(self) -> float | None:
        """Predicted over measured; None if nothing was measured."""
        return self.predicted / self.measured if self.measured else None

    def to_json(self) -> dict[str, Any]:
        """The JSON object of this figure."""
        return {"name": self.name, "predicted": self.predicted, "measured": self.measured, "ratio": self.ratio}


def compare_with_log(stages: Mapping[str, StageSummary], shape: BuildShape, rates: Rates) -> list[Comparison]:
    """Compare a finished build with what the formulas say of it.

    Args:
        stages: what its log says (see :func:`~megatron_graft.building.log_summary.summarise_stages`).
        shape: what was built; tokens, rows and orders are taken from the log.
        rates: assumed for this machine.

    Raises:
        DataError: the log is not one of a whole build.
    """
    built = shape_of_log(stages, shape)
    packed = stages["pack"].facts
    cost = build_cost(built, rates, Fleet(), donor_params=1.0)
    figures = [Comparison(name="donor tokens a row", predicted=built.donor_tokens_per_row,
                          measured=packed["donor_tokens"] / packed["rows"])]  # fmt: skip
    for stage in cost.stages:
        if stage.name in stages:
            figures += _figures(stage.name, stage.bytes_written, stage.core_seconds, stages[stage.name], rates)
    counted = [(stage, stages[stage.name]) for stage in cost.stages if stage.name.startswith("count-")]
    figures += [
        Comparison(
            name="counting: bytes written",
            predicted=sum(stage.bytes_written for stage, _ in counted),
            measured=sum(measured.facts.get("bytes_written", 0.0) for _, measured in counted),
        ),
        Comparison(
            name="counting: core-seconds",
            predicted=sum(stage.core_seconds for stage, _ in counted),
            measured=sum(measured.cpu_seconds for _, measured in counted),
        ),
    ]
    return figures


def shape_of_log(stages: Mapping[str, StageSummary], shape: BuildShape) -> BuildShape:
    """``shape`` with the tokens, rows and orders of a build's log.

    Raises:
        DataError: the log lacks a stage.
    """
    longest = max((int(name.split("-")[1]) for name in stages if name.startswith("count-")), default=0)
    needed = [f"count-{order}-{part}" for order in range(2, longest + 1) for part in ("map", "reduce")]
    missing = [name for name in (*needed, "count-2-map", "pack", "encode") if name not in stages]
    if missing:
        raise DataError("--check", "is no log of a whole build", got=f"no stage {missing[0]}")
    return replace(
        shape,
        tokens=stages["count-2-map"].facts["tokens"],
        slice_tokens=stages["count-2-map"].facts["tokens"] / stages["count-2-map"].tasks,
        rows=int(stages["pack"].facts["rows"]),
        orders=tuple(range(min(shape.orders[0], longest), longest + 1)),
    )


def _figures(
    name: str, predicted_bytes: float, predicted_seconds: float, measured: StageSummary, rates: Rates
) -> Iterator[Comparison]:
    if predicted_bytes and "bytes_written" in measured.facts:
        yield Comparison(
            name=f"{name}: bytes written", predicted=predicted_bytes, measured=measured.facts["bytes_written"]
        )
    if name != "encode" or rates.donor_tokens:
        yield Comparison(name=f"{name}: core-seconds", predicted=predicted_seconds, measured=measured.cpu_seconds)
