"""Reading the file of finished runs: JSON lines, one for each arm and seed, as ``record.py`` writes them.

What must be alike in matched arms is checked here: every run was evaluated on the same documents of a text, every run
of an arm had the same parameters and bank. Runs that the experiment does not name are set aside, with the reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_graft.errors import ConfigError, IdentityError
from megatron_graft.experiments.experiment import Experiment
from megatron_graft.experiments.runs import PlannedRun, changed_flags
from megatron_graft.log import get_logger

_REQUIRED = ("experiment", "arm", "seed", "command", "steps", "parameters", "texts")
_SUM_TOLERANCE = 1e-4  # relative; records hold seven digits


@dataclass(frozen=True, kw_only=True)
class Documents:
    """The documents of a text, in its order.

    Attributes:
        sources: source of each.
        tokens: predicted tokens of each, int64 [D].
        bytes: UTF-8 bytes that these spell, int64 [D].
    """

    sources: tuple[str, ...]
    tokens: np.ndarray
    bytes: np.ndarray


@dataclass(frozen=True, kw_only=True)
class TextLosses:
    """What one run lost on one text.

    Attributes:
        documents: of the text.
        losses: sum of each document's losses, nats, float64 [D].
        memory_off: the same with the memory off, or None.
        other_bank: the same with another bank's rows, by that bank's name.
        summary: the text as the record has it: ``loss``, ``bits_per_byte``, ``by_order``, ``by_order_and_count``.
    """

    documents: Documents
    losses: np.ndarray
    memory_off: np.ndarray | None
    other_bank: dict[str, np.ndarray]
    summary: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One finished run.

    Attributes:
        place: file and line, for messages.
        arm, seed: which run.
        texts: by name.
        data: the whole record.
    """

    place: str
    arm: str
    seed: int
    texts: dict[str, TextLosses]
    data: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Records:
    """The finished runs of an experiment.

    Attributes:
        runs: by arm, in the experiment's order, and seed, ascending; arms without a run are not in it.
        set_aside: place and reason of every record that is no run of the experiment as it is now.
    """

    runs: dict[str, dict[int, RunRecord]]
    set_aside: tuple[str, ...]

    def losses(self, arm: str, text: str) -> dict[int, np.ndarray]:
        """Document losses [D] of an arm's runs by seed; runs that were not evaluated on the text are not in it."""
        return {seed: run.texts[text].losses for seed, run in self.runs.get(arm, {}).items() if text in run.texts}

    def documents(self, text: str) -> Documents:
        """The documents of a text that at least one run was evaluated on."""
        return next(
            run.texts[text].documents for seeds in self.runs.values() for run in seeds.values() if text in run.texts
        )


def load_records(path: Path, experiment: Experiment) -> Records:
    """Read the finished runs; of several records of an arm and seed the last one counts.

    A line that a killed writer left without its end is passed over with a warning.

    Raises:
        ConfigError: the file is missing; a line is damaged, of another experiment, or lacks a figure.
        IdentityError: runs that should be alike were evaluated on other documents, or are of other models.
    """
    newest: dict[tuple[str, int], RunRecord] = {}
    set_aside = []
    for place, data in _lines(path, experiment):
        record = _record(place, data)
        if (record.arm, record.seed) in newest:
            set_aside.append(f"`{record.arm}`, seed {record.seed}: recorded again later")
        newest[record.arm, record.seed] = record
    runs: dict[str, dict[int, RunRecord]] = {arm: {} for arm in experiment.arms}
    for key in sorted(newest):
        reason = _stranger(experiment, newest[key].data)
        if reason:
            set_aside.append(f"`{key[0]}`, seed {key[1]}: {reason}")
        else:
            runs[key[0]][key[1]] = newest[key]
    found = Records(runs={arm: seeds for arm, seeds in runs.items() if seeds}, set_aside=tuple(set_aside))
    _check_alike(found)
    return found


def finished_runs(path: Path, experiment: Experiment) -> set[tuple[str, int]]:
    """Arm and seed of every run that has a record; of a file that is not there yet, none.

    Raises:
        ConfigError: as :func:`load_records`.
    """
    if not path.is_file():
        return set()
    newest = {(data["arm"], data["seed"]): data for _, data in _lines(path, experiment)}
    return {run for run, data in newest.items() if not _stranger(experiment, data)}


def _lines(path: Path, experiment: Experiment) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(
            path, f"cannot be read: {error.strerror}", remedy="tools/run_arms.py writes it as runs finish."
        ) from error
    for number, line in enumerate(lines, start=1):
        place = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            if _is_cut_off(line):
                get_logger().warning("%s: a line without its end, left by a killed writer: passed over", place)
                continue
            raise ConfigError(
                place, "is not JSON", got=error, remedy="Remove the line and run the arm again."
            ) from error
        missing = [name for name in _REQUIRED if name not in value] if isinstance(value, dict) else list(_REQUIRED)
        if missing:
            raise ConfigError(place, "is no record of a run", got=f"no {', '.join(missing)}")
        if value["experiment"] != experiment.name:
            raise ConfigError(place, "is of another experiment", got=value["experiment"], expected=experiment.name)
        yield place, value


def _is_cut_off(line: bytes) -> bool:
    """Whether a line is the beginning of a JSON object that never ends."""
    depth, quoted, escaped = 0, False, False
    for letter in line.decode("utf-8", errors="replace"):
        if quoted:
            quoted, escaped = escaped or letter != '"', letter == "\\" and not escaped
        elif letter == '"':
            quoted = True
        else:
            depth += (letter in "{[") - (letter in "}]")
            if depth == 0:
                return False
    return True


def _record(place: str, data: Mapping[str, Any]) -> RunRecord:
    try:
        texts = {name: _text(f"{place}: text {name}", text) for name, text in data["texts"].items()}
        return RunRecord(place=place, arm=str(data["arm"]), seed=int(data["seed"]), texts=texts, data=data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            place, "is not a record as this version writes it", got=f"{type(error).__name__}: {error}",
            remedy="Remove the line and run the arm again.",
        ) from error  # fmt: skip


def _text(place: str, text: Mapping[str, Any]) -> TextLosses:
    listed = text["documents"]
    documents = Documents(
        sources=tuple(map(str, listed["source"])),
        tokens=np.array(listed["tokens"], dtype=np.int64),
        bytes=np.array(listed["bytes"], dtype=np.int64),
    )
    off = text.get("memory_off")
    found = TextLosses(
        documents=documents,
        losses=_losses(listed),
        memory_off=_losses(off["documents"]) if off else None,
        other_bank={name: _losses(other["documents"]) for name, other in (text.get("other_bank") or {}).items()},
        summary=text,
    )
    for losses in (found.losses, found.memory_off, *found.other_bank.values()):
        if losses is not None and not len(documents.sources) == documents.tokens.size == losses.size > 0:
            raise ConfigError(
                place, "has not one loss, source and number of tokens for each document", got=losses.size,
                expected=f"{len(documents.sources)} (sources) and {documents.tokens.size} (tokens)",
            )  # fmt: skip
    mean, told = found.losses.sum() / documents.tokens.sum(), number_of(text["loss"])
    if math.isfinite(mean) and not math.isclose(mean, told, rel_tol=_SUM_TOLERANCE):
        raise ConfigError(place, "has another loss than its documents", got=told, expected=f"{mean:.6g}")
    return found


def _losses(listed: Mapping[str, Any]) -> np.ndarray:
    return np.array([number_of(loss) for loss in listed["loss"]], dtype=np.float64)


def number_of(value: float | None) -> float:
    """A loss of a record: JSON has no number for one that is not finite, and some writers say null."""
    return math.nan if value is None else float(value)


def _stranger(experiment: Experiment, data: Mapping[str, Any]) -> str:
    """Why a record is no run of the experiment as it is now; empty if it is one."""
    arm = experiment.arms.get(data["arm"])
    if arm is None:
        return "the experiment has no such arm"
    if data["seed"] not in arm.seeds:
        return f"the experiment asks for seeds {', '.join(map(str, arm.seeds))}"
    if data["steps"] != arm.steps:
        return f"{data['steps']} steps, the experiment asks for {arm.steps}"
    planned = PlannedRun(arm=arm, seed=data["seed"])
    changed = changed_flags(data["command"], planned.command(experiment))
    if changed:
        return f"the experiment asks for other flags: {', '.join(changed)}"
    made = data.get("bank_plan")  # records of the first versions do not tell
    return "" if made in (None, planned.bank_plan(experiment)) else "the experiment asks for a bank made otherwise"


def _check_alike(records: Records) -> None:
    first_of_text: dict[str, RunRecord] = {}
    for seeds in records.runs.values():
        first = next(iter(seeds.values()))
        for run in seeds.values():
            for name, text in run.texts.items():
                other = first_of_text.setdefault(name, run)
                if not _same_documents(text.documents, other.texts[name].documents):
                    raise IdentityError(
                        run.place, f"was evaluated on other documents of the text {name} than {other.place}",
                        remedy="Only runs that were evaluated on the same text and tokenizer can be compared.",
                    )  # fmt: skip
            for name in ("parameters", "bank"):
                if run.data.get(name) != first.data.get(name):
                    raise IdentityError(
                        run.place, f"is of the same arm as {first.place}, but differs in its {name}",
                        got=run.data.get(name), expected=first.data.get(name), remedy="Run the arm's seeds alike.",
                    )  # fmt: skip


def _same_documents(one: Documents, other: Documents) -> bool:
    return (
        one.sources == other.sources
        and np.array_equal(one.tokens, other.tokens)
        and np.array_equal(one.bytes, other.bytes)
    )
