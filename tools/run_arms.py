"""Train, evaluate and record the runs of an experiment of matched arms. Give the same command again to go on.

The experiment is a YAML file: examples/arms/matched_arms.yaml is one, megatron_graft/experiments/experiment.py says
what may stand in it. Each run is an ordinary training run of examples/pretrain_graft_moe.sh. On Slurm, the tasks of an
array take a run each with --task (examples/slurm/run_arms.sbatch).
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_graft.commands import run_command
from megatron_graft.errors import ConfigError
from megatron_graft.experiments.experiment import Experiment, load_experiment
from megatron_graft.experiments.prepare import prepare
from megatron_graft.experiments.records import finished_runs
from megatron_graft.experiments.runner import Resources, Runner
from megatron_graft.experiments.runs import Places, PlannedRun, plan_runs
from megatron_graft.processes import available_processors

EXIT_RUNS_FAILED, EXIT_STOPPED = 1, 128 + signal.SIGTERM


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, metavar="YAML", help="the experiment")
    what = parser.add_argument_group("what to run")
    what.add_argument("--only", nargs="+", default=[], metavar="NAME",
                      help="runs, arms or groups; * and ? match (default: all)")  # fmt: skip
    what.add_argument("--list", action="store_true", help="only print the runs, with their numbers and state")
    what.add_argument("--task", type=int, metavar="N", help="only the run of this number in --list (a Slurm array's)")
    what.add_argument("--prepare-only", action="store_true", help="stop when texts, data and banks are there")
    where = parser.add_argument_group("where")
    where.add_argument("--work-dir", type=Path, metavar="DIR", help="texts, data, banks (default: work/NAME)")
    where.add_argument("--runs-dir", type=Path, metavar="DIR", help="the runs (default: runs/NAME)")
    where.add_argument("--records", type=Path, metavar="FILE",
                       help="JSON lines, one for each finished run (default: RUNS/records.jsonl)")  # fmt: skip
    how = parser.add_argument_group("how")
    how.add_argument("--jobs", type=int, default=1, metavar="N", help="runs side by side (default: %(default)s)")
    how.add_argument("--processes", type=int, default=1, metavar="N",
                     help="of each run's training (default: %(default)s)")  # fmt: skip
    how.add_argument("--threads", type=int, metavar="N",
                     help="of each process (default: as many as there are processors for)")  # fmt: skip
    how.add_argument("--keep-checkpoints", action="store_true", help="leave them when a run is recorded")
    arguments = parser.parse_args(argv)
    for flag in ("jobs", "processes", "threads"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            parser.error(f"--{flag} {value}: expected at least 1")
    return arguments


def _places(arguments: argparse.Namespace, name: str) -> Places:
    runs = arguments.runs_dir or Path("runs") / name
    work = arguments.work_dir or Path("work") / name
    return Places(work=work.absolute(), runs=runs.absolute(), records=arguments.records or runs / "records.jsonl")


def _chosen(arguments: argparse.Namespace, experiment: Experiment) -> list[PlannedRun]:
    runs = plan_runs(experiment, arguments.only)
    if arguments.task is None:
        return runs
    if not 0 <= arguments.task < len(runs):
        raise ConfigError("--task", "is the number of no run", got=arguments.task, expected=f"0 to {len(runs) - 1}")
    return [runs[arguments.task]]


def _print_list(runs: list[PlannedRun], places: Places, finished: set[tuple[str, int]]) -> None:
    for number, run in enumerate(runs):
        begun = (places.runs / run.name).is_dir()
        state = "finished" if (run.arm.name, run.seed) in finished else "begun" if begun else "to do"
        print(f"{number:4} {run.name:32} {run.arm.group:8} {state:9} {run.arm.label}")


def _resources(arguments: argparse.Namespace) -> Resources:
    share = available_processors() // (arguments.jobs * arguments.processes)
    return Resources(
        jobs=arguments.jobs,
        processes=arguments.processes,
        threads=arguments.threads or max(1, share),
        keep_checkpoints=arguments.keep_checkpoints,
    )


def _work(arguments: argparse.Namespace) -> int:
    experiment = load_experiment(arguments.experiment)
    places = _places(arguments, experiment.name)
    runs = _chosen(arguments, experiment)
    finished = finished_runs(places.records, experiment)
    if arguments.list:
        _print_list(runs, places, finished)
        return 0
    if all((run.arm.name, run.seed) in finished for run in runs):
        print(f"{places.records}: all {len(runs)} runs are finished")
        return 0
    texts = prepare(experiment, places, runs)
    if arguments.prepare_only:
        return 0
    runner = Runner(experiment, places, texts, _resources(arguments))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: runner.stop())
    failures = runner.work_on(runs)
    return EXIT_STOPPED if runner.stopped else EXIT_RUNS_FAILED if failures else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = parse_arguments(argv)
    statuses: list[int] = []
    return run_command(lambda: statuses.append(_work(arguments))) or statuses[0]


if __name__ == "__main__":
    raise SystemExit(main())
