"""A donor's architecture and tokenizer with random weights: the control for what the donor has learnt."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

from megatron_graft.building.donor_libraries import as_donor_error, missing_extra, offline
from megatron_graft.building.fetch import RECORD_NAME, recorded_name
from megatron_graft.errors import DonorError
from megatron_graft.files import directory_in_one_step, write_json_atomically

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", RECORD_NAME)


def make_random_donor(like: Path, seed: int, directory: Path) -> bool:
    """Make ``directory`` a donor that is ``like`` another one in all but its weights.

    Args:
        like: a local Hugging Face causal-LM directory.
        seed: of the weights, drawn as the architecture draws its own before training.
        directory: to create; its weights are bf16.

    Returns:
        True if it was made, False if it was complete already.

    Raises:
        DonorError: ``like`` cannot be read, or ``directory`` exists and holds something else.
        StorageError: it cannot be written.
    """
    record = {"name": f"{recorded_name(like)}-random-{seed}", "like": recorded_name(like), "seed": seed}
    if directory.exists():
        _require_same(record, directory)
        return False
    if not (like / "config.json").is_file():
        raise DonorError(like, "is no donor's directory", expected="config.json and a tokenizer")
    with offline():
        try:
            import torch
            from transformers import AutoConfig, AutoModelForCausalLM
        except ImportError as error:
            raise missing_extra(error) from error
        with as_donor_error(like, "cannot be read by transformers"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(like), dtype=torch.float32)
        with directory_in_one_step(directory) as output:
            shutil.copytree(like, output, ignore=shutil.ignore_patterns(*_WEIGHTS), dirs_exist_ok=True)
            with contextlib.redirect_stderr(io.StringIO()):  # no progress bar for one file
                model.to(torch.bfloat16).save_pretrained(output)
            write_json_atomically(output / RECORD_NAME, record)
    return True


def _require_same(record: dict[str, object], directory: Path) -> None:
    try:
        found = json.loads((directory / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found != record:
        raise DonorError(
            directory, "exists and is another donor", got=found, expected=record,
            remedy="Remove the directory or choose another one.",
        )  # fmt: skip
