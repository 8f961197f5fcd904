"""tools/evaluate.py on a small trained run: by document, by key count, with the memory off and with other banks."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_graft.bank.reader import open_bank
from megatron_graft.data.preprocess import dataset_prefix, preprocess
from megatron_graft.data.tokenizer import load_tokenizer
from megatron_graft.ngram.oracle import brute_force_lookup
from tests.helpers.main_job import REPOSITORY
from tests.helpers.tiny_run import SEQ_LENGTH, World, launch, make_text, make_world

pytestmark = [pytest.mark.slow, pytest.mark.functional]
STEPS = 6
TABLES = ("--engram-layers", 2, "--engram-vocab-size", 97, "--engram-dim", 32, "--graft-combine", "sum")
TEXTS = {"heldout": make_text(25, seed=1), "foreign": make_text(12, seed=2), "first": make_text(25, seed=1)[:1]}


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A run's evaluation, and what it read: the text and the tokens of every document."""

    world: World
    result: dict[str, Any]
    documents: dict[str, list[list[int]]]
    output: str


def evaluate(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPOSITORY / "tools" / "evaluate.py", *arguments]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    world = make_world(tmp_path_factory.mktemp("world"))
    tokenizer, run, data, documents = load_tokenizer(world.tokenizer), world.directory / "run", [], {}
    for name, texts in TEXTS.items():
        lines = world.directory / f"{name}.jsonl"
        lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        preprocess([lines], world.directory / name, tokenizer)
        data.append(f"{name}={dataset_prefix(world.directory / name)}")
        documents[name] = [[*tokenizer.encode(text), tokenizer.eod] for text in texts]
    # fmt: off
    flags = [*world.flags(world.bank), *TABLES, "--lr", 1e-2, "--train-iters", STEPS,
             "--save", run / "checkpoints", "--load", run / "checkpoints"]
    launch(run, flags).require_success()
    ended = evaluate(run, "--data", *data, "--other-bank", f"same={world.bank}", f"many={world.many_rows}",
                     "--memory-off", "heldout")
    # fmt: on
    assert ended.returncode == 0, ended.stderr[-4000:]
    result = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    return Evaluated(world=world, result=result, documents=documents, output=ended.stdout)


def passes_over(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The summaries of a text: with the memory and, where they were made, off and with other banks."""
    return [result, *([result["memory_off"]] if "memory_off" in result else []), *result.get("other_bank", {}).values()]


def test_losses_are_told_by_document(evaluated: Evaluated) -> None:
    tokenizer = load_tokenizer(evaluated.world.tokenizer)
    for name, documents in evaluated.documents.items():
        lengths, sizes = [len(tokens) for tokens in documents], [len(text.encode()) for text in TEXTS[name]]
        first = int(tokenizer.num_bytes_of_ids[documents[0][0]])
        for one in passes_over(evaluated.result["data"][name]):
            assert one["documents"]["tokens"] == [lengths[0] - 1, *lengths[1:]]
            assert one["documents"]["bytes"] == [sizes[0] - first, *sizes[1:]]
            assert (one["tokens"], one["bytes"]) == (sum(lengths) - 1, sum(sizes) - first)
            assert sum(one["documents"]["loss"]) == pytest.approx(one["loss"] * one["tokens"])
            assert min(one["documents"]["loss"]) > 0


def test_a_document_has_the_loss_that_it_has_alone(evaluated: Evaluated) -> None:
    alone, among = (evaluated.result["data"][name]["documents"] for name in ("first", "heldout"))
    assert alone["tokens"] == among["tokens"][:1]
    assert among["loss"][0] == pytest.approx(alone["loss"][0], rel=1e-5)


def test_losses_are_split_by_order_and_key_count_as_the_oracle_finds_them(evaluated: Evaluated) -> None:
    bank = open_bank(evaluated.world.bank)
    keys = bank.rows_of_keys()
    for name, documents in evaluated.documents.items():
        stream, classes = [token for tokens in documents for token in tokens][:-1], Counter[tuple[int, int]]()
        for start in range(0, len(stream), SEQ_LENGTH):
            window = np.array([stream[start : start + SEQ_LENGTH]])
            rows, orders = brute_force_lookup(keys, window, bank.eod, bank.min_order, bank.max_order)
            counts = [int(bank.key_counts[row]) if row >= 0 else 0 for row in rows[0].tolist()]
            classes.update(zip(orders[0].tolist(), counts, strict=True))
        for one in passes_over(evaluated.result["data"][name]):
            told = one["by_order_and_count"]
            assert told["miss"] == one["by_order"]["miss"]
            assert told["miss"]["tokens"] == classes[0, 0]
            parts = [told["miss"]]
            for order, groups in ((order, told[order]) for order in told if order != "miss"):
                for group, part in groups.items():
                    low, *high = map(int, group.split("-"))
                    counts = range(low, (high or [low])[0] + 1)
                    assert part["tokens"] == sum(classes[int(order), count] for count in counts) > 0
                    parts.append(part)
            assert len(parts) > 4
            assert sum(part["tokens"] for part in parts) == one["tokens"]
            total = sum(part["tokens"] * part["loss"] for part in parts)
            assert total == pytest.approx(one["tokens"] * one["loss"])


def test_another_bank_stands_in_the_place_of_the_runs(evaluated: Evaluated) -> None:
    measured = evaluated.result["data"]["heldout"]
    same, many = measured["other_bank"]["same"], measured["other_bank"]["many"]
    # Another pass finds other places in memory, on which the last bit of a product may depend.
    assert same["documents"]["loss"] == pytest.approx(measured["documents"]["loss"], rel=1e-6)
    assert same["loss"] == pytest.approx(measured["loss"], rel=1e-6)
    assert set(same) == set(many) == set(measured) - {"memory_off", "other_bank"}
    losses = [one["loss"] for one in (measured, many, measured["memory_off"])]
    assert min(abs(one - other) for one, other in itertools.combinations(losses, 2)) > 1e-3
    assert f"(bank many: {many['loss']:.4f})" in evaluated.output


def test_only_the_named_texts_are_measured_with_memory_off_and_other_banks(evaluated: Evaluated) -> None:
    data = evaluated.result["data"]
    assert {"memory_off", "other_bank"} <= set(data["heldout"])
    assert not {"memory_off", "other_bank"} & {*data["foreign"], *data["first"]}
    assert evaluated.result["asked"]["memory_off"] == ["heldout"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "heldout"], "--data: is malformed (got heldout; expected NAME=PREFIX)"),
        (["--data", "a=b", "--other-bank", "bank"], "--other-bank: is malformed (got bank; expected NAME=DIR)"),
        (["--data", "a=b", "a=c"], "--data: gives a name twice (got a=c; expected another name for each path)"),
        (["--data", "a=b", "--memory-off", "c"], "--memory-off: names no text of --data (got c; expected a)"),
    ],
)
def test_bad_flags_are_refused(tmp_path: Path, flags: list[str], message: str) -> None:
    ended = evaluate(tmp_path, *flags)
    assert (ended.returncode, message in ended.stderr) == (2, True), ended.stderr
