"""Trains, evaluates and records the runs of an experiment, some side by side. Cut off, it goes on where it was.

A run has three stages. *Training* is the example script's, which resumes from its checkpoints. *Evaluation* is that of
tools/evaluate.py. The *record* is one line appended to the experiment's file; a run that has one is finished, and its
checkpoints are removed unless they are to be kept. Any number of processes may work on one experiment: a run that
another one has in hand is passed over.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_graft.errors import ConfigError, GraftError
from megatron_graft.experiments.experiment import Experiment
from megatron_graft.experiments.programs import code_version, tool_command, training_script
from megatron_graft.experiments.record import PLAN_FILE, append_record, make_record
from megatron_graft.experiments.records import finished_runs
from megatron_graft.experiments.runs import Places, PlannedRun, changed_flags
from megatron_graft.files import make_directory, storage_errors, take_lock, write_json_atomically
from megatron_graft.log import format_seconds, get_logger
from megatron_graft.reporting.run_files import read_json

_LOG, _LOCK = "log.txt", ".lock"
_LAST_LINES = 12


class RunFailed(GraftError):
    """A run's training or evaluation ended with an error."""


class Stopped(Exception):
    """The runner was asked to stop."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What runs may use.

    Attributes:
        jobs: runs side by side.
        processes: of each run's training.
        threads: of each process.
        keep_checkpoints: leave them after a run is recorded.
    """

    jobs: int
    processes: int
    threads: int
    keep_checkpoints: bool = False


class Runner:
    """Works on the runs of one experiment.

    Args:
        experiment: whose.
        places: where its files lie.
        texts: names of the texts to evaluate.
        resources: see :class:`Resources`.
    """

    def __init__(
        self,
        experiment: Experiment,
        places: Places,
        texts: Sequence[str],
        resources: Resources,
    ) -> None:
        self.experiment, self.places, self.texts, self.resources = experiment, places, texts, resources
        self._children: set[subprocess.Popen[bytes]] = set()
        self._stopping = threading.Event()
        self._done = self._seconds = 0.0

    def work_on(self, runs: Sequence[PlannedRun]) -> list[str]:
        """Finish the given runs; return the messages of those that failed. A failure stops no other run."""
        open_runs = [run for run in runs if not self._is_finished(run)]
        get_logger().info("%d of %d runs to finish, %d at a time", len(open_runs), len(runs), self.resources.jobs)
        failures: list[str] = []

        def one(run: PlannedRun) -> None:
            try:
                self._finish(run, len(open_runs))
            except Stopped:
                return
            except GraftError as error:
                failure = str(error)
            except OSError as error:  # a disk that is full, a file that may not be read
                failure = f"{run.name}: {error}"
            else:
                return
            get_logger().error("%s", failure)
            failures.append(failure)

        with ThreadPoolExecutor(self.resources.jobs) as pool:
            list(pool.map(one, open_runs))
        return failures

    @property
    def stopped(self) -> bool:
        """Whether it was asked to stop."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """End what runs; training saves a checkpoint first. Safe to call from a signal handler."""
        self._stopping.set()
        for child in list(self._children):
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)

    def _finish(self, run: PlannedRun, total: int) -> None:
        directory = self.places.runs / run.name
        with _in_hand(directory) as lock:
            if lock is None:
                get_logger().info("%s: another process works on it", run.name)
                return
            if self.stopped or self._is_finished(run):
                return
            started = time.monotonic()
            self._keep_plan(run, directory)
            if not _is_trained(directory, run.arm.steps):
                self._train(run, directory, lock)
            self._evaluate(run, directory, lock)
            append_record(self.places.records, make_record(self.experiment, run, self.places))
            if not self.resources.keep_checkpoints:
                self._drop_checkpoints(directory)
        self._report(run, time.monotonic() - started, total)

    def _is_finished(self, run: PlannedRun) -> bool:
        return (run.arm.name, run.seed) in finished_runs(self.places.records, self.experiment)

    def _keep_plan(self, run: PlannedRun, directory: Path) -> None:
        """Write down what a run is when it is begun; refuse to go on with it as another one."""
        path, command, bank = directory / PLAN_FILE, run.command(self.experiment), run.bank_plan(self.experiment)
        if not path.is_file():
            plan = {"arm": run.arm.name, "seed": run.seed, "command": command, "bank_plan": bank, **code_version()}
            write_json_atomically(path, plan)
            return
        plan = read_json(path, f"Remove {directory} to train the run anew.")
        if plan.get("bank_plan", bank) != bank:
            raise ConfigError(
                directory, "was begun with a bank made otherwise than the experiment asks for", got=plan["bank_plan"],
                expected=bank, remedy="Remove the directory to train the run anew, or give the arm its bank back.",
            )  # fmt: skip
        begun = plan.get("command", "")
        changed = changed_flags(begun, command)
        if changed:
            raise ConfigError(
                directory, f"was begun with other flags than the experiment asks for: {', '.join(changed)}", got=begun,
                expected=command, remedy="Remove the directory to train the run anew, or give the arm its flags back.",
            )  # fmt: skip

    def _train(self, run: PlannedRun, directory: Path, lock: int) -> None:
        environment = run.environment(
            self.places, processes=self.resources.processes, threads=self.resources.threads, port=_free_port()
        )
        command = ["bash", str(training_script()), *run.flags(self.experiment, self.places)]
        self._call(run, "training", command, environment, lock)

    def _evaluate(self, run: PlannedRun, directory: Path, lock: int) -> None:
        command = [*tool_command("evaluate"), str(directory), "--if-finished", "--data"]
        command += [f"{text}={self.places.data(text)}" for text in self.texts]
        plan, bank = self.experiment.evaluation, run.arm.bank
        if plan.classify_by and not bank:
            command += ["--classify-by", str(self.places.bank(plan.classify_by))]
        if plan.other_bank and self.experiment.reads_like(run.arm, plan.other_bank):
            command += ["--other-bank", f"{plan.other_bank}={self.places.bank(plan.other_bank)}"]
        command += ["--memory-off", *plan.memory_off] if plan.memory_off else []
        environment = os.environ | {"OMP_NUM_THREADS": str(self.resources.threads)}
        self._call(run, "evaluation", command, environment, lock)

    def _call(self, run: PlannedRun, stage: str, command: list[str], environment: dict[str, str], lock: int) -> None:
        """Run a command with its output in the run's log; an interrupt of this process reaches it through us only.

        It holds the run's lock as well: should this process be killed, nobody else begins what still goes on.
        """
        if self._stopping.is_set():
            raise Stopped
        path = self.places.runs / run.name / _LOG
        with path.open("ab") as log:
            child = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True,
                stdin=subprocess.DEVNULL, pass_fds=(lock,),
            )  # fmt: skip
            self._children.add(child)
            if self._stopping.is_set():  # since we looked
                child.send_signal(signal.SIGTERM)
            try:
                status = child.wait()
            finally:
                self._children.discard(child)
        if self._stopping.is_set():
            raise Stopped
        if status != 0:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
            raise RunFailed(
                run.name, f"its {stage} ended with exit code {status}", got="\n".join(["", *lines, ""]),
                remedy=f"The whole log is {path}; give the same command again to go on.",
            )  # fmt: skip

    def _drop_checkpoints(self, directory: Path) -> None:
        for name in ("checkpoints", "index-cache"):
            shutil.rmtree(directory / name, ignore_errors=True)

    def _report(self, run: PlannedRun, seconds: float, total: int) -> None:
        self._done, self._seconds = self._done + 1, self._seconds + seconds
        left = (total - self._done) * self._seconds / self._done / self.resources.jobs
        get_logger().info(
            "%s: finished in %s (%d/%d, ETA %s)", run.name, format_seconds(seconds), self._done, total,
            format_seconds(left),
        )  # fmt: skip


@contextlib.contextmanager
def _in_hand(directory: Path) -> Iterator[int | None]:
    """The descriptor of a lock by which this process alone may work on a run until the block ends; else None."""
    make_directory(directory)
    with storage_errors(directory):
        file = (directory / _LOCK).open("w")
    with file as lock:
        yield lock.fileno() if take_lock(lock.fileno(), directory) else None


def _is_trained(directory: Path, steps: int) -> bool:
    newest = directory / "checkpoints" / "latest_checkpointed_iteration.txt"
    return newest.is_file() and newest.read_text().strip() == str(steps)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])
