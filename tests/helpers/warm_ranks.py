"""Ranks of a run, forked from a process that has everything imported: a start costs a tenth of a fresh interpreter's.

    WarmRanks().run(module, argv, ranks=2, environment={...}, stdout=path, stderr=path, kill_when=...)

A rank is what ``python -m module`` under torchrun would be: a process that leads a session of its own, with torchrun's
environment, ``__main__``, atexit and exit code. If one fails, the others are killed. The forking process has called
``cpu.install()`` and imported Megatron and this package; nothing else has happened in it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from megatron_graft.processes import end_with_parent
from tests.helpers.ports import free_port

_POLL_SECONDS = 0.02
_PRELOADED = (
    "megatron.core.tokenizers.text.text_tokenizer",  # brings transformers along
    "megatron_graft.training.evaluate_run",
    "torch.distributed.checkpoint",
)


class WarmRanks:
    """The forking process, started by the first run, ended with this one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def run(
        self,
        module: str,
        argv: Sequence[str],
        *,
        ranks: int,
        environment: Mapping[str, str],
        stdout: Path,
        stderr: Path,
        kill_when: Callable[[], bool],
        timeout: float,
    ) -> int:
        """Run a module as so many ranks; return 0, or the exit code of the first that failed (1 of several).

        Raises:
            TimeoutError: they had not ended in time; they are killed.
        """
        asked = {
            "module": module, "argv": list(argv), "ranks": ranks, "environment": dict(environment),
            "stdout": str(stdout), "stderr": str(stderr), "port": free_port() if ranks > 1 else 0,
        }  # fmt: skip
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(asked).encode() + b"\n")
        pids: list[int] = json.loads(process.stdout.readline())
        deadline = time.monotonic() + timeout
        while not select.select([process.stdout], [], [], _POLL_SECONDS)[0]:
            if (late := time.monotonic() > deadline) or kill_when():
                _kill(pids)
                code = json.loads(process.stdout.readline())
                if late:
                    raise TimeoutError(f"not finished after {timeout} s: {module} {' '.join(argv)}")
                return int(code)
        return int(json.loads(process.stdout.readline()))

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-u", "-m", "tests.helpers.warm_ranks"]
            # Without a buffer: select() does not see an answer that a read of the one before has put there.
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        return self._process


def _kill(pids: Sequence[int]) -> None:
    """SIGKILL to ranks and all below them: savers lead process groups of their own."""
    family = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank = psutil.Process(pid)
            family += [rank, *rank.children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGKILL)


def _serve() -> None:
    """Import, then fork the ranks of each request and tell how they ended. Returns in a rank, to become it."""
    end_with_parent(os.getppid())
    from megatron_graft.compat import cpu

    cpu.install()
    for module in _PRELOADED:
        importlib.import_module(module)
    gc.freeze()  # pages that the collector does not touch stay shared
    answers, server = os.fdopen(os.dup(1), "w"), os.getpid()
    for line in sys.stdin:
        asked = json.loads(line)
        pids = []
        for rank in range(asked["ranks"]):
            if (pid := os.fork()) == 0:
                end_with_parent(server)
                answers.close()
                _become(asked, rank)
            pids.append(pid)
        print(json.dumps(pids), file=answers, flush=True)
        print(_ended(pids), file=answers, flush=True)


def _ended(pids: list[int]) -> int:
    left, code = set(pids), 0
    while left:
        pid, status = os.wait()
        left.discard(pid)
        if status and not code:
            code = os.waitstatus_to_exitcode(status) if len(pids) == 1 else 1
            _kill(list(left))
    return code


def _become(asked: dict[str, Any], rank: int) -> None:
    """Make this process a rank, run the module, exit."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for target, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), target)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.update(asked["environment"])
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(asked["ranks"]), LOCAL_WORLD_SIZE=str(asked["ranks"]),
        MASTER_ADDR="localhost", MASTER_PORT=str(asked["port"]),
    )  # fmt: skip
    sys.argv = [asked["module"], *asked["argv"]]
    runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
    sys.exit(0)


if __name__ == "__main__":
    _serve()
