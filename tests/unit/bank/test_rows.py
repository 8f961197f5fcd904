from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_graft.bank.manifest import rows_name
from megatron_graft.bank.reader import open_bank
from megatron_graft.bank.tensorfile import write_tensors
from megatron_graft.errors import BankFormatError
from tests.helpers.banks import make_bank, random_rows, random_scales, refit_manifest

COUNTS = {(1, 2): 9, (2, 3): 8, (7, 1, 2): 5, (3, 3, 3, 3): 2, (4, 4): 1}
LAYERS = (20, 12)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """Five rows of two layers, each in shards of three and two rows."""
    path = tmp_path_factory.mktemp("banks")
    for row_dtype in ("bfloat16", "int8"):
        make_bank(path / row_dtype, COUNTS, layers=LAYERS, row_dtype=row_dtype, shard_rows=3)
    return path


@pytest.fixture
def banks(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "banks"))


def rows(*shape: int) -> tuple[str, np.ndarray]:
    return "BF16", random_rows(1, int(np.prod(shape))).reshape(shape)


def quantised(*shape: int) -> tuple[str, np.ndarray]:
    return "I8", random_rows(*shape, row_dtype="int8")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "does not hold rows"),
        ({"row": rows(2, 4)}, "does not hold rows"),
        ({"rows": rows(8)}, "does not hold rows"),
        ({"rows": rows(2, 2, 2)}, "does not hold rows"),
        ({"rows": rows(2, 0)}, "does not hold rows"),
        ({"rows": rows(0, 4)}, "does not hold rows"),
        ({"rows": rows(2, 4), "x": rows(2, 4)}, "does not hold the rows that the manifest describes"),
        ({"scales": ("F32", random_scales(2)), "rows": rows(2, 4)}, "does not hold the rows that the manifest"),
        ({"rows": ("F16", np.zeros((2, 4), dtype=np.float16))}, "does not hold the rows that the manifest describes"),
        ({"rows": rows(2, 5)}, "rows of another width than the shards before it .got 5; expected 4"),
        ({"rows": rows(1, 4)}, "further shards: have the wrong number of rows .got 4; expected 5"),
        ({"rows": rows(3, 4)}, "further shards: have the wrong number of rows .got 6; expected 5"),
    ],
)
def test_rows_of_another_form_are_refused(banks, tensors, message):
    write_tensors(banks / "bfloat16" / rows_name(12, 1, 2), tensors)
    refit_manifest(banks / "bfloat16")
    with pytest.raises(BankFormatError, match=message) as caught:
        open_bank(banks / "bfloat16")
    assert "layer-12" in str(caught.value)


@pytest.mark.parametrize(
    "tensors",
    [
        {"rows": quantised(2, 4)},
        {"rows": quantised(2, 4), "scales": ("F32", random_scales(3))},
        {"rows": quantised(2, 4), "scales": ("F32", random_scales(2)[:, None])},
        {"scales": ("F16", np.ones(2, dtype=np.float16)), "rows": quantised(2, 4)},
        {"rows": quantised(2, 4), "scale": ("F32", random_scales(2))},
    ],
    ids=["missing", "too many", "a matrix", "of another type", "of another name"],
)
def test_scales_that_are_missing_or_of_another_form_are_refused(banks, tensors):
    write_tensors(banks / "int8" / rows_name(20, 1, 2), tensors)
    refit_manifest(banks / "int8")
    with pytest.raises(BankFormatError, match="layer-20.*does not hold the rows that the manifest describes"):
        open_bank(banks / "int8")


def test_scales_may_stand_before_the_rows(banks):
    tensors = {"scales": ("F32", random_scales(2)), "rows": quantised(2, 4)}
    write_tensors(banks / "int8" / rows_name(20, 1, 2), tensors)
    refit_manifest(banks / "int8")
    found = open_bank(banks / "int8").float_rows(np.array([3, 4]), (0, 4))
    np.testing.assert_array_equal(found, tensors["rows"][1] * tensors["scales"][1][:, None])


@pytest.mark.parametrize("wrong", [-1.0, np.nan, np.inf])
def test_scales_that_are_none_are_found_by_reading_all(banks, wrong):
    scales = random_scales(2)
    scales[1] = wrong
    write_tensors(banks / "int8" / rows_name(20, 1, 2), {"scales": ("F32", scales), "rows": quantised(2, 4)})
    refit_manifest(banks / "int8")
    open_bank(banks / "int8", verify="sample")
    with pytest.raises(BankFormatError, match=r"layer-20.*has an impossible scale, at row 1 of the file"):
        open_bank(banks / "int8", verify="full")


def test_layers_of_unequal_shards_are_refused(banks):
    write_tensors(banks / "bfloat16" / rows_name(12, 0, 2), {"rows": rows(2, 4)})
    write_tensors(banks / "bfloat16" / rows_name(12, 1, 2), {"rows": rows(3, 4)})
    refit_manifest(banks / "bfloat16")
    with pytest.raises(BankFormatError, match="has rows of layer 12 that are cut into shards in another way"):
        open_bank(banks / "bfloat16")


def test_a_row_dim_that_the_layers_do_not_add_up_to_is_refused(banks):
    refit_manifest(banks / "bfloat16", lambda manifest: manifest["identity"].update(row_dim=9))
    with pytest.raises(BankFormatError, match="has rows of the wrong width .got 8; expected 9"):
        open_bank(banks / "bfloat16")


def _drop_last_shards(manifest: dict[str, Any]) -> None:
    keys, *shards = manifest["identity"]["files"]
    kept = [file for file in shards if "-00000-" in file["name"]]
    for file in kept:
        file["name"] = file["name"].replace("of-00002", "of-00001")
    manifest["identity"]["files"] = [keys, *kept]


def _keep_names(manifest: dict[str, Any]) -> None:
    manifest["identity"]["files"] = [file for file in manifest["identity"]["files"] if "-00001-" not in file["name"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_last_shards, "rows-00000-of-00001.layer-20.safetensors: is missing"),
        (_keep_names, "is the wrong file .got rows-00000-of-00002.layer-20"),
    ],
)
def test_a_wrong_count_of_shards_is_refused(banks, change: Callable[[dict[str, Any]], None], message):
    with pytest.raises(BankFormatError, match=message):
        refit_manifest(banks / "bfloat16", change)  # which itself refuses files that are not all shards
        open_bank(banks / "bfloat16")


def test_all_rows_of_some_shards_are_too_few(banks):
    refit_manifest(banks / "bfloat16", _drop_last_shards)
    for layer in LAYERS:
        (banks / "bfloat16" / rows_name(layer, 0, 2)).rename(banks / "bfloat16" / rows_name(layer))
    refit_manifest(banks / "bfloat16")
    with pytest.raises(BankFormatError, match="have the wrong number of rows .got 3; expected 5"):
        open_bank(banks / "bfloat16")
