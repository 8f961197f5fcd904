#!/usr/bin/env python3
"""Build a bank stage by stage, as jobs of a cluster do: plan once, then run the tasks of each stage in order.

  plan --work-dir DIR <flags of build_bank>    check everything, cut the work into tasks, write DIR/plan.json
  list --work-dir DIR                          the stages that are left, one a line: name, number of tasks
  run STAGE --work-dir DIR                     run this worker's share of a stage's tasks

Which share is a worker's: --rank of --world-size; else RANK and WORLD_SIZE, as torchrun sets them; else the numbers of
a Slurm array, else of a Slurm step; else everything. Tasks that are done are not done again.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_graft.building.stages import stage_lines
from megatron_graft.building.tasks import remaining_stages
from megatron_graft.commands import run_command
from megatron_graft.errors import ConfigError
from megatron_graft.jobs.bank_build import open_stages, plan_build, run_share
from megatron_graft.jobs.build_flags import add_build_flags, parse_build_flags
from megatron_graft.log import get_logger

# Names of the variables that number a worker, count the workers, and say where the numbers begin.
_WORKERS = (
    ("RANK", "WORLD_SIZE", ""),
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ""),  # of srun's step: a batch script itself is no worker of several
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``list`` and ``run``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="plan|list|run")
    commands.add_parser("plan", help="write the plan", add_help=False)
    for name, help_text in (("list", "list the stages that are left"), ("run", "run tasks of a stage")):
        command = commands.add_parser(name, help=help_text, allow_abbrev=False)
        command.add_argument("--work-dir", type=Path, required=True, metavar="DIR", help="where the plan is")
        if name == "run":
            command.add_argument("stage", metavar="STAGE", help="its name, as listed")
            command.add_argument("--rank", type=int, metavar="R", help="this worker's number, from 0")
            command.add_argument("--world-size", type=int, metavar="W", help="number of workers")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["plan"]:
        return run_command(lambda: _plan(words[1:]))
    arguments = build_parser().parse_args(words)
    return run_command(lambda: _list(arguments.work_dir) if arguments.command == "list" else _run(arguments))


def _plan(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="build_stage.py plan", description="Write the plan of a build.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add_build_flags(parser)
    if (plan := plan_build(parse_build_flags(parser, words))) is not None:
        get_logger().info("%s: planned", plan.config.work)


def _list(work: Path) -> None:
    stages = open_stages(work)
    if left := stage_lines(remaining_stages(stages.all, stages.work)):
        print(left)


def _run(arguments: argparse.Namespace) -> None:
    rank, world_size = worker(arguments.rank, arguments.world_size, os.environ)
    run_share(arguments.work_dir, arguments.stage, rank=rank, world_size=world_size)


def worker(rank: int | None, world_size: int | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """This worker's number and the number of workers.

    Raises:
        ConfigError: only one of the two is known, one is no number, or an array's numbers have gaps.
    """
    if rank is not None or world_size is not None:
        if rank is None or world_size is None:
            raise ConfigError("--rank", "goes with --world-size", expected="both or none")
        return rank, world_size
    for number, count, first in _WORKERS:
        if number in environment and count in environment:
            words = [environment[number], environment[count], environment.get(first, "0")]
            if not all(word.isdecimal() for word in words):
                raise ConfigError(f"{number}, {count}", "are no numbers", got=" ".join(words[:2]))
            rank, world_size = int(words[0]) - int(words[2]), int(words[1])
            if not 0 <= rank < world_size:
                raise ConfigError(
                    f"{number} {words[0]}", "does not follow the others", got=f"{world_size} numbers from {words[2]}",
                    expected="an array without gaps", remedy="Submit all of it again: what is done stays done.",
                )  # fmt: skip
            return rank, world_size
    return 0, 1


if __name__ == "__main__":
    raise SystemExit(main())
