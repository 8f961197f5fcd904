"""The page of a comparison, Markdown: first what became of each hypothesis, then every table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_graft.experiments import comparison_differences as differences
from megatron_graft.experiments import comparison_numbers as shown
from megatron_graft.experiments.comparison import Summary
from megatron_graft.experiments.comparison_details import (
    afterwards_section,
    arms_of,
    further_section,
    grid_section,
    order_section,
    pair_section,
    plot_line,
    round_section,
    site_section,
    sweep_sections,
    training_section,
)
from megatron_graft.experiments.experiment import CORE
from megatron_graft.log import format_seconds
from megatron_graft.reporting.page import NOTHING, markdown_table


def page_of(summary: Summary, plots: Mapping[str, str], words: str = "") -> str:
    """The page of a summary.

    Args:
        summary: of :func:`megatron_graft.experiments.comparison.summarise`.
        plots: by name, the path of each plot that was made, relative to the page.
        words: Markdown that is put behind the verdicts.
    """
    parts = [
        f"# {shown.sentence(summary['experiment'].replace('-', ' ').replace('_', ' '))}",
        _opening(summary),
        *_verdicts(summary),
        *_pairs(summary),
        words.strip(),
        *core_section(summary, plots),
        *text_section(summary),
        *order_section(summary, plots),
        *pair_section(summary),
        *grid_section(summary),
        *training_section(summary, plots),
        *further_section(summary),
        *sweep_sections(summary, plots),
        *round_section(summary),
        *site_section(summary),
        *afterwards_section(summary),
        *_not_run(summary),
        *_made_by(summary),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _opening(summary: Summary) -> str:
    runs, primary = summary["runs"], summary["primary"]
    text = summary["texts"].get(primary)
    size = f" ({text['documents']} documents, {text['tokens']:,} tokens)" if text else ""
    return (
        f"{runs['finished']} of {runs['planned']} runs are finished. Losses are in nats per token on `{primary}`{size} "
        "at the end of training, unless said otherwise; a difference A − B below zero means that A has the lower loss. "
        f"Intervals in brackets are over documents ({summary['resamples']:,} bootstrap resamples, stratified by "
        f"source, the same documents in all seeds), {shown.level(summary['level'])} but for hypotheses; ± is the "
        "standard deviation over seeds."
    )


def _verdicts(summary: Summary) -> Iterable[str]:
    hypotheses = summary["hypotheses"]
    if not hypotheses:
        return
    yield "## Verdicts"
    yield (
        f"Both intervals of a hypothesis are of level {shown.level(summary['hypothesis_level'])} (Bonferroni over "
        f"{len(hypotheses)}). It is shown if the one over documents and Student's over seeds lie below zero, "
        "contradicted if both lie above it, else open."
    )
    yield "\n".join(f"- {verdict_sentence(name, one)}" for name, one in hypotheses.items())
    if not any(one["difference"] for one in hypotheses.values()):
        return
    seeds = differences.seeds_of(one["difference"] for one in hypotheses.values())
    heads = ["", "A − B", "verdict", *differences.heads(seeds)]
    yield markdown_table(heads, [_hypothesis_row(name, one, seeds) for name, one in hypotheses.items()])


def _pairs(summary: Summary) -> Iterable[str]:
    found = [one for one in summary["pairs"].values() if one["difference"]]
    if not found:
        return
    yield f"Without a hypothesis, and so at {shown.level(summary['level'])} and without a verdict:"
    yield differences.table({(one["first"], one["second"]): one["difference"] for one in found})


def verdict_sentence(name: str, one: Mapping[str, Any]) -> str:
    """One hypothesis, what became of it, and by which numbers."""
    head = f"**{name} {one['state']}**"
    if one["reason"]:
        head += f" ({one['reason']})"
    text = f"{head}: {one['claim']}"
    found = one["difference"]
    if found is None:
        return f"{text}."
    numbers = f"`{one['better']}` − `{one['worse']}` = {shown.signed(found['mean'])}"
    if found["documents"]:
        numbers += f", over documents {shown.interval(found['documents'])}"
    if found["over_seeds"]:
        numbers += f", over {len(found['by_seed'])} seeds {shown.interval(found['over_seeds'])}"
    return f"{text}; {numbers}."


def _hypothesis_row(name: str, one: Mapping[str, Any], seeds: Sequence[str]) -> list[str]:
    return [name, f"`{one['better']}` − `{one['worse']}`", one["state"], *differences.cells(one["difference"], seeds)]


def core_section(summary: Summary, plots: Mapping[str, str]) -> Iterable[str]:
    """The arms that the hypotheses are about: size, cost and loss."""
    arms = arms_of(summary, CORE)
    yield "## Arms"
    if not arms:
        yield "None has been run yet."
        return
    primary, baseline = summary["primary"], summary["references"][0]
    heads = [
        "arm", "seeds", "trained", "of it tables", "stored, frozen", "fetched/token", "FLOPs/token",
        "loss", "bits/byte", f"− `{baseline}`",
    ]  # fmt: skip
    yield markdown_table(heads, [_core_row(name, arm, primary, baseline) for name, arm in arms.items()])
    yield (
        "Trained, stored and fetched are numbers of parameters: trained ones, elements of the whole frozen bank, and "
        "those of memory that a position with a match reads. FLOPs are those of a forward pass, on paper."
    )
    yield plot_line(plots, "differences", f"Differences of the arms to {baseline}, with intervals")


def _core_row(name: str, arm: Mapping[str, Any], primary: str, baseline: str) -> list[str]:
    sizes, text = arm["parameters"], arm["texts"].get(primary) or {}
    return [
        f"`{name}`: {arm['label']}", str(len(arm["seeds"])), shown.millions(sizes.get("trained")),
        shown.millions(sizes.get("tables")), shown.millions(sizes.get("stored")),
        shown.count(sizes.get("fetched_per_token")), shown.millions((arm["flops_per_token"] or {}).get("total")),
        shown.with_sd(text.get("loss")), shown.with_sd(text.get("bits_per_byte")),
        shown.with_interval(text.get("minus", {}).get(baseline)) if name != baseline else NOTHING,
    ]  # fmt: skip


def text_section(summary: Summary) -> Iterable[str]:
    """Bits per byte and differences by source of the primary text and on every other text."""
    arms, primary = arms_of(summary, CORE), summary["primary"]
    if not any(arm["texts"] for arm in arms.values()):
        return
    yield "## By source, and on foreign texts"
    rows = [(f"`{primary}`", (primary, None))]
    sources = list(
        dict.fromkeys(key for arm in arms.values() for key in arm["texts"].get(primary, {}).get("by_source", {}))
    )
    if len(sources) > 1:
        rows += [(f"`{primary}`: {source}", (primary, source)) for source in sources]
    rows += [(f"`{text}`", (text, None)) for text in summary["texts"] if text != primary]

    def table(of: Any, names: Sequence[str]) -> str:
        lines = [[label, *(of(_part(arms[name], *place), name) for name in names)] for label, place in rows]
        return markdown_table(["text", *(f"`{name}`" for name in names)], lines)

    yield "Bits per byte:"
    yield table(lambda part, _: shown.with_sd(part.get("bits_per_byte"), 3), list(arms))
    for other in summary["references"]:
        names = [name for name in arms if name != other]
        if other in arms and names:
            yield f"Loss minus that of `{other}`; {shown.BOLD}:"
            yield table(lambda part, _, other=other: shown.marked(part.get("minus", {}).get(other)), names)
    yield (
        "Documents: "
        + ", ".join(
            f"`{name}` {text['documents']} ({text['tokens']:,} tokens)" for name, text in summary["texts"].items()
        )
        + ". An interval over few documents is too narrow. Marks are no verdicts: three seeds that differ by noise "
        "alone agree in sign one time in four, and nothing here is corrected for the number of cells."
    )


def _part(arm: Mapping[str, Any], text: str, source: str | None) -> Mapping[str, Any]:
    found: Mapping[str, Any] = arm["texts"].get(text) or {}
    return found if source is None else found.get("by_source", {}).get(source) or {}


def _not_run(summary: Summary) -> Iterable[str]:
    yield "## What is not run yet"
    missing = [f"`{arm}`: seed {', '.join(map(str, seeds))}" for arm, seeds in summary["not_run"].items()]
    yield "\n".join(f"- {one}" for one in missing) or "Nothing: every run of the experiment is finished."
    if summary["not_finite"]:
        yield (
            "Finished with a loss that is not finite, and so without a mean: " + "; ".join(summary["not_finite"]) + "."
        )
    if summary["set_aside"]:
        yield "Recorded, but no run of the experiment as it is now, and so in no figure:"
        yield "\n".join(f"- {one}" for one in summary["set_aside"])


def _made_by(summary: Summary) -> Iterable[str]:
    runs = summary["runs"]
    yield "## Made by"
    facts = [f"{runs['finished']} runs"]
    if runs["training_seconds"]:
        facts.append(f"{format_seconds(runs['training_seconds'])} of training")
    if runs["evaluation_seconds"]:
        facts.append(f"{format_seconds(runs['evaluation_seconds'])} of evaluation")
    where = f" on {'; '.join(runs['machines'])}" if runs["machines"] else ""
    commits = f", commits {', '.join(f'`{one[:12]}`' for one in runs['commits'])}" if runs["commits"] else ""
    if runs["changed"]:
        commits += f" ({runs['changed']} runs with files beside these that were in no commit)"
    yield f"{', '.join(facts)}{where}{commits}. Written by `tools/compare_arms.py`; every number is in `summary.json`."
