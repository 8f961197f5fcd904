"""Bad input, from the command line: exit code 2, one line that says where, what and the way out, nothing left."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_graft.data.tokenizer import load_tokenizer
from tests.helpers.bad_input import BROKEN, Printed, broken_bank
from tests.helpers.building import save_llama
from tests.helpers.main_job import SCRIPT, Job, run_script
from tests.helpers.tiny_run import World, make_world
from tests.helpers.tokenizers import small_sentencepiece
from tools import prepare_run

pytestmark = [pytest.mark.slow, pytest.mark.functional]
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Text, tokenizer, data and a bank that belong together."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("donor"))


# ---------------------------------------------------------------- text, given to the example script


def write_missing(directory: Path) -> Path:
    return directory / "text.txt"


def write_empty(directory: Path) -> Path:
    (directory / "text.txt").touch()
    return directory / "text.txt"


def write_blank(directory: Path) -> Path:
    (directory / "text.txt").write_text(" \n\n")
    return directory / "text.txt"


def write_latin_1(directory: Path) -> Path:
    (directory / "text.txt").write_bytes("The naïve whale".encode("latin-1"))
    return directory / "text.txt"


def write_latin_1_line(directory: Path) -> Path:
    (directory / "text.jsonl").write_bytes(b'{"text": "The sea"}\n' + '{"text": "naïve"}\n'.encode("latin-1"))
    return directory / "text.jsonl"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_missing, r"--input \S+/text\.txt: does not exist \(expected a text file\)\. Check the path"),
        (write_empty, r"--input \S+/text\.txt: is empty \(got 0 bytes\)\. Remove it from the input or fill it"),
        (write_blank, r": has no usable document \(got 1 documents, .*; expected at least one text\)"),
        (write_latin_1, r"/text\.txt: is not UTF-8 \(got byte 0xef at offset 6; expected UTF-8 text\)\. Convert"),
        (write_latin_1_line, r"/text\.jsonl:2: is not UTF-8 \(got byte 0xef at offset 12; expected .*\)\. Convert"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_text_that_cannot_be_used_stops_the_script_before_anything_is_made(
    tmp_path: Path, write: Callable[[Path], Path], message: str
) -> None:
    text = write(tmp_path)
    working = tmp_path / "working"
    working.mkdir()
    ended = run_script(Job(directory=working, texts=(text,), foreign=text, donor=tmp_path / "no-donor"), FOREIGN="")
    stage = "error: stage corpus: failed; its own message stands above\n"
    assert stage in ended.output
    Printed(code=ended.code, error=ended.output.replace(stage, "")).require(message)
    assert not (working / "runs").exists()
    assert not [file for file in (working / "work").rglob("*") if file.name != ".lock"]


# ---------------------------------------------------------------- data and banks, given to the example script


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a user points the script at."""

    data: Path
    tokenizer: Path
    bank: Path
    message: str


def no_data(world: World, scratch: Path) -> Given:
    message = rf"--data-path {world.data}\.bin: has no {world.data.name}\.bin\.bin \(expected .*\)\. Leave out \.bin"
    return Given(data=Path(f"{world.data}.bin"), tokenizer=world.tokenizer, bank=world.bank, message=message)


def test_an_evaluation_without_held_out_text_stops_the_script_before_anything_is_made(tmp_path: Path) -> None:
    """The report is about held-out text: a finished run would end in an error."""
    ended = subprocess.run(
        ["bash", SCRIPT], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"EVALUATION": "val=a b=c"}
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: EVALUATION: names no held-out text (got val=a b=c; expected heldout=PREFIX")
    assert not list(tmp_path.iterdir())


def test_weights_of_a_blend_are_no_data_sets(tmp_path: Path) -> None:
    for suffix in ("bin", "idx"):
        (tmp_path / f"a.{suffix}").touch()
    prepare_run._check_data(["3e-1", str(tmp_path / "a"), ".7", str(tmp_path / "a")])


def half_a_bank(world: World, scratch: Path) -> Given:
    bank = broken_bank(world.bank, scratch / "truncated")
    message = BROKEN["truncated"].format(bank=bank)
    return Given(data=world.data, tokenizer=world.tokenizer, bank=bank, message=message)


def anothers_bank(world: World, scratch: Path) -> Given:
    tokenizer = small_sentencepiece(scratch, "other.model", vocab_size=330)
    prints = [load_tokenizer(path).fingerprint for path in (world.tokenizer, tokenizer)]
    message = (
        rf"--bank {world.bank}: was not made for the tokenizer {tokenizer} "
        rf"\(got {prints[0]}; expected {prints[1]}\)\. Give the bank's tokenizer"
    )
    return Given(data=world.data, tokenizer=tokenizer, bank=world.bank, message=message)


@pytest.mark.parametrize("give", [no_data, half_a_bank, anothers_bank])
def test_what_does_not_fit_stops_the_script_before_any_process_is_launched(
    world: World, tmp_path: Path, give: Callable[[World, Path], Given]
) -> None:
    given, working = give(world, tmp_path), tmp_path / "working"
    working.mkdir()
    job = Job(directory=working, texts=(), foreign=tmp_path, donor=tmp_path)
    ended = run_script(
        job,
        TEXT="", FOREIGN="", DATA_PATH=str(given.data), TOKENIZER_MODEL=str(given.tokenizer),
        GRAFT_BANK=str(given.bank),
    )  # fmt: skip
    Printed(code=ended.code, error=ended.output).require(given.message)
    assert not (working / "runs").exists()


# ---------------------------------------------------------------- the bank's own tool


def build_bank(world: World, donor: Path, output: Path, *flags: Any) -> Printed:
    sources = ("--data-prefix", world.data, "--tokenizer-model", world.tokenizer, "--donor", donor)
    return run_build_bank(*sources, "--output", output, *flags)


def run_build_bank(*flags: Any) -> Printed:
    command = [sys.executable, REPOSITORY / "tools" / "build_bank.py", *flags]
    finished = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    return Printed(code=finished.returncode, error=finished.stderr)


def test_a_donor_without_weights_is_refused_before_anything_is_counted(
    world: World, donor: Path, tmp_path: Path
) -> None:
    hollow = tmp_path / "hollow"
    shutil.copytree(donor, hollow, ignore=shutil.ignore_patterns("*.safetensors"))
    refused = build_bank(world, hollow, tmp_path / "bank")
    refused.require(rf"{hollow}: has no weights \(expected \*\.safetensors files\)\. Download the whole model")
    assert os.listdir(tmp_path) == ["hollow"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 32 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(disk)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a small file system is not permitted here; tests/unit/bank has a simulated one")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_build_that_does_not_fit_the_disk_is_refused_before_it_starts(
    world: World, donor: Path, small_disk: Path
) -> None:
    refused = build_bank(world, donor, small_disk / "bank", "--num-rows", 1000, "--donor-layers", 1)
    refused.require(rf"--output {small_disk}/bank: has no room for this build \(got [\d,]+ bytes free; expected about")
    assert os.listdir(small_disk) == []


def test_a_disk_that_is_full_while_a_bank_is_written_leaves_nothing(world: World, small_disk: Path) -> None:
    refused = run_build_bank("--from-bank", world.bank, "--control", "shuffled", "--output", small_disk / "bank")
    refused.require(
        rf"{small_disk}/bank: could not be written: No space left on device \(got [\d,]+ bytes free\)\. Free space or"
    )
    assert os.listdir(small_disk) == []
