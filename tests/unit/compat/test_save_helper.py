"""A process started afresh from the training program ignores what ends a run, and ends with who started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

# As Megatron does it: a manager's process by "spawn", from a program that is run by name.
PROGRAM = """
import multiprocessing, signal, sys
def main():
    manager = multiprocessing.get_context("spawn").Manager()
    queue = manager.Queue()
    print(manager._process.pid, flush=True)
    sys.stdin.readline()
    queue.put(1)
    print(queue.get(), flush=True)
if __name__ == "__mp_main__":
    from megatron_graft.compat.save_helper import outlive_signals
    outlive_signals()
if __name__ == "__main__":
    main()
"""


@pytest.fixture
def program(tmp_path: Path) -> subprocess.Popen[str]:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_does_not_end_it(program: subprocess.Popen[str], name: str) -> None:
    assert program.stdout is not None
    os.kill(int(program.stdout.readline()), signal.Signals[name])
    assert program.communicate("go on\n", timeout=60)[0] == "1\n"


def test_it_ends_with_who_started_it(program: subprocess.Popen[str]) -> None:
    assert program.stdout is not None
    helper = int(program.stdout.readline())
    program.kill()
    program.wait()
    deadline = time.monotonic() + 30
    while psutil.pid_exists(helper) and psutil.Process(helper).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
