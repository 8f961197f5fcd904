"""An experiment: one recipient, its data, and the arms that differ in their memory. Read from a YAML file.

    name: matched-arms
    seeds: [1, 2, 3]
    primary: heldout
    baseline: none
    texts: {held_out_fraction: 0.15, longest_document: 6000, foreign: [email]}
    tokenizer: {vocab_size: 8192}
    evaluation: {classify_by: real, other_bank: shuffled, memory_off: [heldout]}
    recipient: {train-iters: 615, hidden-size: 192}
    banks:
      real: {donor: smollm2-135m, flags: {num-rows: 150000}}
      shuffled: {from: real, control: shuffled}
    arms:
      none: {label: no memory, group: core}
      graft: {label: a grafted bank, group: core, bank: real, flags: {graft-layers: 2}}
    hypotheses:
      - {name: H1, better: graft, worse: none, claim: a grafted bank beats no memory}
    pairs:
      - {first: graft, second: none}

Flags are those of Megatron and of this package, without their dashes: a number or a word is the value, a list several
values, ``true`` a flag without one. Those of an arm win over the recipient's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_graft.data.corpus import HELD_OUT
from megatron_graft.errors import ConfigError
from megatron_graft.experiments.yaml_fields import YamlFields, read_yaml

CORE, FURTHER, SWEEP, ROUND = "core", "further", "sweep", "round"
GROUPS = (CORE, FURTHER, SWEEP, ROUND)  # in the order in which they are run
STEPS_FLAG, ROWS_FLAG = "train-iters", "graft-rows"
UNTOUCHED = "untouched"  # the text that is looked at only once a tuning round has followed a look at the others
CONTROL_FLAGS = ("seed",)  # all that a control bank can be told
type Flags = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One setting of the memory.

    Attributes:
        name: short name; runs are called after it.
        label: what it is, in a few words.
        group: ``core`` (judged by the hypotheses), ``further``, ``sweep`` or ``round`` (tuning that followed a look).
        sweeps: name of each sweep that it lies on -> its value there.
        varies: name of the arm from which it differs in one setting, or None.
        against: stand-ins for arms that it is shown against: one of other steps is shown against others of its steps.
        bank: name of its bank, or None.
        seeds: that it is run with.
        flags: its own.
        steps: of training.
    """

    name: str
    label: str
    group: str
    sweeps: Mapping[str, str]
    varies: str | None
    against: Mapping[str, str]
    bank: str | None
    seeds: tuple[int, ...]
    flags: Flags
    steps: int


@dataclass(frozen=True, kw_only=True)
class BankPlan:
    """How a bank is made: by a donor, from the training text; or as a control of another bank.

    Attributes:
        name: short name.
        donor: packaged donor's name or a local causal-LM directory; None for a control.
        random_weights: run the donor's architecture with random weights of this seed, or None for its own weights.
        source: name of the bank that a control is made from.
        control: ``shuffled`` or ``random``.
        flags: further ones of tools/build_bank.py.
    """

    name: str
    donor: str | None
    random_weights: int | None
    source: str | None
    control: str | None
    flags: Flags


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """That one arm has a lower loss on the primary text than another."""

    name: str
    better: str
    worse: str
    claim: str


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two arms that are compared though no hypothesis was fixed about them."""

    first: str
    second: str


@dataclass(frozen=True, kw_only=True)
class TextPlan:
    """Which texts are trained on and evaluated; see :func:`megatron_graft.experiments.texts.prepare_texts`.

    Attributes:
        inputs: the user's own files; none for the default corpus.
        foreign: names of packaged foreign texts, or NAME=FILE.
        held_out_fraction: of each source's documents.
        longest_document: characters after which documents of evaluation are cut.
    """

    inputs: tuple[Path, ...]
    foreign: tuple[str, ...]
    held_out_fraction: float
    longest_document: int

    @property
    def names(self) -> list[str]:
        """Of the texts that runs are evaluated on."""
        return [HELD_OUT, UNTOUCHED, *(item.partition("=")[0] for item in self.foreign)]


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """How finished runs are evaluated.

    Attributes:
        classify_by: bank by whose matches the losses of arms without a bank are split, or None.
        other_bank: bank whose rows the memory trained with the same keys is evaluated with once more, or None.
        memory_off: texts that are evaluated with the memory off, and with the other bank, too; all if empty.
    """

    classify_by: str | None
    other_bank: str | None
    memory_off: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What a YAML file says.

    Attributes:
        name: of the experiment.
        primary: the text that hypotheses are about.
        baseline: the arm that others are shown against.
        texts, vocab_size: of what is read.
        evaluation: see :class:`EvaluationPlan`.
        recipient: flags of every arm.
        banks, arms: by name, in the file's order.
        hypotheses, pairs: in the file's order.
    """

    name: str
    primary: str
    baseline: str
    texts: TextPlan
    vocab_size: int
    evaluation: EvaluationPlan
    recipient: Flags
    banks: dict[str, BankPlan]
    arms: dict[str, Arm]
    hypotheses: tuple[Hypothesis, ...]
    pairs: tuple[Pair, ...]

    def plans_of(self, bank: str) -> list[BankPlan]:
        """The plans that make a bank, in order: itself, after the one that it is a control of."""
        plan = self.banks[bank]
        return [*self.plans_of(plan.source), plan] if plan.source else [plan]

    def reads_like(self, arm: Arm, other: str) -> bool:
        """Whether an arm reads frozen rows of the same keys as another bank, so that it can read that one too."""
        if arm.bank is None or arm.bank == other or ROWS_FLAG in arm.flags:
            return False
        return self.same_keys(arm.bank, other)

    def same_keys(self, bank: str, other: str) -> bool:
        """Whether two banks have the same keys: one is a control of the other, or both are of a third."""
        return self.plans_of(bank)[0] is self.plans_of(other)[0]


def load_experiment(path: Path) -> Experiment:
    """Read and check an experiment.

    Raises:
        ConfigError: the file is missing, no YAML, or says something that cannot be; naming the place in it.
    """
    top = read_yaml(path)
    seeds = tuple(top.list_of("seeds", int))
    recipient = top.flags("recipient")
    arms = {name: _arm(name, fields, seeds, recipient) for name, fields in top.members("arms").items()}
    banks = {name: _bank(name, fields) for name, fields in top.members("banks").items()}
    experiment = Experiment(
        name=top.text("name"),
        primary=top.text("primary"),
        baseline=top.text("baseline"),
        texts=_texts(top.member("texts")),
        vocab_size=top.member("tokenizer").number("vocab_size", 8192),
        evaluation=_evaluation(top.member("evaluation")),
        recipient=recipient,
        banks=banks,
        arms=arms,
        hypotheses=tuple(_hypothesis(fields) for fields in top.items_of("hypotheses")),
        pairs=tuple(_pair(fields) for fields in top.items_of("pairs")),
    )
    top.skip("parts")  # anchors that arms refer to
    top.finish()
    _check_names(path, experiment)
    _check_banks(path, experiment)
    return experiment


def _arm(name: str, fields: YamlFields, seeds: tuple[int, ...], recipient: Flags) -> Arm:
    flags, sweeps = fields.flags("flags"), fields.words("sweeps")
    steps = flags.get(STEPS_FLAG, recipient.get(STEPS_FLAG))
    if not isinstance(steps, int) or steps < 1:
        raise ConfigError(fields.place, f"has no number of steps: {STEPS_FLAG}", got=steps, expected="a whole number")
    own_seeds = tuple(fields.list_of("seeds", int)) or seeds
    if not own_seeds:
        raise ConfigError(fields.place, "has no seeds", expected="seeds: [1, 2, 3], here or for all arms")
    arm = Arm(
        name=name,
        label=fields.text("label", ", ".join(" ".join(pair) for pair in sweeps.items()) or name),
        group=fields.choice("group", GROUPS),
        sweeps=sweeps,
        varies=fields.text("varies", None),
        against=fields.words("against"),
        bank=fields.text("bank", None),
        seeds=own_seeds,
        flags=flags,
        steps=steps,
    )
    fields.finish()
    return arm


def _bank(name: str, fields: YamlFields) -> BankPlan:
    plan = BankPlan(
        name=name,
        donor=fields.text("donor", None),
        random_weights=fields.number("random_weights", None),
        source=fields.text("from", None),
        control=fields.text("control", None),
        flags=fields.flags("flags"),
    )
    fields.finish()
    if (plan.donor is None) == (plan.source is None) or (plan.source is None) != (plan.control is None):
        raise ConfigError(fields.place, "is neither a bank nor a control", expected="'donor', or 'from' and 'control'")
    ignored = set(plan.flags).difference(CONTROL_FLAGS) if plan.source else set()
    if ignored:
        raise ConfigError(
            f"{fields.place}.flags", "says what a control takes from the bank that it is made from",
            got=", ".join(sorted(ignored)), expected=f"only {', '.join(CONTROL_FLAGS)}",
        )  # fmt: skip
    return plan


def _texts(fields: YamlFields) -> TextPlan:
    plan = TextPlan(
        inputs=tuple(Path(item) for item in fields.list_of("input", str)),
        foreign=tuple(fields.list_of("foreign", str)),
        held_out_fraction=fields.real("held_out_fraction", 0.15),
        longest_document=fields.number("longest_document", 6000),
    )
    fields.finish()
    return plan


def _evaluation(fields: YamlFields) -> EvaluationPlan:
    plan = EvaluationPlan(
        classify_by=fields.text("classify_by", None),
        other_bank=fields.text("other_bank", None),
        memory_off=tuple(fields.list_of("memory_off", str)),
    )
    fields.finish()
    return plan


def _hypothesis(fields: YamlFields) -> Hypothesis:
    hypothesis = Hypothesis(
        name=fields.text("name"), better=fields.text("better"), worse=fields.text("worse"), claim=fields.text("claim")
    )
    fields.finish()
    return hypothesis


def _pair(fields: YamlFields) -> Pair:
    pair = Pair(first=fields.text("first"), second=fields.text("second"))
    fields.finish()
    return pair


def _check_names(path: Path, experiment: Experiment) -> None:
    """Every arm, bank and text that is referred to is there, and no two hypotheses have one name."""
    known: tuple[tuple[dict[str, str], Collection[str]], ...] = (
        (_named_arms(experiment), experiment.arms),
        (_named_banks(experiment), experiment.banks),
        (_named_texts(experiment), experiment.texts.names),
    )
    for references, names in known:
        for place, name in references.items():
            if name not in names:
                raise ConfigError(f"{path}: {place}", "names what is not there", got=name, expected=", ".join(names))
    twice = [name for name, number in Counter(one.name for one in experiment.hypotheses).items() if number > 1]
    if twice:
        raise ConfigError(f"{path}: hypotheses", "have one name", got=", ".join(twice), expected="a name for each")


def _named_arms(experiment: Experiment) -> dict[str, str]:
    """Place in the file -> the arm that it names."""
    arms = {"baseline": experiment.baseline}
    for hypothesis in experiment.hypotheses:
        arms |= {f"hypotheses {hypothesis.name} {side}": getattr(hypothesis, side) for side in ("better", "worse")}
    for number, pair in enumerate(experiment.pairs):
        arms |= {f"pairs[{number}].{side}": getattr(pair, side) for side in ("first", "second")}
    for arm in experiment.arms.values():
        arms |= {f"arms.{arm.name}.varies": arm.varies} if arm.varies else {}
        for name, other in arm.against.items():
            arms |= {f"arms.{arm.name}.against: {name}": name, f"arms.{arm.name}.against.{name}": other}
    return arms


def _named_banks(experiment: Experiment) -> dict[str, str]:
    plan = experiment.evaluation
    banks = {f"arms.{arm.name}.bank": arm.bank for arm in experiment.arms.values() if arm.bank}
    banks |= {f"banks.{bank.name}.from": bank.source for bank in experiment.banks.values() if bank.source}
    evaluation = {"classify_by": plan.classify_by, "other_bank": plan.other_bank}
    return banks | {f"evaluation.{role}": name for role, name in evaluation.items() if name}


def _named_texts(experiment: Experiment) -> dict[str, str]:
    memory_off = experiment.evaluation.memory_off
    texts = {f"evaluation.memory_off[{number}]": name for number, name in enumerate(memory_off)}
    return {"primary": experiment.primary} | texts


def _check_banks(path: Path, experiment: Experiment) -> None:
    """No control is made from another one."""
    for bank in experiment.banks.values():
        if bank.source and experiment.banks[bank.source].source:
            raise ConfigError(f"{path}: banks.{bank.name}.from", "names a control", got=bank.source)
