"""Which data sets a run reads, by whichever flag they are named."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_graft.errors import ConfigError
from megatron_graft.training.bank_setup import data_prefixes

NAMES = (
    "data_path", "train_data_path", "valid_data_path", "test_data_path", "data_args_path", "per_split_data_args_path",
)  # fmt: skip


def prefixes(**given: Any) -> list[str]:
    return data_prefixes(argparse.Namespace(**(dict.fromkeys(NAMES) | given)))


def test_blends_and_splits_name_them() -> None:
    assert prefixes(data_path=["0.3", "a", "0.7", "b"]) == ["a", "b"]
    assert prefixes(train_data_path=["a"], valid_data_path=["a", "c"]) == ["a", "c"]


def test_so_does_a_file_of_a_blend(tmp_path: Path) -> None:
    (tmp_path / "blend").write_text("0.3 a\n0.7 b\n")
    assert prefixes(data_args_path=str(tmp_path / "blend")) == ["a", "b"]


def test_and_one_of_a_blend_for_each_split(tmp_path: Path) -> None:
    blends = {"train": "1 a 2 b", "valid": ["c"], "test": None}
    (tmp_path / "blends.json").write_text(json.dumps(blends))
    assert prefixes(per_split_data_args_path=str(tmp_path / "blends.json")) == ["a", "b", "c"]


@pytest.mark.parametrize("flag", ["--data-args-path", "--per-split-data-args-path"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, flag: str) -> None:
    with pytest.raises(ConfigError, match=f"^{flag}: cannot be read.*missing"):
        prefixes(**{flag.removeprefix("--").replace("-", "_"): str(tmp_path / "missing")})
