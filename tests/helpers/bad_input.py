"""How a command refuses bad input, and banks that have something wrong."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_graft.bank.manifest import INDEX_NAME, KEYS_NAME, MANIFEST_NAME
from megatron_graft.commands import EXIT_BAD_INPUT


@dataclass(frozen=True, kw_only=True)
class Printed:
    """How a command ended: its exit code and what it printed, standard error at least."""

    code: int
    error: str

    def require(self, message: str) -> None:
        """Fail unless it ended with one line of bad input that matches."""
        assert self.code == EXIT_BAD_INPUT, self.error[-3000:]
        (line,) = re.findall(r"^error: .*", self.error, re.MULTILINE)
        assert re.search(message, line), line
        assert "Traceback" not in self.error


# What is wrong with a bank, and how it is refused.
BROKEN = {
    "incomplete": r"{bank}: has no bank\.json: it is not a bank, or its build or copy did not finish\. \w+",
    "truncated": r"{bank}/rows\S+: is truncated or was altered \(got \d+ bytes; expected \d+ bytes\)\. \w+",
    "missing keys": r"{bank}/keys\.safetensors: is missing\. \w+",
    "altered": r"{bank}/rows\S+: was altered: .* \(got [0-9a-f]{{64}}; expected [0-9a-f]{{64}}\)\. \w+",
    "missing index": r"{bank}/index\.qbt: is missing\. \w+",
    "newer": r"{bank}/bank\.json: was written by a newer format version \(got 3; expected 2\)\. Update",
    "older": r"{bank}/bank\.json: was written by an older format version \(got 1; expected 2\)\. Rebuild the bank",
}


def broken_bank(sound: Path, directory: Path) -> Path:
    """A copy of a bank with something wrong, named by the directory's name."""
    shutil.copytree(sound, directory)
    rows, manifest = min(directory.glob("rows-*")), directory / MANIFEST_NAME
    data = rows.read_bytes()
    match directory.name:
        case "incomplete":
            manifest.unlink()
        case "truncated":
            rows.write_bytes(data[:-2])
        case "missing keys":
            (directory / KEYS_NAME).unlink()
        case "missing index":
            (directory / INDEX_NAME).unlink()
        case "altered":
            rows.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        case "newer" | "older" as age:
            version = 3 if age == "newer" else 1
            manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": version}))
    return directory
