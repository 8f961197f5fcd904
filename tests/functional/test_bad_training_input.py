"""Bad input of the training entry point: refused before training starts, with exit code 2 and one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_graft.bank.reader import open_bank
from megatron_graft.data.preprocess import dataset_prefix, preprocess
from megatron_graft.data.tokenizer import load_tokenizer
from megatron_graft.errors import BankError
from tests.helpers.bad_input import BROKEN, Printed, broken_bank
from tests.helpers.tiny_run import World, make_world
from tests.helpers.tokenizers import SENTENCES, small_sentencepiece

pytestmark = [pytest.mark.slow, pytest.mark.functional]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Text, tokenizer, data and a bank that belong together."""
    return make_world(tmp_path_factory.mktemp("world"))


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
        **table_cases(memory),
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
            message=r"--seq-length: is shorter than the memory's longest .* \(got 3; expected at least 4\)\. Lengthen",
        ),
        "tensor parallel": Case(
            flags=(*memory, "--tensor-model-parallel-size", 2),
            message=r"--tensor-model-parallel-size: .*mixture of experts .* --sequence-parallel only \(got 2\)\. Add",
            processes=2,
        ),
        "tensor parallel, sound": Case(
            flags=(*memory, "--tensor-model-parallel-size", 2, "--sequence-parallel"), message=None, processes=2
        ),
        "packed sequences": Case(
            flags=(
                *memory,
                "--dataloader-inter-document-masking",
                "--pipeline-model-parallel-size",
                2,
            ),
            message=r"--dataloader-inter-document-masking: is not supported here: a packed micro-batch .* Leave it out",
            processes=2,
        ),
        "other loader": Case(
            flags=("--dataloader-type", "cyclic"),
            message=r"--dataloader-type: is not supported here: .* \(got cyclic\)\. Leave",
        ),
    }


def table_cases(memory: tuple[Any, ...]) -> dict[str, Case]:
    """Cases of hashed tables, and of donor layers."""
    tables = ("--engram-layers", 2, "--engram-vocab-size", 101)
    return {
        "donor layers": Case(
            flags=(*memory, "--graft-donor-layers", "4,12"),
            message=r"--graft-donor-layers: names layers that do not stand side by side in the bank .* \(got 4,12; "
            r"expected adjacent ones of 4,8, in that order\)\. Choose",
        ),
        "table size": Case(
            flags=(*tables, "--engram-heads", 3),
            message=r"--engram-dim: .* \(got 512; expected a positive multiple of the 3 heads\)",
        ),
        "pad id": Case(
            flags=(*tables, "--engram-pad-id", 9999),
            message=r"--engram-pad-id: is outside the tokenizer's vocabulary \(got 9999; expected 0 to \d+\)",
        ),
        "table sharding": Case(
            flags=(*tables, "--engram-shard-over", "expert"),
            message=r"--engram-shard-over: is not supported yet \(got expert; expected tensor\)\. See docs/engram",
        ),
        "table optimizer": Case(
            flags=(*tables, "--optimizer", "sgd"),
            message=r"--optimizer: .* have Adam's learning rate and decay .* \(got sgd\)\. Use --optimizer adam",
        ),
        "sound, tables": Case(flags=tables, message=None),
    }


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
        message=rf"data set {prefix}: was tokenised by another tokenizer than {ours.path} "
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
    "packed sequences", "other loader", "donor layers", "table size", "pad id", "table sharding", "table optimizer",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_entry_point_refuses(name: str, all_cases: dict[str, Case], printed: dict[str, Any]) -> None:
    message = all_cases[name].message
    assert message is not None
    Printed(code=printed[name]["code"], error=printed[name]["error"]).require(message)


@pytest.mark.parametrize("name", ["sound", "sound, stock", "sound, tables", "tensor parallel, sound"])
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
