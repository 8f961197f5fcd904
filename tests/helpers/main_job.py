"""The main job in miniature: tiny text files, a tiny random donor, and the example script run from the shell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.building import make_documents, save_llama
from tests.helpers.ports import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "examples" / "pretrain_graft_moe.sh"
NUM_ROWS, DONOR_LAYER, VOCAB_SIZE = 300, 1, 360
SEQ_LENGTH, GLOBAL_BATCH_SIZE, STEPS = 32, 4, 8
TIMEOUT_SECONDS = 560  # below the limit of a test

# Appended to the script's own flags, over which they win.
# fmt: off
SMALL_FLAGS = (
    "--num-layers", 2, "--hidden-size", 32, "--ffn-hidden-size", 32,
    "--seq-length", SEQ_LENGTH, "--max-position-embeddings", SEQ_LENGTH,
    "--micro-batch-size", 2, "--global-batch-size", GLOBAL_BATCH_SIZE,
    "--train-iters", STEPS, "--log-interval", 2, "--save-interval", 4, "--eval-interval", 4, "--eval-iters", 1,
)
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Job:
    """Where a miniature is run.

    Attributes:
        directory: working directory of the script; its work/ and runs/ come to lie there.
        texts: the user's own text files.
        foreign: text of another domain.
        donor: a causal-LM directory.
    """

    directory: Path
    texts: tuple[Path, ...]
    foreign: Path
    donor: Path

    @property
    def work(self) -> Path:
        """The script's default WORK_DIR."""
        return self.directory / "work"

    def run_directory(self, name: str) -> Path:
        """Where a run of that name lies."""
        return self.directory / "runs" / name

    def variables(self, **more: str) -> dict[str, str]:
        """The environment of the script; ``more`` wins."""
        paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
        return os.environ | {
            "PATH": os.pathsep.join(paths),
            "TEXT": " ".join(map(str, self.texts)),
            "FOREIGN": str(self.foreign),
            "DONOR": str(self.donor),
            "TOKENIZER_VOCAB_SIZE": str(VOCAB_SIZE),
            "BANK_ARGUMENTS": f"--num-rows {NUM_ROWS} --donor-layers {DONOR_LAYER}",
            "GRAFT_LAYERS": "1 2",
            "DEVICE": "cpu",
            "GPUS_PER_NODE": "1",
            "GRAFT_THREADS": "1",
            "MASTER_PORT": str(free_port()),
            **more,
        }


def make_job(inputs: Path, directory: Path) -> Job:
    """Write text (three ``.txt`` files and a ``.jsonl``) and a donor into ``inputs``; make ``directory``."""
    inputs.mkdir(parents=True, exist_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    lines = inputs / "lines.jsonl"
    texts = make_documents(300, seed=1)
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    books = [inputs / f"book-{number}.txt" for number in range(3)]
    for number, book in enumerate(books):
        book.write_text("\n".join(make_documents(30, seed=10 + number)), encoding="utf-8")
    foreign = inputs / "foreign.txt"
    foreign.write_text("\n".join(make_documents(30, seed=20)), encoding="utf-8")
    return Job(directory=directory, texts=(lines, *books), foreign=foreign, donor=save_llama(inputs / "donor"))


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended: its exit code, and all that it and its children printed."""

    code: int
    output: str

    def ok(self) -> Ended:
        """Return self, or fail with the end of the output."""
        if self.code != 0:
            raise AssertionError(f"exit code {self.code}\n{self.output[-6000:]}")
        return self


def run_script(
    job: Job,
    *flags: Any,
    command: Sequence[Any] = ("bash", SCRIPT),
    interrupt: tuple[int, Callable[[], bool]] | None = None,
    environment: dict[str, str] | None = None,
    **variables: str,
) -> Ended:
    """Run the example script with the small flags.

    Args:
        job: where, on what.
        flags: appended after the small ones.
        command: how the script is started.
        interrupt: a signal, and the condition at which the script gets it, once.
        environment: in place of the job's.
        variables: set over the environment.
    """
    words = [str(word) for word in (*command, *SMALL_FLAGS, *flags)]
    log = job.directory / "output.txt"
    with log.open("w") as stream:
        process = subprocess.Popen(
            words,
            cwd=job.directory,
            env=job.variables(**variables) if environment is None else environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait(process, interrupt)
        finally:
            _kill_family(process)
    return Ended(code=process.returncode, output=log.read_text(encoding="utf-8", errors="replace"))


def _wait(process: subprocess.Popen[bytes], interrupt: tuple[int, Callable[[], bool]] | None) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while process.poll() is None:
        if interrupt is not None and interrupt[1]():
            process.send_signal(interrupt[0])
            interrupt = None
        if time.monotonic() > deadline:
            raise TimeoutError(f"not finished after {TIMEOUT_SECONDS} s: {process.args}")
        time.sleep(0.02)


def _kill_family(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the script after a failed test: the ranks lead process groups of their own."""
    if process.poll() is not None:
        return
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=10)
    process.wait()


def read_records(run_directory: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's ``metrics.jsonl``; none if there is no such file yet."""
    path = run_directory / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
