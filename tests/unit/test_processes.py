"""A process ends with the one that started it, whenever that one ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_graft.processes import run_while_alive

PROGRAM = """
import multiprocessing, os, sys, time
from megatron_graft.processes import end_with_parent

def child(when: str) -> None:
    if when == "before":  # the child was importing when its parent was killed
        while os.getppid() == multiprocessing.parent_process().pid:
            time.sleep(0.01)
    end_with_parent()
    print("asked", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=child, args=(sys.argv[1],)).start()
    if sys.argv[1] == "after":
        sys.stdin.readline()
    os._exit(0)
"""


@pytest.mark.parametrize(("when", "printed"), [("before", ""), ("after", "asked\n")])
def test_a_child_ends_with_a_parent_that_ends_before_or_after_it_asked(tmp_path: Path, when: str, printed: str) -> None:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, path, when],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdin is not None and process.stdout is not None
    first = process.stdout.readline() if when == "after" else ""
    # The child holds the pipe's other end: it is read to its end only when the child is gone.
    assert first + process.communicate("end\n", timeout=60)[0] == printed


def test_a_command_is_killed_with_the_one_that_runs_it() -> None:
    outer = (
        "from megatron_graft.processes import run_while_alive; run_while_alive(['sh', '-c', 'echo on; exec sleep 600'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "on\n"
    process.kill()
    assert process.communicate(timeout=60)[0] == ""


def test_a_command_that_ends_tells_its_exit_code() -> None:
    assert [run_while_alive(["sh", "-c", f"exit {code}"]) for code in (0, 3)] == [0, 3]
