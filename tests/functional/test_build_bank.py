"""A bank's build as a user runs it: killed, started again, cut in other ways, on changed inputs, twice at once."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_graft.bank.reader import open_bank
from megatron_graft.data.sidecar import write_sidecar
from megatron_graft.data.tokenizer import TextTokenizer, load_tokenizer
from tests.helpers.building import make_documents, save_llama, write_data_set
from tests.helpers.tokenizers import small_sentencepiece

REPOSITORY = Path(__file__).resolve().parents[2]
WORDS = ("the", "whale", "was", "near", "under", "some", "old", "sails", "of", "the", "grey", "sea")
SLICES = ["--count-slices", "6", "--count-partitions", "4", "--encode-tasks", "5"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer, a donor and two data sets of some 60,000 tokens."""
    directory = tmp_path_factory.mktemp("inputs")
    tokenizer = load_tokenizer(small_sentencepiece(directory))
    save_llama(directory / "donor")
    for name, seed in (("first", 1), ("second", 2)):
        data_set(directory / name, tokenizer, seed)
    return directory


def data_set(prefix: Path, tokenizer: TextTokenizer, seed: int) -> None:
    """Sentences and, between them, words in any order, so that there are n-grams of every count."""
    random_words = np.random.default_rng(seed)
    words = [tokenizer.encode(word) for word in WORDS]
    documents = []
    for text in make_documents(1500, seed=seed):
        tail = [token for place in random_words.zipf(1.7, size=12) for token in words[place % len(words)]]
        documents.append([*tokenizer.encode(text), *tail, tokenizer.eod])
    write_sidecar(prefix, tokenizer)
    write_data_set(prefix, documents)


def command(inputs: Path, output: Path, *flags: str) -> list[str]:
    return [
        sys.executable, "tools/build_bank.py", "--data-prefix", str(inputs / "first"), str(inputs / "second"),
        "--tokenizer-model", str(next(inputs.glob("*.model"))), "--donor", str(inputs / "donor"),
        "--donor-layers", "1", "2", "--orders", "2", "3", "4", "5", "--num-rows", "3000", "--output", str(output),
        *flags,
    ]  # fmt: skip


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def files_of(bank: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in bank.iterdir()}


@pytest.fixture(scope="module")
def built(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bank of one uninterrupted build by one worker."""
    output = tmp_path_factory.mktemp("built") / "bank"
    ended = run(command(inputs, output, "--workers", "1"))
    assert ended.returncode == 0, ended.stderr
    return output


def test_what_is_built_is_whole_and_reported(built: Path) -> None:
    bank = open_bank(built, verify="full")
    assert (bank.num_rows, bank.orders, bank.row_dim) == (3000, (2, 3, 4, 5), 64)
    beside = {path.name for path in built.parent.iterdir()}
    assert beside == {"bank", "bank.build.jsonl", "bank.coverage.json", "bank.report.json", "bank.report"}
    report = json.loads((built.parent / "bank.report.json").read_text())
    assert report["bank"]["digest"] == bank.digest and report["coverage"]["train"]["hit_rate"] > 0.5
    lines = [json.loads(line) for line in (built.parent / "bank.build.jsonl").read_text().splitlines()]
    stages = [line["stage"] for line in lines if line["event"] == "stage"]
    counting = [f"count-{order}-{step}" for order in (2, 3, 4, 5) for step in ("map", "reduce")]
    assert stages == [*counting, "select", "pack", "encode", "assemble", "report"]


@pytest.mark.parametrize(
    ("workers", "slices", "partitions", "encode_tasks"), [("2", "1", "7", "1"), ("3", "11", "2", "9")]
)
def test_the_bytes_depend_neither_on_workers_nor_on_how_the_work_is_cut(
    inputs: Path, built: Path, tmp_path: Path, workers: str, slices: str, partitions: str, encode_tasks: str
) -> None:
    flags = ["--workers", workers, "--count-slices", slices, "--count-partitions", partitions]
    ended = run(command(inputs, tmp_path / "bank", *flags, "--encode-tasks", encode_tasks, "--threads", workers))
    assert ended.returncode == 0, ended.stderr
    assert files_of(tmp_path / "bank") == files_of(built)


def test_a_build_killed_again_and_again_ends_with_the_same_bytes(inputs: Path, built: Path, tmp_path: Path) -> None:
    words = command(inputs, tmp_path / "bank", "--workers", "2", *SLICES)
    log = tmp_path / "bank.build.jsonl"
    choose = random.Random(11)
    done_before_kills = 0
    for _ in range(6):
        process = subprocess.Popen(words, cwd=REPOSITORY, stderr=subprocess.PIPE, start_new_session=True)
        # At a random moment after it got further than the last one did.
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline and num_tasks_logged(log) <= done_before_kills:
            time.sleep(0.01)
        time.sleep(choose.uniform(0, 0.4))
        process.kill()
        process.communicate(timeout=60)  # its workers hold the pipe: none may outlive it
        assert not (tmp_path / "bank").exists() or process.returncode in (0, -signal.SIGKILL)
        done_before_kills = num_tasks_logged(log)
    assert done_before_kills >= 6
    ended = run(words)
    assert ended.returncode == 0, ended.stderr
    assert files_of(tmp_path / "bank") == files_of(built)
    tasks = Counter(
        (line["stage"], line["task"]) for line in map(json.loads, whole_lines(log)) if line["event"] == "task"
    )
    assert max(tasks.values()) == 1, "a finished task was done again"
    assert tasks.keys() >= {("count-5-map", 5), ("count-2-reduce", 3), ("encode", 4)}


def whole_lines(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")] if log.exists() else []


def num_tasks_logged(log: Path) -> int:
    return sum('"event": "task"' in line for line in whole_lines(log))


def stop_after_first_task(words: list[str], log: Path) -> None:
    """Start a build and kill it when something is done but not all."""
    process = subprocess.Popen(words, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    while process.poll() is None and not num_tasks_logged(log):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the build was too quick to be stopped"


def test_inputs_that_changed_under_a_half_done_build_are_refused(built: Path, inputs: Path, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx", ".tokenizer.json"):
        shutil.copy(inputs / f"first{suffix}", tmp_path / f"first{suffix}")
    words = command(inputs, tmp_path / "bank", *SLICES)
    words[words.index(str(inputs / "first"))] = str(tmp_path / "first")
    stop_after_first_task(words, tmp_path / "bank.build.jsonl")
    data = tmp_path / "first.bin"
    contents = bytearray(data.read_bytes())
    contents[100:102], contents[102:104] = contents[102:104], contents[100:102]
    data.write_bytes(contents)
    ended = run(words)
    assert ended.returncode == 2 and f"{data}: changed since the build began" in ended.stderr
    assert not (tmp_path / "bank").exists()


def test_other_settings_on_a_half_done_build_are_refused(inputs: Path, tmp_path: Path) -> None:
    words = command(inputs, tmp_path / "bank", *SLICES)
    stop_after_first_task(words, tmp_path / "bank.build.jsonl")
    ended = run([*words, "--min-count", "3"])
    assert ended.returncode == 2
    assert (
        "is the work directory of a build with other settings (got min_count 2; expected min_count 3)" in ended.stderr
    )


def test_a_second_build_into_the_same_directory_is_refused(inputs: Path, tmp_path: Path) -> None:
    words = command(inputs, tmp_path / "bank", "--num-rows", "2999")
    first = subprocess.Popen(words, cwd=REPOSITORY, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        while first.poll() is None and not num_tasks_logged(tmp_path / "bank.build.jsonl"):
            time.sleep(0.01)
        os.kill(first.pid, signal.SIGSTOP)
        second = run(words)
        assert second.returncode == 2
        assert "bank.build: is the work directory of a build that is running" in second.stderr
        os.kill(first.pid, signal.SIGCONT)
        assert first.wait(400) == 0
    finally:
        first.kill()
    assert open_bank(tmp_path / "bank", verify="full").num_rows == 2999


def test_stages_run_one_by_one_by_several_ranks_give_the_same_bytes(inputs: Path, built: Path, tmp_path: Path) -> None:
    stage = [sys.executable, "tools/build_stage.py"]
    work = ["--work-dir", str(tmp_path / "work")]
    planned = run([*stage, "plan", *command(inputs, tmp_path / "bank", *SLICES)[2:], *work])
    assert planned.returncode == 0, planned.stderr
    listed = run([*stage, "list", *work]).stdout.split("\n")[:-1]
    assert listed[0] == "count-2-map 6" and listed[-1] == "report 1"
    for line in listed:
        name, tasks = line.split()
        if name == "encode":  # the donor's ranks are torchrun's
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *stage[1:]]
            ended = run([*torchrun, "run", name, *work])
            assert ended.returncode == 0, ended.stderr
            continue
        world = min(2, int(tasks))
        for rank in range(world):
            ended = run([*stage, "run", name, *work, "--rank", str(rank), "--world-size", str(world)])
            assert ended.returncode == 0, ended.stderr
    assert files_of(tmp_path / "bank") == files_of(built)
    assert run([*stage, "list", *work]).stdout == ""
    again = run([*stage, "run", "count-2-map", *work])
    assert again.returncode == 0 and "done already" in again.stderr


def test_flags_come_from_a_yaml_file_and_the_command_line_wins(inputs: Path, built: Path, tmp_path: Path) -> None:
    config = tmp_path / "build.yaml"
    config.write_text(
        f"data-prefix: [{inputs / 'first'}, {inputs / 'second'}]\n"
        f"tokenizer-model: {next(inputs.glob('*.model'))}\ndonor: {inputs / 'donor'}\n"
        "donor_layers: [1, 2]\norders: [2, 3, 4, 5]\nnum-rows: 10\n"
    )
    words = [sys.executable, "tools/build_bank.py", "--config", str(config), "--output", str(tmp_path / "bank")]
    ended = run([*words, "--num-rows", "3000"])
    assert ended.returncode == 0, ended.stderr
    assert files_of(tmp_path / "bank") == files_of(built)
