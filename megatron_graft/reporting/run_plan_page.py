"""A planned run, as Markdown: what every rank holds and moves, and which resource binds first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_graft.log import format_seconds
from megatron_graft.reporting.page import markdown_table

_UNITS = ("", " k", " M", " G", " T", " P")


def run_plan_page(plan: Mapping[str, Any]) -> str:
    """The tables of a plan.

    Args:
        plan: ``run`` (name of a figure -> its value, as it is to be shown); ``assumed`` (flag, value, meaning);
            ``stages`` (the JSON of every ``StageCost``); ``step_seconds``, ``tokens``, ``sites_share`` (of
            operations), ``backbone_state``; ``demands`` (the JSON of every ``Demand``, with ``share``);
            ``most_rows``.
    """
    parts = [
        markdown_table(["run", ""], [[name, value] for name, value in plan["run"].items()], numbers=False),
        _step(plan),
        _stages(plan["stages"]),
        _collectives(plan["stages"]),
        _demands(plan["demands"]),
        _limit(plan),
        markdown_table(["assumed", "", ""], plan["assumed"], numbers=False),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def amount(value: float, unit: str = "") -> str:
    """``12.3 M`` and the like: three digits and a power of a thousand."""
    size = 0
    while abs(value) >= 999.5 and size < len(_UNITS) - 1:
        value, size = value / 1000, size + 1
    digits = 0 if size == 0 and value == int(value) else 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f}{_UNITS[size]}{'' if size else ' ' if unit else ''}{unit}"


def _step(plan: Mapping[str, Any]) -> str:
    seconds = plan["step_seconds"]
    shown = format_seconds(seconds) if seconds >= 60 else f"{seconds:.3g} s"
    return (
        f"A step of {plan['tokens']:,} tokens takes {shown} if nothing waits; the sites add {plan['sites_share']:.1%} "
        f"to the model's operations. The stock model's parameters, gradients and optimizer state take "
        f"{amount(plan['backbone_state'], 'B')} on its fullest rank."
    )


def _stages(stages: Sequence[Mapping[str, Any]]) -> str:
    if not stages:
        return "The run has no memory."
    heads = [
        "pipeline stage", "layers with a site", "parameters", "of trained rows", "with gradients and optimizer",
        "rows gathered a step", "that is", "to the device a step", "waiting there",
    ]  # fmt: skip
    rows = [
        [
            str(stage["stage"]), " ".join(map(str, stage["layers"])), amount(stage["dense"] + stage["table"]),
            amount(stage["table"]), amount(stage["state_bytes"], "B"), amount(stage["rows"]),
            amount(stage["row_bytes"], "B"), amount(stage["device_bytes"], "B"), amount(stage["waiting_bytes"], "B"),
        ]
        for stage in stages
    ]  # fmt: skip
    return "What sites add to each rank of a stage that has any:\n\n" + markdown_table(heads, rows)


def _collectives(stages: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [str(stage["stage"]), one["name"], amount(one["handed"], "B"), amount(one["on_the_wire"], "B")]
        for stage in stages
        for one in stage["collectives"]
    ]
    if not rows:
        return ""
    return markdown_table(["pipeline stage", "collective", "handed to it, a step", "on the wire"], rows)


def _demands(demands: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [one["resource"], f"{one['asked']:.3g}", f"{one['available']:.3g}", one["unit"], f"{one['share']:.1%}"]
        for one in demands
    ]
    return markdown_table(["resource", "asked", "available", "", "share"], rows)


def _limit(plan: Mapping[str, Any]) -> str:
    if not plan["demands"]:
        return ""
    first = plan["demands"][0]
    verdict = f"**What binds first: {first['resource']}, {first['share']:.1%} of it.**"
    if first["share"] > 1:
        verdict = f"**Does not fit: {first['resource']}, {first['share']:.1%} of what there is.**"
    if not plan["most_rows"]:
        return verdict
    return f"{verdict} One copy on each node is possible up to {amount(plan['most_rows'])} rows."
