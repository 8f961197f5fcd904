"""Reading what a run left in its directory: its command line, its metrics, its evaluation and its bank's manifest."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_graft.bank.manifest import Manifest, read_manifest
from megatron_graft.errors import ConfigError, IdentityError

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
EVALUATION_FILE = "evaluation.json"
HELD_OUT = "heldout"

# The flags that a report quotes, Megatron's and ours, with their defaults.
_WHOLE_NUMBERS = {
    "num-layers": None, "hidden-size": None, "ffn-hidden-size": None, "num-attention-heads": None,
    "num-experts": None, "moe-router-topk": None, "seq-length": None, "micro-batch-size": None,
    "global-batch-size": None, "train-iters": None, "seed": 1234, "tensor-model-parallel-size": 1,
    "pipeline-model-parallel-size": 1, "expert-model-parallel-size": 1,
    "bank-rows": None,
}  # fmt: skip
_NUMBERS = ("lr", "min-lr")
_SWITCHES = ("sequence-parallel", "use-distributed-optimizer", "bf16", "fp16")
_WORDS = ("lr-decay-style", "transformer-impl", "distributed-backend", "tokenizer-type")
_LISTS = ("data-path", "train-data-path", "graft-bank")
_LAYERS = ("graft-layers", "engram-layers")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run.

    Attributes:
        directory: where it lies; its last part is the run's name.
        arguments: the command line it was started with.
        flags: those of :data:`arguments` that a report quotes, by name with underscores.
        metrics: one record per step, ascending, each step once.
        evaluation: contents of ``evaluation.json``.
        banks: manifests of its whole banks.
    """

    directory: Path
    arguments: tuple[str, ...]
    flags: dict[str, Any]
    world_size: int | None
    metrics: tuple[dict[str, Any], ...]
    evaluation: dict[str, Any]
    banks: tuple[Manifest, ...]

    @property
    def name(self) -> str:
        """The run's name."""
        return self.directory.resolve().name

    @property
    def bank(self) -> Manifest | None:
        """The first of its banks, by whose matches losses are split; None without one."""
        return self.banks[0] if self.banks else None

    @property
    def bank_rows(self) -> int:
        """How many of the first bank's rows the run used; 0 without a bank."""
        return self._rows_used(self.banks[0]) if self.banks else 0

    @property
    def bank_digests(self) -> list[str]:
        """Digests of the rows used as banks."""
        return [bank.digest_of_rows(self._rows_used(bank)) for bank in self.banks]

    @property
    def site_layers(self) -> list[int]:
        """Layer numbers of all sites."""
        return sorted({*self.flags["graft_layers"], *self.flags["engram_layers"]})

    @property
    def memory(self) -> dict[str, Any] | None:
        """The identity of the run's memory, as checkpoints keep it; None for the stock model."""
        identity: dict[str, Any] | None = self.evaluation["memory"]
        return identity

    def _rows_used(self, bank: Manifest) -> int:
        return int(self.flags["bank_rows"] or bank.identity.num_rows)

    @property
    def intervals(self) -> list[dict[str, Any]]:
        """The records that close a log interval; they carry rates and the metrics of the sites."""
        return [record for record in self.metrics if "tokens_per_second" in record]

    @property
    def arm(self) -> str:
        """What the run's memory is, in a few words."""
        if self.memory is None:
            return "no memory"
        kinds = [bank.identity.control.kind for bank in self.banks if bank.identity.control]
        bank = f"{kinds[0]} rows" if kinds else "memory"
        if not self.memory["engram"]:
            return bank
        combined = {site["combine"] for site in self.memory["sites"].values() if site["combine"]}
        return f"{bank} + hashed tables{f' ({combined.pop()})' if combined else ''}" if self.banks else "hashed tables"


def read_run(directory: Path) -> Run | None:
    """Read a run's directory; None if the run has not been evaluated at its last step.

    Raises:
        ConfigError: it is not the directory of a run, or one of its files is damaged or lacks what is reported.
        BankError: the run's bank is gone or damaged.
        IdentityError: the bank is not the one that the run was trained with.
    """
    recorded = read_json(directory / RUN_FILE, "Give the directory that the run was given as --graft-run-dir.")
    arguments = tuple(str(argument) for argument in recorded["arguments"])
    flags = parse_flags(arguments)
    if not (directory / EVALUATION_FILE).is_file():
        return None
    evaluation = read_json(directory / EVALUATION_FILE, "Evaluate the run again.")
    if evaluation["iteration"] < (flags["train_iters"] or evaluation["train_iters"]):
        return None
    if HELD_OUT not in evaluation["data"]:
        raise ConfigError(
            directory / EVALUATION_FILE, "lacks the held-out text", got=", ".join(evaluation["data"]),
            expected=HELD_OUT, remedy=f"Evaluate the run with --data {HELD_OUT}=PREFIX.",
        )  # fmt: skip
    run = Run(
        directory=directory,
        arguments=arguments,
        flags=flags,
        world_size=recorded.get("world_size"),
        metrics=read_metrics(directory / METRICS_FILE, evaluation["iteration"]),
        evaluation=evaluation,
        banks=tuple(read_manifest(Path(bank)) for bank in flags["graft_bank"] if bank),
    )
    trained_with = evaluation["memory"]["banks"] if evaluation["memory"] else []
    if run.bank_digests != trained_with:
        raise IdentityError(
            ", ".join(flags["graft_bank"]), f"does not hold the rows of the run {directory}",
            got=", ".join(run.bank_digests), expected=", ".join(trained_with),
            remedy="Put the run's banks back, or train with these.",
        )  # fmt: skip
    return run


def read_json(path: Path, remedy: str) -> Any:
    """A JSON file's value.

    Raises:
        ConfigError: it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(path, f"cannot be read: {error.strerror}", remedy=remedy) from error
    except ValueError as error:
        raise ConfigError(path, "is not JSON", got=error, remedy=remedy) from error


def parse_flags(arguments: tuple[str, ...]) -> dict[str, Any]:
    """The quoted flags of a command line; the last one wins, as in Megatron. None where one was not given."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for flag, default in _WHOLE_NUMBERS.items():
        parser.add_argument(f"--{flag}", type=int, default=default)
    for flag in _NUMBERS:
        parser.add_argument(f"--{flag}", type=float)
    for flag in _SWITCHES:
        parser.add_argument(f"--{flag}", action="store_true")
    for flag in _WORDS:
        parser.add_argument(f"--{flag}")
    for flag in _LISTS:
        parser.add_argument(f"--{flag}", nargs="*", default=[])
    for flag in _LAYERS:
        parser.add_argument(f"--{flag}", type=int, nargs="+", default=[])
    return vars(parser.parse_known_args(arguments)[0])


def read_metrics(path: Path, last_step: int) -> tuple[dict[str, Any], ...]:
    """The records of the steps up to ``last_step``, ascending.

    A resumed run repeats steps: the last record of a step is the one that counts. A killed run leaves a line without
    its end, to which the resumed run's first record is joined: that record is still found.

    Raises:
        ConfigError: the file is missing or holds no step.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ConfigError(path, f"cannot be read: {error.strerror}", remedy="Train the run again.") from error
    by_step = {}
    for line in lines:
        record = _record(line)
        if record is not None and record["iteration"] <= last_step:
            by_step[record["iteration"]] = record
    if not by_step:
        raise ConfigError(path, "holds no step of the run", got=f"{len(lines)} lines", remedy="Train the run again.")
    return tuple(by_step[step] for step in sorted(by_step))


def _record(line: str) -> dict[str, Any] | None:
    start = line.rfind("{")  # records are flat, so their last brace opens the last of them
    try:
        record = json.loads(line[start:]) if start >= 0 else {}
    except ValueError:
        return None
    return record if "iteration" in record else None
