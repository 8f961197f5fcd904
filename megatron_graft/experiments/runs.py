"""The runs of an experiment: an arm with a seed, as a call of the example script."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_graft.errors import ConfigError
from megatron_graft.experiments.experiment import GROUPS, Arm, Experiment

TRAIN = "train"
_SCRIPT = "examples/pretrain_graft_moe.sh"
_NAMES = ("name", "source")  # of a bank's plan
SCRIPT_VARIABLES = (
    "DATA_PATH", "SPLIT", "TEXT", "FOREIGN", "TOKENIZER_MODEL", "TOKENIZER_VOCAB_SIZE",
    "GRAFT_BANK", "GRAFT_LAYERS", "ENGRAM_LAYERS", "ENGRAM_VOCAB_SIZE", "ENGRAM_DIM", "NUM_EXPERTS", "DONOR",
    "BANK_ARGUMENTS", "EVALUATION", "RUN_NAME", "RUNS_DIR", "WORK_DIR", "RUN_COMMAND",
    "GRAFT_THREADS", "GPUS_PER_NODE", "NUM_NODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT",
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
)  # fmt: skip
"""What the example script reads from its environment and an experiment decides, whatever its caller has exported."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where an experiment's files lie.

    Attributes:
        work: texts, tokenizer, data, donors, banks.
        runs: a directory for each run.
        records: the JSON-lines file of finished runs.
    """

    work: Path
    runs: Path
    records: Path

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's model."""
        return self.work / "tokenizer" / "tokenizer.model"

    def data(self, text: str) -> Path:
        """Prefix of a text's ``.bin/.idx`` pair."""
        return self.work / "data" / f"{text}_text_document"

    def bank(self, name: str) -> Path:
        """A bank's directory."""
        return self.work / "banks" / name


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One arm with one seed."""

    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        """The run's name and that of its directory."""
        return f"{self.arm.name}-seed{self.seed}"

    def flags(self, experiment: Experiment, places: Places) -> list[str]:
        """What the example script is given on its command line."""
        # Of its own, because two runs that start at once would write one cache at the same time.
        cache = {"data-cache-path": places.runs / self.name / "index-cache"}
        return flag_list(self._own_flags(experiment) | cache)

    def command(self, experiment: Experiment) -> str:
        """The same beyond directories, which are of no use to a reader: what a run is known by."""
        return " ".join([_SCRIPT, *flag_list(self._own_flags(experiment))])

    def bank_plan(self, experiment: Experiment) -> list[dict[str, Any]]:
        """How the arm's bank is made, whatever it is called; empty without one. A run is known by this, too."""
        plans = [dataclasses.asdict(plan) for plan in experiment.plans_of(self.arm.bank)] if self.arm.bank else []
        return [{name: value for name, value in plan.items() if name not in _NAMES} for plan in plans]

    def _own_flags(self, experiment: Experiment) -> dict[str, Any]:
        return {**experiment.recipient, **self.arm.flags, "seed": self.seed, "eval-iters": 0}

    def environment(self, places: Places, *, processes: int, threads: int, port: int) -> dict[str, str]:
        """The example script's environment: this process's, but for what the experiment decides."""
        kept = {name: value for name, value in os.environ.items() if name not in SCRIPT_VARIABLES}
        return kept | {
            "DATA_PATH": str(places.data(TRAIN)),
            "SPLIT": "1,0,0",
            "TOKENIZER_MODEL": str(places.tokenizer),
            "GRAFT_BANK": str(places.bank(self.arm.bank)) if self.arm.bank else "none",
            "WORK_DIR": str(places.work),
            "RUNS_DIR": str(places.runs),
            "RUN_NAME": self.name,
            "EVALUATION": "none",
            "GPUS_PER_NODE": str(processes),
            "GRAFT_THREADS": str(threads),
            "MASTER_PORT": str(port),
        }


def flag_list(flags: Mapping[str, Any]) -> list[str]:
    """``{"lr": 0.1, "swiglu": True, "graft-layers": [2, 3]}`` as a command line."""

    def words() -> Iterator[str]:
        for flag, value in flags.items():
            yield f"--{flag}"
            if value is not True:
                yield from map(str, value if isinstance(value, list) else [value])

    return list(words())


def changed_flags(one: str, other: str) -> list[str]:
    """The flags by which two commands differ, in whatever order they are given."""
    first, second = (_flags_of(command) for command in (one, other))
    return sorted(flag for flag in first.keys() | second.keys() if first.get(flag) != second.get(flag))


def _flags_of(command: str) -> dict[str, list[str]]:
    flags: dict[str, list[str]] = {}
    values: list[str] = []
    for word in command.split()[1:]:
        if word.startswith("--"):
            values = flags[word] = []
        else:
            values.append(word)
    return flags


def plan_runs(experiment: Experiment, only: Sequence[str] = ()) -> list[PlannedRun]:
    """The runs in the order in which they are to be trained: group by group, first every arm with its first seed.

    Args:
        experiment: whose.
        only: patterns of run or arm names or names of groups (``sum*``, ``none-seed1``, ``core``); all if empty.

    Raises:
        ConfigError: a pattern fits nothing.
    """
    runs = [PlannedRun(arm=arm, seed=seed) for arm in experiment.arms.values() for seed in arm.seeds]
    runs.sort(key=lambda run: (GROUPS.index(run.arm.group), run.arm.seeds.index(run.seed)))  # stable: arms keep order
    for pattern in only:
        if not any(_fits(run, pattern) for run in runs):
            raise ConfigError("--only", "fits no run", got=pattern, expected=", ".join(run.name for run in runs))
    return [run for run in runs if not only or any(_fits(run, pattern) for pattern in only)]


def _fits(run: PlannedRun, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (run.name, run.arm.name, run.arm.group))
