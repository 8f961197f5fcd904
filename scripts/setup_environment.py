"""Bring a virtual environment to the state that ``requirements.lock`` describes, once.

    python scripts/setup_environment.py VENV [--python INTERPRETER]

Safe to run at any time and from several checkouts at once: a file lock lets one process in at a time, and a
stamp in the environment (the SHA-256 of requirements.lock) makes every later run return at once. The package
itself is never installed: a checkout is used in place, so several of them may share one environment. Standard
library only, because this runs before anything is installed.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
LOCK = REPOSITORY / "requirements.lock"
STAMP_NAME = ".megatron-graft-requirements"
LOCK_FILE_NAME = ".megatron-graft-setup"
SUPPORTED = ((3, 12), (3, 13))
SECONDS_BETWEEN_LINES = 20.0
LAST_LINES_SHOWN = 25


class SetupError(Exception):
    """Setup cannot go on; the message says why and what to do."""


def say(text: str) -> None:
    """Print one progress line."""
    print(f"setup: {text}", flush=True)


@contextmanager
def only_one_process(environment: Path) -> Iterator[int]:
    """Hold a lock file in the environment; waits while another process sets the same environment up.

    Yields the lock's descriptor, for programs that must not be joined by a second one if this process is killed.
    """
    environment.mkdir(parents=True, exist_ok=True)
    with (environment / LOCK_FILE_NAME).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that is setting up {environment}")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield stream.fileno()


def interpreter_of(environment: Path) -> Path:
    """The environment's interpreter (which may not exist yet)."""
    return environment / "bin" / "python"


def create(environment: Path, python: str) -> None:
    """Create the environment, or complete one whose creation was cut short; refuse one that cannot work."""
    inside = interpreter_of(environment)
    if inside.is_symlink() and not inside.exists():
        raise SetupError(f"{environment}: its Python ({inside.readlink()}) is gone. Remove {environment} and retry.")
    if inside.exists():
        version = _output([str(inside), "-c", "import sys; print(*sys.version_info[:2])"]).split()
        if tuple(map(int, version)) not in SUPPORTED:
            raise SetupError(
                f"{environment}: made with Python {'.'.join(version)}, but 3.12 or 3.13 is needed. "
                "Remove it or choose another with VENV=<dir>."
            )
        if subprocess.run([inside, "-m", "pip", "--version"], capture_output=True).returncode == 0:
            return
    say(f"creating {environment} with {python}")
    finished = subprocess.run([python, "-m", "venv", environment], capture_output=True, text=True)
    if finished.returncode != 0:
        raise SetupError(f"{python} -m venv failed:\n{finished.stdout}{finished.stderr}")


def install(environment: Path, lock: int) -> None:
    """Install every pin of the lock; a line every few seconds, the end of pip's own output on failure."""
    pins = sum(1 for line in LOCK.read_text().splitlines() if "==" in line and not line.startswith("#"))
    say(f"installing {pins} packages (a fresh environment: about 3 GB to fetch, 6 GB on disk)")
    command = [
        str(interpreter_of(environment)),
        "-m",
        "pip",
        "install",
        "--progress-bar",
        "off",
        "--no-compile",  # see compile_packages
    ]
    command += ["--disable-pip-version-check", "--requirement", str(LOCK)]
    started = time.monotonic()
    with tempfile.TemporaryFile("a+") as output:  # appending: our reads do not move where pip writes
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, pass_fds=(lock,)
        )
        while process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_BETWEEN_LINES)
                break
            output.seek(0)
            say(f"{_stage(output.read(), pins)}, {time.monotonic() - started:.0f} s")
        output.seek(0)
        if process.returncode != 0:
            end = "".join(output.readlines()[-LAST_LINES_SHOWN:])
            raise SetupError(f"pip could not install requirements.lock:\n{end}")
    say(f"environment ready in {time.monotonic() - started:.0f} s")


def compile_packages(environment: Path) -> None:
    """Write byte code for all that is installed, on every core; pip would use one.

    Not left to the first import: where ``PYTHONDONTWRITEBYTECODE`` is set, as in many images, every start of every
    process would compile torch and Megatron anew, for 10 s and more. Files that are no Python are passed over.
    """
    say("compiling byte code")
    started = time.monotonic()
    (packages,) = environment.glob("lib/python*/site-packages")
    command = [str(interpreter_of(environment)), "-m", "compileall", "-q", "-j", "0", str(packages)]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    say(f"byte code ready in {time.monotonic() - started:.0f} s")


def _stage(pip_output: str, pins: int) -> str:
    if "Installing collected packages" in pip_output:
        return "unpacking"
    fetched = len(re.findall(r"^(?:Collecting|Requirement already satisfied:) ", pip_output, re.MULTILINE))
    return f"{min(fetched, pins)}/{pins} packages fetched"


def set_up(environment: Path, python: str) -> None:
    """Do what is still missing; nothing if the stamp already names this lock."""
    wanted = hashlib.sha256(LOCK.read_bytes()).hexdigest()
    stamp = environment / STAMP_NAME
    if _stamped(stamp, wanted):
        return
    with only_one_process(environment) as lock:
        if _stamped(stamp, wanted):  # another process did it while we waited
            return
        create(environment, python)
        stamp.unlink(missing_ok=True)  # from here on the environment is neither the old nor the new state
        install(environment, lock)
        compile_packages(environment)
        stamp.write_text(wanted + "\n")


def _stamped(stamp: Path, wanted: str) -> bool:
    return stamp.exists() and stamp.read_text().strip() == wanted and interpreter_of(stamp.parent).exists()


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> int:
    """Parse the command line, set up, turn a :class:`SetupError` into one message and exit code 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("environment", type=Path, help="directory of the virtual environment")
    parser.add_argument("--python", default=sys.executable, help="interpreter a new environment is made with")
    arguments = parser.parse_args()
    os.environ.pop("PYTHONPATH", None)  # pip must see the environment, not this checkout
    try:
        set_up(arguments.environment.absolute(), arguments.python)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
