"""What a build costs, as Markdown: the tables of a plan, and of its comparison with a build."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_graft.log import format_seconds
from megatron_graft.reporting.page import NOTHING, markdown_table

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def plan_page(plan: Mapping[str, Any]) -> str:
    """The tables of a plan.

    Args:
        plan: ``cost`` (the JSON of a ``BuildCost``), ``shape``, ``rates`` and ``fleet`` (name of a figure -> its
            value, as it is to be shown).
    """
    cost = plan["cost"]
    parts = [
        markdown_table(["what is built", ""], [[name, value] for name, value in plan["shape"].items()], numbers=False),
        stage_costs(cost),
        _sizes(cost),
        markdown_table(["assumed", ""], [[name, value] for name, value in plan["rates"].items()], numbers=False),
        *(f"**{warning}.**" for warning in cost["warnings"]),
    ]
    return "\n\n".join(parts) + "\n"


def estimate_page(estimate: Mapping[str, Any]) -> str:
    """The tables of an estimate, the JSON of a ``building.estimate.Estimate``."""
    sample, cost = estimate["sample"], estimate["cost"]
    share = sample["tokens"] / max(1, sample["of_tokens"])
    parts = [
        f"From {sample['documents']:,} of {sample['of_documents']:,} documents: {sample['tokens']:,} of "
        f"{sample['of_tokens']:,} tokens ({share:.2%}), seed {sample['seed']}. Counts of what is rare are carried "
        "forward from how they grow inside the sample; what is frequent is scaled.",
        _expected_ngrams(estimate),
        _expected_coverage(estimate["coverage"]),
        stage_costs(cost, device="donor, hours"),
        _sizes(cost),
        f"Measured on the sample: {', '.join(estimate['measured'])}; all other rates are assumed.",
        *(f"**{warning}.**" for warning in cost["warnings"]),
    ]
    return "\n\n".join(parts) + "\n"


def stage_costs(cost: Mapping[str, Any], device: str = "GPU-hours") -> str:
    """Bytes, core-, device- and wall time of every stage and of all; ``device`` is the title of the devices' column."""
    rows = [
        [
            stage["name"], shown_bytes(stage["bytes_written"]), shown_bytes(stage["bytes_read"]),
            _hours(stage["core_seconds"]), _hours(stage["device_seconds"]), format_seconds(stage["wall_seconds"]),
        ]
        for stage in cost["stages"]
    ]  # fmt: skip
    read = sum(stage["bytes_read"] for stage in cost["stages"])
    rows.append([
        "all", shown_bytes(cost["spilled_bytes"]), shown_bytes(read), _hours(cost["core_seconds"]),
        _hours(cost["device_seconds"]), format_seconds(cost["wall_seconds"]),
    ])  # fmt: skip
    return markdown_table(["stage", "written", "read", "core-hours", device, "wall"], rows)


def check_table(figures: Iterable[Mapping[str, Any]]) -> str:
    """``name``, ``predicted``, ``measured`` and their ``ratio`` (None where nothing was measured)."""
    rows = [
        [
            figure["name"], _number(figure["predicted"]), _number(figure["measured"]),
            NOTHING if figure["ratio"] is None else f"{figure['ratio']:.2f}",
        ]
        for figure in figures
    ]  # fmt: skip
    return markdown_table(["figure", "predicted", "measured", "predicted / measured"], rows)


def shown_bytes(number: float) -> str:
    """``1.5e9`` -> ``1.50 GB``."""
    unit = 0
    while number >= 1000 and unit < len(_UNITS) - 1:
        number, unit = number / 1000, unit + 1
    return f"{number:.3g} {_UNITS[unit]}" if unit else f"{number:.0f} B"


def _expected_ngrams(estimate: Mapping[str, Any]) -> str:
    """n-grams that are frequent enough; how well halves of the sample predicted the sample stands beside them."""
    shares, errors = estimate["text_share_by_order"] or {}, estimate["growth_errors"]
    rows = [
        [
            f"order {order}", f"{number:,.0f}", f"{shares[order]:.1%}" if order in shares else NOTHING,
            f"{errors[order]:.2f}" if errors.get(order) else NOTHING,
        ]
        for order, number in estimate["ngrams_by_order"].items()
    ]  # fmt: skip
    rows.append(["all, with a text", f"{estimate['qualifying']:,.0f}", NOTHING, NOTHING])
    return markdown_table(["n-grams", "frequent enough", "with a text", "predicted / counted in the sample"], rows)


def _expected_coverage(points: Sequence[Mapping[str, Any]]) -> str:
    orders = list(points[0]["share_by_order"])
    rows = [
        [
            f"{point['rows']:,}", f"{point['smallest_count']:,.0f}", f"{point['hit_rate']:.1%}",
            *(f"{point['share_by_order'][order]:.1%}" for order in orders),
        ]
        for point in points
    ]  # fmt: skip
    return markdown_table(
        ["rows", "smallest count", "hit on fresh text", *(f"order {order}" for order in orders)], rows
    )


def _sizes(cost: Mapping[str, Any]) -> str:
    bank = cost["bank_bytes"]
    rows = [
        *([f"bank: {part}", shown_bytes(bank[part])] for part in ("keys", "index", "rows", "total")),
        ["work directory at its largest", shown_bytes(cost["peak_work_bytes"])],
        ["donor tokens", f"{cost['donor_tokens']:.4g}"],
        *([f"n-grams kept, order {order}", f"{number:.3g}"] for order, number in cost["kept_by_order"].items()),
    ]
    return markdown_table(["size", ""], rows)


def _hours(seconds: float) -> str:
    return NOTHING if not seconds else f"{seconds / 3600:,.3g}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
