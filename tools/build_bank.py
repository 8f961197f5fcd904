#!/usr/bin/env python3
"""Build a graft bank: count n-grams of data sets, keep the most frequent, run each through a donor.

Everything runs on this machine, unless --executor says otherwise. Killed at any moment and started again with the same
flags, it goes on where it was.
tools/build_stage.py runs the same stages one by one, as jobs of a cluster.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_graft.building.build import build_control
from megatron_graft.building.estimate import SAMPLE_TOKENS
from megatron_graft.commands import run_command
from megatron_graft.errors import ConfigError
from megatron_graft.jobs.bank_build import build_whole, estimate_whole, plan_build
from megatron_graft.jobs.bank_data import named_prefixes
from megatron_graft.jobs.build_flags import add_build_flags, control_of, parse_build_flags
from megatron_graft.jobs.cluster import Executor, SlurmOptions, run_with_datatrove

_CONTROL = ("from_bank", "control", "seed", "output")  # what --from-bank reads


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add_build_flags(parser)
    other = parser.add_argument_group("instead of a whole build")
    other.add_argument(
        "--from-bank", type=Path, metavar="DIR", help="make a control bank from this one, without a donor"
    )
    other.add_argument("--estimate", action="store_true", help="only say, from a sample, what it would give and cost")
    other.add_argument("--estimate-tokens", type=int, default=SAMPLE_TOKENS, metavar="N", help="tokens to sample")
    cluster = parser.add_argument_group("by whom (datatrove must be installed)")
    cluster.add_argument(
        "--executor",
        default="local",
        choices=("local", *get_args(Executor)),
        help="datatrove-slurm submits and returns",
    )
    cluster.add_argument("--slurm-partition", metavar="NAME", help="of the jobs that datatrove submits")
    cluster.add_argument("--slurm-time", default=SlurmOptions.time, metavar="TIME", help="time limit of a job")
    cluster.add_argument(
        "--slurm-encode-gpus", type=int, default=0, metavar="N", help="GPUs of a job that runs the donor"
    )
    cluster.add_argument(
        "--slurm-encode-partition", default="", metavar="NAME", help="of those jobs (default: --slurm-partition)"
    )
    cluster.add_argument("--slurm-flags", nargs="+", default=[], metavar="FLAG=VALUE", help="further flags of sbatch")
    parser.add_argument("--keep-work", action="store_true", help="leave the work directory when the bank is there")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: _run(parse_build_flags(build_parser(), argv)))


def _run(flags: argparse.Namespace) -> None:
    if flags.from_bank is None:
        _build(flags)
        return
    control = control_of(flags)
    if control is None:
        raise ConfigError("--from-bank", "needs --control: it makes control banks only")
    if flags.output is None:
        raise ConfigError("--output", "is missing", remedy="Give the control bank's directory.")
    _refuse_unread(flags)
    build_control(flags.from_bank, control, flags.output)


def _refuse_unread(flags: argparse.Namespace) -> None:
    """A control has the keys and the kind of rows of the bank that it is made from."""
    parser = build_parser()
    unread = [name for name, value in vars(flags).items() if name not in _CONTROL and value != parser.get_default(name)]
    if unread:
        raise ConfigError(
            "--from-bank", "reads no flags that say how a bank is built",
            got=", ".join(f"--{name.replace('_', '-')}" for name in unread),
            expected=", ".join(f"--{name.replace('_', '-')}" for name in _CONTROL), remedy="Leave the others out.",
        )  # fmt: skip


def _build(flags: argparse.Namespace) -> None:
    if flags.estimate:
        estimate_whole(flags)
    elif flags.executor == "local":
        build_whole(flags)
    elif (plan := plan_build(flags)) is not None:
        run_with_datatrove(
            plan.config.work, executor=flags.executor, workers=max(1, plan.config.workers), slurm=_slurm(flags)
        )


def _slurm(flags: argparse.Namespace) -> SlurmOptions | None:
    if flags.executor != "datatrove-slurm":
        return None
    if not flags.slurm_partition:
        raise ConfigError(
            "--slurm-partition", "is missing", remedy="Name the partition to submit to; sinfo lists them."
        )
    return SlurmOptions(
        partition=flags.slurm_partition,
        time=flags.slurm_time,
        encode_gpus=flags.slurm_encode_gpus,
        encode_partition=flags.slurm_encode_partition,
        sbatch_flags=named_prefixes(flags.slurm_flags, "--slurm-flags", "FLAG=VALUE"),
    )


if __name__ == "__main__":
    raise SystemExit(main())
