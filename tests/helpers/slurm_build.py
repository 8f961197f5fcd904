"""A small build for a cluster, and tasks of it that stop in the middle, so that a test can kill them there."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_graft.data.tokenizer import load_tokenizer
from tests.helpers.building import make_documents, save_llama, write_data_set

REPOSITORY = Path(__file__).resolve().parents[2]

# Python runs this at its start, in every process that finds it on PYTHONPATH. A task named in GRAFT_TEST_STOPS does
# all of its work and then, before its result appears, waits to be killed. Started again, it does not.
STOPPER = """
import os, pathlib, time

notes, rename = pathlib.Path(__file__).parent, os.rename
with (notes / "tmpdirs").open("a") as stream:
    stream.write(os.environ.get("TMPDIR", "none") + "\\n")


def stop_or_rename(source, target, **options):
    name = "-".join(pathlib.Path(target).parts[-2:])
    reached = notes / ("reached-" + name)
    if name in os.environ.get("GRAFT_TEST_STOPS", "").split() and not reached.exists():
        reached.write_text(str(os.getpid()) + "\\n")
        time.sleep(600)
    rename(source, target, **options)


os.rename = stop_or_rename
"""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A donor, which is its own tokenizer, and a data set."""

    donor: Path
    prefix: str

    def flags(self, output: Path, *more: object) -> list[str]:
        """Flags of ``tools/build_bank.py``; the bank does not depend on what work is cut into."""
        fixed = ["--data-prefix", self.prefix, "--tokenizer-model", self.donor / "tokenizer.json"]
        fixed += ["--donor", self.donor, "--donor-layers", 1, 2, "--num-rows", 300, "--threads", 1, "--workers", 1]
        return [str(word) for word in (*fixed, "--output", output, *more)]


def make_inputs(directory: Path) -> Inputs:
    """Write donor and data set below ``directory``."""
    donor = save_llama(directory / "donor")
    tokenizer = load_tokenizer(donor / "tokenizer.json")
    documents = [[*tokenizer.encode(text), tokenizer.eod] for text in make_documents(200)]
    return Inputs(donor=donor, prefix=write_data_set(directory / "data", documents))


def run_tool(name: str, *arguments: object) -> str:
    """Run a command of ``tools/``; return what it printed, or fail with it."""
    command = [sys.executable, REPOSITORY / "tools" / f"{name}.py", *arguments]
    finished = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment())
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def environment() -> dict[str, str]:
    """This process's environment with its Python first on PATH."""
    return os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a bank."""
    return {file.name: file.read_bytes() for file in directory.iterdir()}
