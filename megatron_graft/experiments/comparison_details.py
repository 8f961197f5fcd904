"""Further sections of a comparison's page: by match, in the course of training, other arms, sweeps, sites."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_graft.experiments import comparison_differences as differences
from megatron_graft.experiments import comparison_numbers as shown
from megatron_graft.experiments.comparison import Summary
from megatron_graft.experiments.experiment import CORE, FURTHER, SWEEP
from megatron_graft.experiments.match_losses import MISS
from megatron_graft.experiments.training_curves import SHARES
from megatron_graft.reporting.page import NOTHING, markdown_table


def plot_line(plots: Mapping[str, str], name: str, title: str) -> str:
    """A plot as the page shows it; empty if it was not made."""
    return f"![{title}]({plots[name]})" if name in plots else ""


def arms_of(summary: Summary, *groups: str) -> dict[str, Any]:
    """The arms of some groups that have been run, in the experiment's order."""
    return {name: arm for name, arm in summary["arms"].items() if arm["group"] in groups}


def parts_of(arms: Iterable[Mapping[str, Any]], primary: str) -> list[str]:
    """``miss`` and the orders by which losses were split, ascending; empty if none were."""
    parts = {part for arm in arms for part in arm["texts"].get(primary, {}).get("by_order", {})}
    return sorted(parts, key=lambda part: 0 if part == MISS else int(part))


def sweeps_of(summary: Summary) -> dict[str, dict[str, Any]]:
    """The arms that lie on each sweep's axis: ascending by the numbers in their values, words last."""
    sweeps: dict[str, dict[str, Any]] = {}
    for name, arm in summary["arms"].items():
        for sweep in arm["sweeps"]:
            sweeps.setdefault(sweep, {})[name] = arm
    return {
        sweep: dict(sorted(arms.items(), key=lambda one: _place(one[1]["sweeps"][sweep])))
        for sweep, arms in sweeps.items()
    }


def _place(value: str) -> tuple[bool, list[float]]:
    """What to sort a sweep's values by, which are words for people: "x 0.33", "9,375", "2 and 3", "all"."""
    if re.match(r"(x )?\d", value) is None:
        return True, []
    return False, [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?", value.replace(",", ""))]


def order_section(summary: Summary, plots: Mapping[str, str]) -> Iterable[str]:
    """Losses by order of the longest match, and their differences to the references."""
    primary = summary["primary"]
    arms = {name: arm for name, arm in arms_of(summary, CORE).items() if arm["texts"].get(primary, {}).get("by_order")}
    parts = parts_of(arms.values(), primary)
    if not parts:
        return
    by_order = {name: arm["texts"][primary]["by_order"] for name, arm in arms.items()}
    yield "## By length of match"
    yield "Loss by the tokens in the longest match that the bank has at a position; ± is over seeds."
    heads = ["arm", *(part if part == MISS else f"order {part}" for part in parts)]
    first = next(iter(by_order.values()))
    rows = [["share of positions", *(shown.percent(first.get(part, {}).get("share")) for part in parts)]]
    rows += [
        [f"`{name}`", *(shown.with_sd(found.get(part, {}).get("loss")) for part in parts)]
        for name, found in by_order.items()
    ]
    yield markdown_table(heads, rows)
    for other in summary["references"]:
        rows = [
            [f"`{name}`", *(shown.with_sd(found.get(part, {}).get("minus", {}).get(other), sign="+") for part in parts)]
            for name, found in by_order.items()
            if any(other in of_part["minus"] for of_part in found.values())
        ]
        if rows:
            yield f"Minus the loss of `{other}`:"
            yield markdown_table(heads, rows)
    yield plot_line(plots, "by_order", "Differences by length of match")


def pair_section(summary: Summary) -> Iterable[str]:
    """Where the differences of the hypotheses and pairs come from: which text, which length of match."""
    pairs = {f"`{one['better']}` − `{one['worse']}`": one["texts"] for one in summary["hypotheses"].values()}
    pairs |= {f"`{one['first']}` − `{one['second']}`": one["texts"] for one in summary["pairs"].values()}
    pairs = {label: texts for label, texts in pairs.items() if texts}
    if not pairs:
        return
    yield "## Where the differences come from"
    yield f"On every text; {shown.BOLD}. In brackets what of it falls on positions without a match."
    names = list(summary["texts"])
    rows = [[label, *(_with_misses(texts.get(name)) for name in names)] for label, texts in pairs.items()]
    rates = [arm["hit_rate"] for arm in summary["arms"].values() if arm["group"] == CORE and arm["hit_rate"]]
    if rates:
        matched = [shown.percent((rates[0].get(name) or {}).get("any")) for name in names]
        rows.insert(0, ["positions that match", *matched])
    yield markdown_table(["", *(f"`{name}`" for name in names)], rows)
    primary = summary["primary"]
    split = {label: texts.get(primary, {}).get("parts") or {} for label, texts in pairs.items()}
    parts = sorted({part for found in split.values() for part in found}, key=_first_number)
    if parts:
        yield f"On `{primary}`, the share of positions times the difference there; a line adds up to its difference:"
        rows = [
            [label, *(shown.with_sd(found.get(part), sign="+") for part in parts)]
            for label, found in split.items()
            if found
        ]
        yield markdown_table(["", *(part if part == MISS else f"order {part}" for part in parts)], rows)


def _with_misses(found: Mapping[str, Any] | None) -> str:
    if not found:
        return NOTHING
    missed = found["parts"].get(MISS)
    text = shown.marked(found["difference"])
    return f"{text} ({shown.signed(missed['mean'])})" if missed else text


def grid_section(summary: Summary) -> Iterable[str]:
    """Differences by order and count of the matched key."""
    grids = summary["grids"]
    cells = [cell for rivals in grids.values() for orders in rivals.values() for cell in orders.items()]
    if not cells:
        return
    buckets = sorted({bucket for _, found in cells for bucket in found}, key=_first_number)
    yield "## By length of match and frequency of the key"
    yield (
        "Differences by how often the matched key stands in the training text (columns), mean over seeds. In italics: "
        f"fewer than {shown.FEW_TOKENS:,} tokens."
    )
    rows = []
    for arm, rivals in grids.items():
        orders = next(iter(rivals.values()))
        for order, found in orders.items():
            tokens = [shown.count(found.get(bucket, {}).get("tokens")) for bucket in buckets]
            rows.append([f"tokens, `{arm}`", order, *tokens])
        for rival, orders in rivals.items():
            for order, found in orders.items():
                rows.append([f"`{arm}` − `{rival}`", order, *(_cell(found.get(bucket)) for bucket in buckets)])
    yield markdown_table(["", "order", *buckets], rows)


def _cell(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return NOTHING
    text = shown.signed(cell["mean"], 3)
    return f"*{text}*" if cell["tokens"] < shown.FEW_TOKENS else text


def _first_number(bucket: str) -> int:
    found = re.search(r"\d+", bucket)
    return int(found[0]) if found else 0


def training_section(summary: Summary, plots: Mapping[str, str]) -> Iterable[str]:
    """Differences to the references in the course of training, and how soon their last losses are reached."""
    references = summary["references"]
    trained = {name: arm["training"] for name, arm in arms_of(summary, CORE).items() if arm["training"]}
    if not any(training["minus"] for training in trained.values()):
        return
    yield "## Loss against tokens"
    yield (
        "Training loss minus that of another arm on the same batches, before the step that learns from them, over the "
        "twentieth of the run that ends at a share of its tokens; ± is over seeds."
    )
    for other in references:
        lines = [
            [f"`{name}`", *(shown.with_sd(training["minus"][other]["at"][str(share)], sign="+") for share in SHARES)]
            for name, training in trained.items()
            if other in training["minus"]
        ]
        if lines:
            yield f"Minus that of `{other}`:"
            yield markdown_table(["arm", *(f"{share} % of the tokens" for share in SHARES)], lines)
    yield plot_line(plots, "tokens", f"Training loss minus that of {references[0]}, against tokens")
    lines = list(_training_of_other_lengths(summary))
    if lines:
        yield "Of further arms that were trained longer or shorter; text that comes again has been learned from before:"
        yield markdown_table(["A − B", "seeds", "tokens", *(f"{share} % of the tokens" for share in SHARES)], lines)
    lines = [
        [f"`{name}`", *(shown.percent(training["minus"].get(other, {}).get("reached")) for other in references)]
        for name, training in trained.items()
        if any(one["reached"] for one in training["minus"].values())
    ]
    if lines:
        yield "Share of the tokens after which an arm's training loss is as low as the other's at the end of its run:"
        yield markdown_table(["arm", *(f"end of `{other}`" for other in references)], lines)


def _training_of_other_lengths(summary: Summary) -> Iterable[list[str]]:
    """Lines of further arms against those that stand in for the references."""
    for name, arm in arms_of(summary, FURTHER).items():
        minus = (arm["training"] or {}).get("minus", {})
        for other, stand_in in arm["against"].items():
            if other in minus:
                shares = (shown.with_sd(minus[other]["at"][str(share)], sign="+") for share in SHARES)
                yield [f"`{name}` − `{stand_in}`", shown.seeds_of(arm), shown.millions(arm["tokens_seen"]), *shares]


def further_section(summary: Summary) -> Iterable[str]:
    """Arms without a hypothesis."""
    arms = arms_of(summary, FURTHER)
    if not arms:
        return
    yield "## Further arms"
    yield (
        "No hypothesis was fixed about these. Differences are over the seeds that both arms have; one seed cannot show "
        "that a difference would come again with another."
    )
    references = summary["references"]
    heads = [
        "arm",
        "seeds",
        "trained",
        "stored, frozen",
        "loss",
        "bits/byte",
        *(f"− `{one}`" for one in references),
    ]
    yield from _stand_ins(arms.values())
    yield markdown_table(heads, [_further_row(name, arm, summary) for name, arm in arms.items()])


def _further_row(name: str, arm: Mapping[str, Any], summary: Summary) -> list[str]:
    text = arm["texts"].get(summary["primary"], {})
    return [
        f"`{name}`: {arm['label']}", shown.seeds_of(arm), shown.millions(arm["parameters"].get("trained")),
        shown.millions(arm["parameters"].get("stored")), shown.with_sd(text.get("loss")),
        shown.with_sd(text.get("bits_per_byte")), *_minus(text, summary["references"]),
    ]  # fmt: skip


def _stand_ins(arms: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """Which arms stand in for those that columns name; nothing if none does."""
    found = dict.fromkeys((name, other) for arm in arms for name, other in arm["against"].items())
    if found:
        places = ", ".join(f"`{other}` in the place of `{name}`" for name, other in found)
        yield f"An arm that was trained longer or shorter is shown against others of its length: {places}."


def _minus(text: Mapping[str, Any], references: Sequence[str]) -> list[str]:
    return [shown.with_interval(text.get("minus", {}).get(other)) for other in references]


def sweep_sections(summary: Summary, plots: Mapping[str, str]) -> Iterable[str]:
    """Every sweep: one setting varied, all others as they were."""
    sweeps, references = sweeps_of(summary), summary["references"]
    if not sweeps:
        return
    yield "## Sweeps"
    yield (
        "The unchanged arm is the one from which a line's arm differs in this one setting. Arms are compared on the "
        "seeds that both have, and only if both were trained for as many steps."
    )
    yield from _stand_ins([arm for arms in sweeps.values() for arm in arms.values()])
    yield plot_line(plots, "sweeps", "Every sweep: difference against the value")
    heads = ["", "arm", "seeds", "trained", "bank rows", "matches", "loss", "− unchanged arm"]
    heads += [f"− `{one}`" for one in references]
    for sweep, arms in sweeps.items():
        yield f"### {shown.sentence(sweep)}"
        yield markdown_table(heads, [_sweep_row(name, arm, sweep, summary) for name, arm in arms.items()])
    yield plot_line(plots, "coverage", "Size of the bank, and share of positions that match, against the difference")


def _sweep_row(name: str, arm: Mapping[str, Any], sweep: str, summary: Summary) -> list[str]:
    primary = summary["primary"]
    text = arm["texts"].get(primary, {})
    rate = (arm["hit_rate"] or {}).get(primary) or {}
    return [
        arm["sweeps"][sweep], f"`{name}`", shown.seeds_of(arm),
        shown.millions(arm["parameters"].get("trained")), shown.count((arm["bank"] or {}).get("rows")),
        shown.percent(rate.get("any")), shown.with_sd(text.get("loss")),
        shown.with_interval((arm["varies"] or {}).get("difference")), *_minus(text, summary["references"]),
    ]  # fmt: skip


def round_section(summary: Summary) -> Iterable[str]:
    """The arms that were tuned after a look at the results, on the text that no choice was made by."""
    tuned = summary["round"]
    if tuned is None:
        return
    arms, text = tuned["arms"], tuned["text"]
    yield "## After tuning"
    yield (
        f"These arms were chosen after a look at the results above; they are judged on `{text}`, by which no choice "
        "was made. Beside them the core's arms, with the settings that these had before."
    )
    rows = [
        [
            f"`{name}`: {summary['arms'][name]['label']}",
            shown.seeds_of(summary["arms"][name]),
            shown.with_sd(arm["loss"]),
        ]
        for name, arm in arms.items()
    ]
    yield markdown_table(["arm", "seeds", f"loss, `{text}`"], rows)
    pairs = {(one["first"], one["second"]): one["texts"] for one in tuned["pairs"] if text in one["texts"]}
    yield "Each chosen arm against the one that it varies, no memory, and the others chosen:"
    yield differences.table({pair: found[text] for pair, found in pairs.items()})
    yield f"The same on all other texts; {shown.BOLD}:"
    others = list(dict.fromkeys(name for found in pairs.values() for name in found if name != text))
    cells = [
        [f"`{first}` − `{second}`", *(shown.marked(found.get(name)) for name in others)]
        for (first, second), found in pairs.items()
    ]
    yield markdown_table(["A − B", *(f"`{name}`" for name in others)], cells)


def site_section(summary: Summary) -> Iterable[str]:
    """Gate, size of the contribution, and dimensions it uses."""
    rows = [
        [
            f"`{name}`", shown.seeds_of(arm), layer,
            *(shown.with_sd(site.get(f"gate_{one}"), 3) for one in ("mean", "p10", "p50", "p90")),
            shown.with_sd(site.get("delta_ratio"), 3), shown.with_sd(site.get("participation"), 1),
        ]
        for name, arm in summary["arms"].items()
        if arm["group"] != SWEEP
        for layer, site in arm["sites"].items()
    ]  # fmt: skip
    if rows:
        yield "## Sites"
        yield (
            "Over the last log interval of training; ± is over seeds. Gates are of positions that read something, of "
            "arms without tables of those that match. |δ|/|h|, the contribution's size beside the hidden state's, is "
            "of all. Participation is the ratio of that name, (Σλ)²/Σλ² of the contributions' second moments: over how "
            "many dimensions they spread."
        )
        heads = ["arm", "seeds", "layer", "gate", "gate 10 %", "gate 50 %", "gate 90 %", "|δ|/|h|", "participation"]
        yield markdown_table(heads, rows)


def afterwards_section(summary: Summary) -> Iterable[str]:
    """The trained weights without their memory, and with other rows."""
    arms = {name: arm for name, arm in summary["arms"].items() if arm["group"] != SWEEP}
    banks = list(
        dict.fromkeys(bank for arm in arms.values() for text in arm["texts"].values() for bank in text["other_bank"])
    )
    rows = []
    for name, arm in arms.items():
        for text, found in arm["texts"].items():
            measured = [found["memory_off"], *(found["other_bank"].get(bank) for bank in banks)]
            if any(measured):
                rows.append([
                    f"`{name}`", shown.seeds_of(arm), f"`{text}`", shown.with_sd(found["loss"]),
                    *(shown.with_interval(one and one["change"]) for one in measured),
                ])  # fmt: skip
    if rows:
        yield "## Memory off, and other rows, after training"
        yield "The trained weights with the memory sites bypassed, or with another bank's rows, minus their loss."
        heads = ["arm", "seeds", "text", "loss", "memory off", *(f"rows of `{bank}`" for bank in banks)]
        yield markdown_table(heads, rows)
