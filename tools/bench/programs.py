"""The bench's C++ programs, the keys they make, and the arrays they leave on disk."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_graft.bank.keys import BankKeys
from megatron_graft.errors import PlatformError
from megatron_graft.log import get_logger

CHECKOUT = Path(__file__).resolve().parents[2]
MAX_ORDER = 5
# Part of the name of a directory of keys: raised whenever the same numbers would give other keys.
_RECIPE = 1


@dataclass(frozen=True, kw_only=True)
class KeysOnDisk:
    """Raw arrays of a bank's keys and of held-out text: see csrc/bench/make_keys.cpp.

    Attributes:
        directory: holds ids.i32, orders.u8, counts.u32, text.i32 and made.json.
        made: what made.json says.
    """

    directory: Path
    made: dict[str, Any]

    def keys(self, rows: int | None = None) -> BankKeys:
        """The first ``rows`` keys (default: all), in a bank's order."""
        ids = np.memmap(self.directory / "ids.i32", dtype=np.int32, mode="r").reshape(-1, self.made["max_order"])
        orders = np.memmap(self.directory / "orders.u8", dtype=np.uint8, mode="r")
        counts = np.memmap(self.directory / "counts.u32", dtype=np.uint32, mode="r")
        return BankKeys(
            key_ids=np.ascontiguousarray(ids[:rows]),
            key_orders=np.ascontiguousarray(orders[:rows]),
            key_counts=counts[:rows].astype(np.int64),
        )

    def text(self, tokens: int) -> np.ndarray:
        """int32 ``[tokens]`` of held-out text."""
        return np.fromfile(self.directory / "text.i32", dtype=np.int32, count=tokens)


def build_programs(directory: Path, jobs: int) -> Path:
    """Compile what has changed; return the directory of the programs.

    Raises:
        PlatformError: the compiler refused.
    """
    command = ["make", "--silent", "-C", str(CHECKOUT / "csrc" / "bench"), f"-j{jobs}", f"BUILD={directory.absolute()}"]
    if subprocess.run(command, check=False).returncode != 0:
        raise PlatformError("csrc/bench", "could not be compiled; the compiler's own message stands above")
    return directory


def run_program(program: Path, **flags: object) -> dict[str, Any]:
    """Run a program with ``--flag value`` pairs; return the JSON object that it prints.

    Raises:
        PlatformError: it failed; what it had to say went to stderr.
    """
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    finished = subprocess.run([program, *words], stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode != 0:
        raise PlatformError(program, "failed; its own message stands above", got=f"exit {finished.returncode}")
    result: dict[str, Any] = json.loads(finished.stdout)
    return result


def make_keys(
    programs: Path, data: Path, *, tokens: int, vocab_size: int, held_out_tokens: int, threads: int
) -> KeysOnDisk:
    """Keys counted over synthetic text, at least twice each; made once and kept below ``data``."""
    name = f"text{_RECIPE}-vocab-{vocab_size}-tokens-{tokens}-{held_out_tokens}"
    directory = data / name
    if not (directory / "made.json").is_file():
        get_logger().info("making %s", name)
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        made = run_program(
            programs / "make_keys", output=directory, tokens=tokens, vocab_size=vocab_size,
            held_out_tokens=held_out_tokens, max_order=MAX_ORDER, threads=threads,
        )  # fmt: skip
        (directory / "made.json").write_text(json.dumps(made))
    return KeysOnDisk(directory=directory, made=json.loads((directory / "made.json").read_text()))


def bench_lookup(programs: Path, keys: KeysOnDisk, **flags: object) -> dict[str, Any]:
    """Run the lookup bench over ``keys``; see csrc/bench/bench_lookup.cpp for what it prints."""
    made = keys.made
    return run_program(
        programs / "bench_lookup", data=keys.directory, index=keys.directory / "index.qbt", eod=made["eod"],
        max_order=made["max_order"], vocab_size=made["vocab_size"], **flags,
    )  # fmt: skip
