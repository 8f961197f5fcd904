"""Bad input, from the command line: exit code 2, one line that says where, what and the way out, nothing left."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_graft.bank.manifest import KEYS_NAME, MANIFEST_NAME
from megatron_graft.bank.reader import open_bank
from megatron_graft.commands import EXIT_BAD_INPUT
from megatron_graft.data.preprocess import dataset_prefix, preprocess
from megatron_graft.data.tokenizer import load_tokenizer
from megatron_graft.errors import BankError
from tests.helpers.building import save_llama
from tests.helpers.main_job import Job, run_script
from tests.helpers.tiny_run import World, make_world
from tests.helpers.tokenizers import SENTENCES, small_sentencepiece

pytestmark = [pytest.mark.slow, pytest.mark.functional]
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Text, tokenizer, data and a bank that belong together."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("donor"))


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
    command = [sys.executable, REPOSITORY / "tools" / "build_bank.py", "--data-prefix", world.data]
    command += ["--tokenizer-model", world.tokenizer, "--donor", donor, "--output", output, *flags]
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


def test_a_disk_that_is_full_while_the_bank_is_written_leaves_nothing(
    world: World, donor: Path, small_disk: Path
) -> None:
    refused = build_bank(world, donor, small_disk / "bank", "--num-rows", 1000, "--donor-layers", 1)
    refused.require(
        rf"{small_disk}/bank: could not be written: No space left on device \(got [\d,]+ bytes free\)\. Free space or"
    )
    assert os.listdir(small_disk) == []


# ---------------------------------------------------------------- the training entry point

# One process for all: it imports megatron once, then runs the entry point's main() on one command line after the other.
# What is let through is stopped where training would begin.
ENTRY_POINT = """
import contextlib, io, json, os, sys, traceback
from pathlib import Path

result = Path(sys.argv[1])
from megatron_graft.training import pretrain as entry
from megatron_graft.compat import cpu

cpu.install()
from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
from megatron.training.global_vars import destroy_global_vars
from megatron_graft.training import run

def let_through(*args):
    raise SystemExit(77)

run.pretrain = let_through
printed = {}
for name, case in json.load(sys.stdin).items():
    destroy_global_vars()
    unset_num_microbatches_calculator()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=case["processes"])
    sys.argv = ["pretrain", *case["flags"]]
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = entry.main()
        except SystemExit as end:
            code = end.code
        except BaseException:
            code = traceback.format_exc()
    printed[name] = {"code": code, "error": error.getvalue()}
result.write_text(json.dumps(printed))
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command line of the entry point, and what it is to say.

    Attributes:
        flags: after those of a sound run without memory.
        message: pattern of the line; None if it must be let through.
        processes: the run's size.
    """

    flags: tuple[Any, ...]
    message: str | None
    processes: int = 1


def cases(world: World, scratch: Path) -> dict[str, Case]:
    """Every case by name; banks and data that have something wrong are made in ``scratch``."""
    memory = ("--graft-bank", world.bank, "--graft-layers", 2)
    with_bank = {name: broken_bank(world.bank, scratch / name) for name in BROKEN}
    return {
        "sound": Case(flags=memory, message=None),
        "sound, stock": Case(flags=(), message=None),
        "other tokenizer": other_tokenizer(world, scratch),
        "other data": other_data(world, scratch),
        **{
            name: Case(
                flags=("--graft-bank", bank, "--graft-layers", 2, "--graft-verify-bank", "full"),
                message=BROKEN[name].format(bank=re.escape(str(bank))),
            )
            for name, bank in with_bank.items()
        },
        "no bank": Case(
            flags=("--graft-bank", scratch / "nowhere", "--graft-layers", 2),
            message=rf"{scratch}/nowhere: is not a directory \(expected a bank directory\)\. Check the path",
        ),
        "layer outside": Case(
            flags=("--graft-bank", world.bank, "--graft-layers", 2, 5),
            message=r"--graft-layers: names a layer that the model does not have.*\(got \[2, 5\]; "
            r"expected distinct numbers from 1 to --num-layers 4\)\. Choose",
        ),
        "short sequence": Case(
            flags=(*memory, "--seq-length", 3, "--max-position-embeddings", 3),
            message=r"--seq-length: is shorter than the bank's longest .* \(got 3; expected at least 4\)\. Lengthen",
        ),
        "tensor parallel": Case(
            flags=(*memory, "--tensor-model-parallel-size", 2),
            message=r"--tensor-model-parallel-size: .* memory sites need --sequence-parallel with it \(got 2\)\. Leave",
            processes=2,
        ),
        "tensor parallel, sound": Case(
            flags=(*memory, "--tensor-model-parallel-size", 2, "--sequence-parallel"), message=None, processes=2
        ),
        "virtual pipeline": Case(
            flags=(*memory, "--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 1),
            message=r"--virtual-pipeline-model-parallel-size: .* \(--num-layers-per-virtual-pipeline-stage, .*\) "
            r"have no memory sites yet \(got 2\)\. Leave",
            processes=2,
        ),
        "other loader": Case(
            flags=("--dataloader-type", "cyclic"),
            message=r"--dataloader-type: is not supported here: .* \(got cyclic\)\. Leave",
        ),
    }


BROKEN = {
    "incomplete": r"{bank}: has no bank\.json: it is not a bank, or its build or copy did not finish\. \w+",
    "truncated": r"{bank}/rows\S+: is truncated or was altered \(got \d+ bytes; expected \d+ bytes\)\. \w+",
    "missing keys": r"{bank}/keys\.safetensors: is missing\. \w+",
    "altered": r"{bank}/rows\S+: was altered: .* \(got [0-9a-f]{{64}}; expected [0-9a-f]{{64}}\)\. \w+",
    "newer": r"{bank}/bank\.json: was written by a newer format version \(got 2; expected at most 1\)\. Update",
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
        case "altered":
            rows.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        case "newer":
            manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 2}))
    return directory


def other_tokenizer(world: World, scratch: Path) -> Case:
    """The run's tokenizer is not the bank's."""
    other = load_tokenizer(small_sentencepiece(scratch, "other.model", vocab_size=330))
    ours = load_tokenizer(world.tokenizer)
    return Case(
        flags=("--graft-bank", world.bank, "--graft-layers", 2, "--tokenizer-model", other.path),
        message=rf"--tokenizer-model {other.path}: is not the tokenizer of the bank {world.bank} "
        rf"\(got {other.fingerprint}; expected {ours.fingerprint}\)\. Use the bank's tokenizer",
    )


def other_data(world: World, scratch: Path) -> Case:
    """The run's tokenizer is the bank's, but the data were made by another."""
    other = load_tokenizer(small_sentencepiece(scratch, "another.model", vocab_size=340))
    text = scratch / "text.jsonl"
    text.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in SENTENCES))
    preprocess([text], scratch / "other", other)
    prefix, ours = dataset_prefix(scratch / "other"), load_tokenizer(world.tokenizer)
    return Case(
        flags=("--graft-bank", world.bank, "--graft-layers", 2, "--data-path", prefix),
        message=rf"data set {prefix}: was tokenised by another tokenizer than the bank {world.bank} "
        rf"\(got {other.fingerprint}; expected {ours.fingerprint}\)\. Tokenise the data again",
    )


@pytest.fixture(scope="module")
def all_cases(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return cases(world, tmp_path_factory.mktemp("cases"))


@pytest.fixture(scope="module")
def printed(world: World, all_cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the entry point made of each case."""
    scratch = tmp_path_factory.mktemp("entry")
    common = [*world.flags(), "--train-iters", 2, "--save", scratch / "checkpoints", "--graft-run-dir", scratch / "run"]
    commands = {
        name: {"flags": [str(flag) for flag in [*common, *case.flags]], "processes": str(case.processes)}
        for name, case in all_cases.items()
    }
    result = scratch / "printed.json"
    finished = subprocess.run(
        [sys.executable, "-c", ENTRY_POINT, str(result)],
        input=json.dumps(commands),
        env=os.environ | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"},  # megatron wants it under tensor parallelism
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert not (scratch / "checkpoints").exists()
    return json.loads(result.read_text())


NAMES = (
    "other tokenizer", "other data", *BROKEN, "no bank", "layer outside", "short sequence", "tensor parallel",
    "virtual pipeline", "other loader",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_entry_point_refuses(name: str, all_cases: dict[str, Case], printed: dict[str, Any]) -> None:
    message = all_cases[name].message
    assert message is not None
    Printed(code=printed[name]["code"], error=printed[name]["error"]).require(message)


@pytest.mark.parametrize("name", ["sound", "sound, stock", "tensor parallel, sound"])
def test_what_differs_from_it_by_the_fault_alone_is_let_through(name: str, printed: dict[str, Any]) -> None:
    assert printed[name]["code"] == 77, printed[name]["error"][-3000:]


def test_every_case_is_tested(all_cases: dict[str, Case]) -> None:
    assert {name for name, case in all_cases.items() if case.message is not None} == set(NAMES)


def test_a_broken_bank_is_opened_by_nothing_else_either(all_cases: dict[str, Case]) -> None:
    for name in BROKEN:
        with pytest.raises(BankError):
            open_bank(all_cases[name].flags[1], verify="full")


def test_the_command_line_itself_ends_with_the_exit_code_and_one_line(
    world: World, all_cases: dict[str, Case], tmp_path: Path
) -> None:
    """The one case whose cost is a start of its own: nothing between the shell and the entry point."""
    case = all_cases["truncated"]
    command = [sys.executable, "-m", "megatron_graft.training.pretrain", *world.flags(), "--train-iters", 2]
    command += ["--save", tmp_path / "checkpoints", "--graft-run-dir", tmp_path / "run", *case.flags]
    finished = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=tmp_path)
    assert case.message is not None
    Printed(code=finished.returncode, error=finished.stderr).require(case.message)
    assert os.listdir(tmp_path) == []
