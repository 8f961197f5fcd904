"""The main job in miniature, from the shell: text in, bank, training, evaluation, report; no part is faked."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_graft.bank.reader import open_bank
from megatron_graft.data.preprocess import dataset_prefix, preprocess
from megatron_graft.data.tokenizer import load_tokenizer
from megatron_graft.ngram.oracle import brute_force_lookup
from tests.helpers.building import make_documents
from tests.helpers.main_job import (
    DONOR_LAYER,
    GLOBAL_BATCH_SIZE,
    NUM_ROWS,
    REPOSITORY,
    SCRIPT,
    SEQ_LENGTH,
    STEPS,
    VOCAB_SIZE,
    Ended,
    Job,
    make_job,
    read_records,
    run_script,
)
from tests.helpers.ports import free_port
from tests.helpers.tokenizers import small_byte_level

pytestmark = [pytest.mark.slow, pytest.mark.functional]
EOD = 2  # of the SentencePiece models that we train


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Input files, and a working directory whose name has a space in it."""
    scratch = tmp_path_factory.mktemp("pipeline")
    return make_job(scratch / "inputs", scratch / "a directory")


@pytest.fixture(scope="module")
def first(job: Job) -> Ended:
    """The whole job, from nothing."""
    return run_script(job).ok()


@pytest.fixture(scope="module")
def prepared(job: Job, first: Ended) -> Job:
    """The job with everything made; further runs share it."""
    assert first.code == 0
    return job


def evaluation_of(job: Job, name: str) -> dict[str, Any]:
    return read_json(job.run_directory(name) / "evaluation.json")


def report_of(job: Job, name: str) -> dict[str, Any]:
    return read_json(job.run_directory(name) / "report.json")


def read_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def texts_of(job: Job, split: str) -> list[str]:
    lines = (job.work / "corpus" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def documents_of(job: Job, split: str) -> list[list[int]]:
    """Token ids of a split, made anew from its text."""
    tokenizer = load_tokenizer(job.work / "tokenizer" / "tokenizer.model")
    return [[*tokenizer.encode(text), EOD] for text in texts_of(job, split)]


def orders_by_oracle(bank_directory: Path, sequences: list[list[int]]) -> Counter[int]:
    """How many positions match at each order (0: miss), every sequence by itself."""
    bank = open_bank(bank_directory)
    rows_of_keys, orders = bank.rows_of_keys(), Counter[int]()
    for tokens in sequences:
        found = brute_force_lookup(rows_of_keys, np.array([tokens]), bank.eod, bank.min_order, bank.max_order)[1]
        orders.update(found[0].tolist())
    return orders


def windows(documents: list[list[int]]) -> list[list[int]]:
    """The inputs an evaluation makes of documents: end to end, cut at the sequence length; the last token is only
    predicted."""
    stream = [token for document in documents for token in document][:-1]
    return [stream[start : start + SEQ_LENGTH] for start in range(0, len(stream), SEQ_LENGTH)]


def tokens_by_order(result: dict[str, Any]) -> dict[str, int]:
    return {order: part["tokens"] for order, part in result["by_order"].items()}


def newest_checkpoint(run_directory: Path) -> int:
    return int((run_directory / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time of change."""
    files = [file for file in directory.rglob("*") if file.is_file()]
    return {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in files}


# ---------------------------------------------------------------- one process, from nothing


def test_the_bank_is_whole_and_what_was_asked_for(prepared: Job) -> None:
    command = [sys.executable, REPOSITORY / "tools" / "verify_bank.py", prepared.work / "bank", "--depth", "full"]
    checked = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    bank = open_bank(prepared.work / "bank")
    assert bank.digest in checked.stdout
    assert (bank.num_rows, bank.vocab_size, bank.eod) == (NUM_ROWS, VOCAB_SIZE, EOD)
    assert bank.manifest.identity.donor.layers == (DONOR_LAYER,)


def test_the_bank_counts_training_text_only(prepared: Job) -> None:
    assert_counted_over(prepared.work / "bank", documents_of(prepared, "train"))


def assert_counted_over(bank_directory: Path, documents: list[list[int]]) -> None:
    bank = open_bank(bank_directory)
    counts = Counter[tuple[int, ...]]()
    for document in documents:
        for order in bank.orders:
            counts.update(zip(*(document[shift:] for shift in range(order)), strict=False))
    rows = bank.rows_of_keys()
    assert {key: counts[key] for key in rows} == {key: int(bank.key_counts[row]) for key, row in rows.items()}


def test_the_printed_coverage_is_the_oracles(prepared: Job, first: Ended) -> None:
    measured = read_json(prepared.work / "bank.coverage.json")["data_sets"]
    for split in ("train", "heldout", "foreign"):
        orders = orders_by_oracle(prepared.work / "bank", documents_of(prepared, split))
        assert measured[split]["positions"] == orders.total()
        assert measured[split]["hit_rate"] == pytest.approx(1 - orders[0] / orders.total())
        assert re.search(rf"^\| {split} .*{1 - orders[0] / orders.total():.1%}", first.output, re.MULTILINE)


def test_every_step_is_recorded_and_the_log_line_tells_rates_and_memory(prepared: Job, first: Ended) -> None:
    records = read_records(prepared.run_directory("graft_moe"))
    assert [record["iteration"] for record in records] == list(range(1, STEPS + 1))
    assert all(math.isfinite(record["lm loss"]) for record in records)
    lines = [line for line in first.output.splitlines() if line.startswith("graft step ")]
    assert len(lines) == STEPS // 2
    for line, record in zip(lines, records[1::2], strict=True):
        found = re.fullmatch(
            r"graft step (\d+)/(\d+) \| ([\d,]+) tok/s \| stall ([\d.]+) ms \| hit ([\d.]+)% \| .*\| ETA (\S+)", line
        )
        assert found is not None, line
        assert (int(found[1]), int(found[2])) == (record["iteration"], STEPS)
        assert float(found[5]) == pytest.approx(100 * record["graft/hit_rate"], abs=0.051)
        assert 0 < record["graft/hit_rate"] < 1
        assert record["tokens_per_second"] > 0 and record["graft/stall_ms"] >= 0
    assert lines[-1].endswith("ETA 0s")


def test_the_evaluation_counts_the_held_out_text_as_the_oracle_does(prepared: Job) -> None:
    for split in ("heldout", "foreign"):
        result = evaluation_of(prepared, "graft_moe")["data"][split]
        documents = documents_of(prepared, split)
        orders = orders_by_oracle(prepared.work / "bank", windows(documents))
        assert tokens_by_order(result) == {str(order or "miss"): number for order, number in orders.items()}
        tokenizer = load_tokenizer(prepared.work / "tokenizer" / "tokenizer.model")
        text_bytes = sum(len(text.encode()) for text in texts_of(prepared, split))
        assert result["bytes"] == text_bytes - len(tokenizer.ngram_text(documents[0][:1]).encode())


def test_the_figures_of_an_evaluation_agree_with_one_another(prepared: Job) -> None:
    evaluation = evaluation_of(prepared, "graft_moe")
    assert evaluation["iteration"] == evaluation["train_iters"] == STEPS
    for result in evaluation["data"].values():
        off = result["memory_off"]
        for losses in (result, off):
            total = sum(part["tokens"] * part["loss"] for part in losses["by_order"].values())
            assert losses["loss"] == pytest.approx(total / losses["tokens"])
            assert losses["bits_per_byte"] == pytest.approx(total / math.log(2) / result["bytes"])
        # The same positions with and without the memory, which has learnt something by now.
        for order, part in result["by_order"].items():
            assert off["by_order"][order]["tokens"] == part["tokens"]
            assert order == "miss" or off["by_order"][order]["loss"] != part["loss"]


def test_the_report_repeats_what_was_measured(prepared: Job) -> None:
    report, evaluation = report_of(prepared, "graft_moe"), evaluation_of(prepared, "graft_moe")
    records = read_records(prepared.run_directory("graft_moe"))
    held_out, bank = evaluation["data"]["heldout"], open_bank(prepared.work / "bank")
    assert report["config"]["steps"] == STEPS
    assert report["tokens"]["seen"] == STEPS * GLOBAL_BATCH_SIZE * SEQ_LENGTH
    assert report["bank"]["digest"] == bank.digest and evaluation["memory"]["banks"] == [bank.digest]
    assert report["held_out"]["loss"] == pytest.approx(held_out["loss"], rel=1e-4)
    assert report["held_out"]["memory_off"]["loss"] == pytest.approx(held_out["memory_off"]["loss"], rel=1e-4)
    hit_rate = 1 - held_out["by_order"]["miss"]["tokens"] / held_out["tokens"]
    assert report["hit_rate"]["held_out"]["any"] == pytest.approx(hit_rate, rel=1e-4)
    assert report["training_loss"]["first"] == pytest.approx(records[0]["lm loss"], rel=1e-4)
    assert report["training_loss"]["last"] == pytest.approx(records[-1]["lm loss"], rel=1e-4)
    stages = {"corpus", "tokenizer", "data train", "data heldout", "data foreign", "bank", "training", "evaluation"}
    assert {stage for stage, seconds in report["seconds"].items() if seconds is not None} == stages
    for file in ("report.md", "loss.png"):
        assert (prepared.run_directory("graft_moe") / file).stat().st_size > 0


def test_a_second_call_makes_and_trains_nothing_and_finds_the_same(prepared: Job) -> None:
    run = prepared.run_directory("graft_moe")
    made = [prepared.work / name for name in ("corpus", "tokenizer", "data", "bank")]
    lasting = [*made, run / "checkpoints"]
    before, found = [snapshot(path) for path in lasting], evaluation_of(prepared, "graft_moe")
    metrics = (run / "metrics.jsonl").read_bytes()
    again = run_script(prepared).ok()
    assert [snapshot(path) for path in lasting] == before
    assert (run / "metrics.jsonl").read_bytes() == metrics
    assert "graft step" not in again.output
    assert "evaluated already" in again.output
    assert again.output.count("complete, skipped") == 3  # the data sets
    assert len(re.findall("is complete.*: nothing to do", again.output)) == 3  # corpus, tokenizer, bank
    assert evaluation_of(prepared, "graft_moe")["data"] == found["data"]


# ---------------------------------------------------------------- other ways to run it


def test_torchrun_starts_two_processes_and_saves(prepared: Job) -> None:
    launcher = ("torchrun", "--nproc-per-node=2", f"--master-port={free_port()}", SCRIPT)
    flags = ("--use-distributed-optimizer", "--train-iters", 4, "--save-interval", 2)
    both = run_script(prepared, *flags, command=launcher, RUN_NAME="two", GRAFT_BANK="work/bank").ok()
    assert "world size: 2, data-parallel size: 2" in both.output
    run = prepared.run_directory("two")
    assert newest_checkpoint(run) == 4
    assert [record["iteration"] for record in read_records(run)] == [1, 2, 3, 4]
    # The same batch, split in two: the same first loss up to the order of the sums.
    single = read_records(prepared.run_directory("graft_moe"))[0]["lm loss"]
    assert read_records(run)[0]["lm loss"] == pytest.approx(single, rel=1e-6)
    assert evaluation_of(prepared, "two")["iteration"] == 4
    assert report_of(prepared, "two")["config"]["steps"] == 4


def test_a_run_that_is_told_to_stop_saves_and_is_finished_by_the_same_call(prepared: Job) -> None:
    """After a checkpoint, too, whose saver gets the signal as well. So do data loaders, which the last steps need."""
    steps, interval, run = 40, 5, prepared.run_directory("stopped")
    flags = ("--train-iters", steps, "--save-interval", interval, "--log-interval", 50, "--eval-interval", 1000)
    flags += ("--num-workers", 1)
    variables = {"RUN_NAME": "stopped", "GRAFT_BANK": "work/bank"}
    tracker = run / "checkpoints" / "latest_checkpointed_iteration.txt"
    under_way = (signal.SIGTERM, tracker.is_file)
    stopped = run_script(prepared, *flags, interrupt=under_way, **variables)
    assert stopped.code != 0, "a job that was stopped must not look finished"
    saved = newest_checkpoint(run)
    assert interval <= saved < steps
    assert saved == read_records(run)[-1]["iteration"]
    assert not (run / "report.json").exists()
    run_script(prepared, *flags, **variables).ok()
    assert [record["iteration"] for record in read_records(run)] == list(range(1, steps + 1))
    assert evaluation_of(prepared, "stopped")["iteration"] == newest_checkpoint(run) == steps
    assert report_of(prepared, "stopped")["config"]["steps"] == steps


def test_without_a_bank_the_stock_model_is_trained_evaluated_and_reported(prepared: Job) -> None:
    stock = run_script(prepared, RUN_NAME="stock", GRAFT_BANK="none").ok()
    assert "[megatron-graft] bank" not in stock.output
    assert not re.search(r"^graft step .*\bhit\b", stock.output, re.MULTILINE)
    evaluation = evaluation_of(prepared, "stock")
    assert evaluation["memory"] is None and evaluation["parameters"]["memory_sites"] == 0
    # Its losses are split by the matches of the bank that lies ready, so that the two runs can be set side by side.
    for split, result in evaluation_of(prepared, "graft_moe")["data"].items():
        assert tokens_by_order(evaluation["data"][split]) == tokens_by_order(result)
        assert "memory_off" not in evaluation["data"][split]
        assert set(evaluation["data"][split]["by_order_and_count"]) == set(tokens_by_order(result))
    report = report_of(prepared, "stock")
    assert report["arm"] == "no memory" and report["bank"] is None
    # A fresh memory site adds nothing, so the first step is the stock model's, bit for bit; the second is not.
    with_memory = [record["lm loss"] for record in read_records(prepared.run_directory("graft_moe"))]
    losses = [record["lm loss"] for record in read_records(prepared.run_directory("stock"))]
    assert len(losses) == STEPS
    assert losses[0] == with_memory[0] and losses[-1] != with_memory[-1]


SMALL_TABLES = {"ENGRAM_VOCAB_SIZE": "97", "ENGRAM_DIM": "32"}


def test_hashed_tables_are_trained_evaluated_and_reported_with_and_without_a_bank(prepared: Job) -> None:
    run_script(prepared, RUN_NAME="both", ENGRAM_LAYERS="2", **SMALL_TABLES).ok()
    run_script(prepared, RUN_NAME="tables", GRAFT_BANK="none", ENGRAM_LAYERS="1 2", **SMALL_TABLES).ok()
    both, tables = report_of(prepared, "both"), report_of(prepared, "tables")
    assert (both["arm"], tables["arm"]) == ("memory + hashed tables (sum)", "hashed tables")
    assert both["engram"]["layer_ids"] == [[2, 1]] and both["bank"]["num_rows"] == NUM_ROWS
    assert tables["engram"]["layer_ids"] == [[1, 0], [2, 1]] and tables["bank"] is None
    graft = report_of(prepared, "graft_moe")
    losses = [[record["lm loss"] for record in read_records(prepared.run_directory(name))]
              for name in ("graft_moe", "both", "tables")]  # fmt: skip
    assert losses[0][0] == losses[1][0] == losses[2][0], "fresh sites add nothing, whatever they read"
    assert len({run[-1] for run in losses}) == 3
    for report in (both, tables):
        rows = 16 * 97  # at least: primes from there on
        in_tables = rows * 32 // 8 * len(report["engram"]["layer_ids"])
        assert report["parameters"]["memory_sites"] > in_tables
        assert report["held_out"]["memory_off"]["loss"] != report["held_out"]["loss"]
        orders = [
            {order: part["tokens"] for order, part in run["held_out"]["by_order"].items()} for run in (report, graft)
        ]
        assert orders[0] == orders[1], "all arms are split by the one bank's matches"


def test_packed_rows_a_prefix_a_node_copy_and_threads_train_and_are_evaluated(prepared: Job, tmp_path: Path) -> None:
    packed, rows = tmp_path / "int8", NUM_ROWS // 2
    command = [
        sys.executable, REPOSITORY / "tools" / "build_bank.py", "--output", packed, "--row-dtype", "int8",
        "--data-prefix", dataset_prefix(prepared.work / "data" / "train"), "--donor", prepared.donor,
        "--tokenizer-model", prepared.work / "tokenizer" / "tokenizer.model",
        "--num-rows", NUM_ROWS, "--donor-layers", DONOR_LAYER,
    ]  # fmt: skip
    built = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    flags = ("--bank-rows", rows, "--bank-node-copy", tmp_path / "node", "--bank-lookup-threads", 2)
    flags += ("--bank-huge-pages", "--graft-verify-bank", "full")
    run_script(prepared, *flags, RUN_NAME="packed", GRAFT_BANK=str(packed)).ok()
    whole, used = open_bank(packed), open_bank(packed, rows=rows)
    assert whole.row_layout.dtype.name == "int8" and used.digest != whole.digest
    assert (tmp_path / "node" / whole.digest / "index.qbt").is_file()
    assert evaluation_of(prepared, "packed")["memory"]["banks"] == [used.digest]
    report = report_of(prepared, "packed")["bank"]
    assert (report["digest"], report["num_rows"]) == (used.digest, rows)
    losses = [record["lm loss"] for record in read_records(prepared.run_directory("packed"))]
    with_bank = [record["lm loss"] for record in read_records(prepared.run_directory("graft_moe"))]
    assert len(losses) == STEPS and losses[0] == with_bank[0] and losses[-1] != with_bank[-1]
    # The checkpoint belongs to these rows, not to all of the bank.
    refused = run_script(prepared, *flags[2:], "--train-iters", STEPS + 1, RUN_NAME="packed", GRAFT_BANK=str(packed))
    assert refused.code != 0 and used.digest in refused.output and whole.digest in refused.output


def test_a_users_own_data_gets_a_bank_of_its_training_share(job: Job, tmp_path: Path) -> None:
    texts = make_documents(150, seed=3)
    text, tokenizer_file = tmp_path / "own.jsonl", small_byte_level(tmp_path / "tokenizer") / "tokenizer.json"
    text.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    tokenizer = load_tokenizer(tokenizer_file)
    preprocess([text], tmp_path / "own", tokenizer)
    own = Job(directory=tmp_path, texts=(), foreign=job.foreign, donor=job.donor)
    run_script(
        own,
        DATA_PATH=str(dataset_prefix(tmp_path / "own")), SPLIT="80,20,0", TOKENIZER_MODEL=str(tokenizer_file),
        TEXT="", FOREIGN="", RUN_NAME="own",
    ).ok()  # fmt: skip
    documents = [[*tokenizer.encode(text), tokenizer.eod] for text in texts]
    assert_counted_over(own.work / "bank", documents[:120])
    assert not (own.work / "corpus").exists()
    result = evaluation_of(own, "own")["data"]["heldout"]
    orders = orders_by_oracle(own.work / "bank", windows(documents[120:]))
    assert result["tokens"] == orders.total()
    assert result["by_order"]["miss"]["tokens"] == orders[0]
    assert report_of(own, "own")["bank"]["digest"] == open_bank(own.work / "bank").digest


# ---------------------------------------------------------------- from the wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with our wheel installed into it and nothing else; built from a copy of the checkout."""
    scratch = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns(".git", ".venv", "runs", "work", "build", "dist", "*.so", "*.egg-info", ".*_cache")
    shutil.copytree(REPOSITORY, scratch / "checkout", ignore=ignore)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps"]
    made = subprocess.run(
        [*pip, "--no-build-isolation", "--target", scratch / "target", scratch / "checkout"],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr[-3000:]
    shutil.rmtree(scratch / "checkout")
    return scratch / "target"


def test_the_installed_package_does_the_whole_job_in_an_empty_directory(
    job: Job, installed: Path, tmp_path: Path
) -> None:
    elsewhere = Job(directory=tmp_path, texts=job.texts, foreign=job.foreign, donor=job.donor)
    script = installed / "megatron_graft" / "examples" / "pretrain_graft_moe.sh"
    variables = {"PYTHONPATH": str(installed), "FOREIGN": ""}
    ended = run_script(elsewhere, "--train-iters", 4, command=("bash", script), **variables).ok()
    # The environment may lie inside the checkout, and warnings name it: only the sources must not be used.
    assert str(REPOSITORY) not in ended.output.replace(sys.prefix, "")
    assert set(file.name for file in tmp_path.iterdir()) == {"work", "runs", "output.txt"}
    assert report_of(elsewhere, "graft_moe")["config"]["steps"] == 4
    assert evaluation_of(elsewhere, "graft_moe")["memory"]["banks"] == [open_bank(elsewhere.work / "bank").digest]
