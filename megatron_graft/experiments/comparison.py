"""All figures of an experiment's comparison, from its records, as one JSON value.

Keys are plain names, so that a figure has an address: ``arms.sum.texts.heldout.minus.none.mean``. ``minus.X`` is the
difference to arm X, as :class:`~megatron_graft.experiments.statistics.Difference` has it: below zero, X is the worse
one. Losses are in nats per token. What has not been run is not in it, or None.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from megatron_graft.experiments.experiment import CORE, ROUND, UNTOUCHED, Arm, Experiment, Hypothesis, Pair
from megatron_graft.experiments.match_losses import by_order_of, contributions_of, grids_of, hit_rates_of
from megatron_graft.experiments.records import Records, RunRecord
from megatron_graft.experiments.statistics import (
    BOOTSTRAP_SEED,
    LEVEL,
    OPEN,
    RESAMPLES,
    Difference,
    judge,
    mean_and_sd,
    paired_difference,
)
from megatron_graft.experiments.training_curves import curve_of

SUMMARY_VERSION = 1
type Summary = dict[str, Any]


def references_of(experiment: Experiment) -> list[str]:
    """The arms that every other one is shown against: the baseline, and the rival that most hypotheses name."""
    rivals = Counter(one.worse for one in experiment.hypotheses if one.worse != experiment.baseline)
    return [experiment.baseline, *(name for name, _ in rivals.most_common(1))]


def difference(
    records: Records, first: str, second: str, text: str, level: float = LEVEL, source: str | None = None
) -> Difference | None:
    """Loss of one arm minus another's on a text, or on the documents of one of its sources.

    None where they have no run of a common seed, or were trained for different numbers of steps.
    """
    one, other = records.losses(first, text), records.losses(second, text)
    if not one or not other or _steps(records, first) != _steps(records, second):
        return None
    documents = records.documents(text)
    kept = np.array([source in (None, name) for name in documents.sources])
    return paired_difference(
        {seed: losses[kept] for seed, losses in one.items()},
        {seed: losses[kept] for seed, losses in other.items()},
        documents.tokens[kept],
        [name for name, keep in zip(documents.sources, kept, strict=True) if keep],
        level,
    )


def summarise(experiment: Experiment, records: Records) -> Summary:
    """Every figure of the comparison, in full precision."""
    references = references_of(experiment)
    texts = _texts(experiment, records)
    level = 1 - (1 - LEVEL) / max(1, len(experiment.hypotheses))
    return {
        "version": SUMMARY_VERSION,
        "experiment": experiment.name,
        "primary": experiment.primary,
        "references": references,
        "level": LEVEL,
        "hypothesis_level": level,
        "resamples": RESAMPLES,
        "bootstrap_seed": BOOTSTRAP_SEED,
        "texts": texts,
        "hypotheses": {one.name: _verdict(experiment, records, one, level, texts) for one in experiment.hypotheses},
        "pairs": {
            f"{one.first}_minus_{one.second}": _pair(experiment, records, one, texts) for one in experiment.pairs
        },
        "arms": {arm: _arm(experiment, records, arm, references, texts) for arm in records.runs},
        "grids": grids_of(experiment, records),
        "round": _round(experiment, records, texts),
        "runs": _provenance(experiment, records),
        "not_run": _not_run(experiment, records),
        "not_finite": _not_finite(experiment, records),
        "set_aside": list(records.set_aside),
    }


def _verdict(
    experiment: Experiment, records: Records, hypothesis: Hypothesis, level: float, texts: Iterable[str]
) -> dict[str, Any]:
    arms = [experiment.arms[name] for name in (hypothesis.better, hypothesis.worse)]
    found = difference(records, hypothesis.better, hypothesis.worse, experiment.primary, level)
    state, reason = judge(found, len(set(arms[0].seeds) & set(arms[1].seeds)))
    if arms[0].steps != arms[1].steps:
        state, reason = OPEN, "its arms are trained for different numbers of steps"
    return {
        "claim": hypothesis.claim, "better": hypothesis.better, "worse": hypothesis.worse, "state": state,
        "reason": reason, "difference": found and found.as_json(),
        "texts": _by_text(records, hypothesis.better, hypothesis.worse, texts),
    }  # fmt: skip


def _pair(experiment: Experiment, records: Records, pair: Pair, texts: Iterable[str]) -> dict[str, Any]:
    found = difference(records, pair.first, pair.second, experiment.primary)
    return {
        "first": pair.first, "second": pair.second, "difference": found and found.as_json(),
        "texts": _by_text(records, pair.first, pair.second, texts),
    }  # fmt: skip


def _by_text(records: Records, first: str, second: str, texts: Iterable[str]) -> dict[str, Any]:
    """The difference of two arms on each text, and what each length of match adds to it."""
    found = {text: difference(records, first, second, text) for text in texts}
    return {
        text: {"difference": one.as_json(), "parts": contributions_of(records, first, second, text)}
        for text, one in found.items()
        if one
    }


def _texts(experiment: Experiment, records: Records) -> dict[str, Any]:
    """The texts that are shown, the primary one first, and what they hold."""
    runs = [run for seeds in records.runs.values() for run in seeds.values()]
    names = dict.fromkeys([experiment.primary, *(name for run in runs for name in run.texts)])
    shown = {}
    for name in names:
        if name == UNTOUCHED or not any(name in run.texts for run in runs):
            continue
        documents = records.documents(name)
        shown[name] = {
            "documents": len(documents.sources),
            "tokens": int(documents.tokens.sum()),
            "bytes": int(documents.bytes.sum()),
            "sources": {_key(source): number for source, number in sorted(Counter(documents.sources).items())},
        }
    return shown


def _arm(
    experiment: Experiment, records: Records, name: str, references: list[str], texts: Iterable[str]
) -> dict[str, Any]:
    plan, runs = experiment.arms[name], records.runs[name]
    rivals = {one: plan.against.get(one, one) for one in references}
    first = next(iter(runs.values()))
    return {
        "label": plan.label,
        "group": plan.group,
        "sweeps": dict(plan.sweeps),
        "varies": _change(experiment, records, plan),
        "against": dict(plan.against),
        "steps": plan.steps,
        "seeds": list(runs),
        "parameters": first.data["parameters"],
        "flops_per_token": first.data.get("flops_per_token"),
        "bank": first.data.get("bank"),
        "tokens_seen": first.data.get("tokens_seen"),
        "hit_rate": hit_rates_of(runs, texts),
        "sites": _sites(runs),
        "texts": {text: _text(experiment, records, name, text, rivals) for text in texts if records.losses(name, text)},
        "training": curve_of(
            runs, {one: records.runs.get(other, {}) for one, other in rivals.items() if other != name}
        ),
    }


def _change(experiment: Experiment, records: Records, plan: Arm) -> dict[str, Any] | None:
    """Loss of an arm minus that of the arm that it ``varies``, on the primary text; None if it varies none."""
    if plan.varies is None:
        return None
    found = difference(records, plan.name, plan.varies, experiment.primary)
    return {"arm": plan.varies, "difference": found and found.as_json()}


def _text(experiment: Experiment, records: Records, arm: str, text: str, rivals: Mapping[str, str]) -> dict[str, Any]:
    """Figures of an arm on a text; ``rivals`` are the references, and the arms that stand in for them."""
    found = _measured(records, arm, text, rivals, None) | {
        "by_seed": {str(seed): run.texts[text].summary["loss"] for seed, run in _runs_on(records, arm, text)},
        "by_order": by_order_of(records, arm, text, rivals),
    }
    if text == experiment.primary:
        sources = sorted(set(records.documents(text).sources))
        found["by_source"] = {_key(source): _measured(records, arm, text, rivals, source) for source in sources}
    return found | _afterwards(records, arm, text)


def _measured(records: Records, arm: str, text: str, rivals: Mapping[str, str], source: str | None) -> dict[str, Any]:
    """Loss, bits per byte and differences on a text or on one of its sources."""
    documents = records.documents(text)
    kept = np.array([source in (None, name) for name in documents.sources])
    nats = [float(losses[kept].sum()) for losses in records.losses(arm, text).values()]
    tokens, size = int(documents.tokens[kept].sum()), int(documents.bytes[kept].sum())
    minus = {
        name: difference(records, arm, other, text, source=source) for name, other in rivals.items() if other != arm
    }
    return {
        "loss": mean_and_sd([one / tokens for one in nats]),
        "bits_per_byte": mean_and_sd([one / math.log(2) / size for one in nats]) if size else None,
        "minus": {other: found.as_json() for other, found in minus.items() if found},
    }


def _afterwards(records: Records, arm: str, text: str) -> dict[str, Any]:
    """Losses of the trained weights with the memory off, and with other banks' rows; their differences to before."""
    runs = [(seed, run.texts[text]) for seed, run in _runs_on(records, arm, text)]
    named = {"": {seed: one.memory_off for seed, one in runs if one.memory_off is not None}}
    for bank in dict.fromkeys(bank for _, one in runs for bank in one.other_bank):
        named[bank] = {seed: one.other_bank[bank] for seed, one in runs if bank in one.other_bank}
    documents = records.documents(text)
    found: dict[str, Any] = {}
    for bank, losses in named.items():
        changed = paired_difference(losses, records.losses(arm, text), documents.tokens, documents.sources)
        if changed:
            means = [float(one.sum() / documents.tokens.sum()) for one in losses.values()]
            found[bank] = {"loss": mean_and_sd(means), "change": changed.as_json()}
    return {"memory_off": found.pop("", None), "other_bank": found}


def _sites(runs: dict[int, RunRecord]) -> dict[str, Any]:
    """What each site told of itself at the end of training, by layer, over the seeds."""
    told = [run.data["sites"] for run in runs.values() if run.data.get("sites")]
    return {
        layer: {name: mean_and_sd([sites[layer][name] for sites in told]) for name in figures}
        for layer, figures in (told[0] if told else {}).items()
    }


def _round(experiment: Experiment, records: Records, texts: Iterable[str]) -> dict[str, Any] | None:
    """The arms of the tuning round on the untouched text; None while there are none, so that nobody looks at it.

    The pairs among them are compared on every other text as well: what is chosen on one may lose on another.
    """
    tuned = [arm for arm in records.runs if experiment.arms[arm].group == ROUND and records.losses(arm, UNTOUCHED)]
    if not tuned:
        return None
    core = [arm for arm in records.runs if experiment.arms[arm].group == CORE and records.losses(arm, UNTOUCHED)]
    return {
        "text": UNTOUCHED,
        "arms": {
            arm: _measured(records, arm, UNTOUCHED, {one: one for one in [*core, *tuned]} if arm in tuned else {}, None)
            for arm in [*core, *tuned]
        },
        "pairs": [
            {"first": first, "second": second, "texts": _differences(records, first, second, [UNTOUCHED, *texts])}
            for first, second in _tuned_pairs(experiment, tuned)
        ],
    }


def _tuned_pairs(experiment: Experiment, tuned: list[str]) -> Iterable[tuple[str, str]]:
    """Each tuned arm with the one that it varies, the baseline, and the tuned ones before it."""
    for number, arm in enumerate(tuned):
        for other in dict.fromkeys([experiment.arms[arm].varies, experiment.baseline, *tuned[:number]]):
            if other is not None:
                yield arm, other


def _differences(records: Records, first: str, second: str, texts: Iterable[str]) -> dict[str, Any]:
    found = {text: difference(records, first, second, text) for text in texts}
    return {text: one.as_json() for text, one in found.items() if one}


def _provenance(experiment: Experiment, records: Records) -> dict[str, Any]:
    runs = [run.data for seeds in records.runs.values() for run in seeds.values()]
    machines = [run.get("machine") or {} for run in runs]
    seconds = [run.get("seconds") or {} for run in runs]
    return {
        "finished": len(runs),
        "planned": sum(len(arm.seeds) for arm in experiment.arms.values()),
        "commits": sorted({str(run["commit"]) for run in runs if run.get("commit")}),
        "changed": sum(bool(run.get("changed")) for run in runs),
        "machines": sorted({f"{one['cpu']}, {one['cores']} cores" for one in machines if "cpu" in one}),
        "training_seconds": sum(one.get("training") or 0.0 for one in seconds),
        "evaluation_seconds": sum(one.get("evaluation") or 0.0 for one in seconds),
    }


def _not_run(experiment: Experiment, records: Records) -> dict[str, Any]:
    missing = {
        name: [seed for seed in arm.seeds if seed not in records.runs.get(name, {})]
        for name, arm in experiment.arms.items()
    }
    return {name: seeds for name, seeds in missing.items() if seeds}


def _not_finite(experiment: Experiment, records: Records) -> list[str]:
    """Runs whose loss on the primary text is no number: diverged ones."""
    return [
        f"`{arm}`, seed {seed}"
        for arm in records.runs
        for seed, losses in records.losses(arm, experiment.primary).items()
        if not math.isfinite(losses.sum())
    ]


def _key(name: str) -> str:
    """A source's name as a part of an address; a file's may have points in it."""
    return name.replace(".", "_")


def _steps(records: Records, arm: str) -> int:
    return int(next(iter(records.runs[arm].values())).data["steps"])


def _runs_on(records: Records, arm: str, text: str) -> list[tuple[int, RunRecord]]:
    return [(seed, run) for seed, run in records.runs[arm].items() if text in run.texts]
