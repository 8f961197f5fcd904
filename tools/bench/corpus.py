"""The lookup bench over a real corpus: its n-grams as keys, its held-out text as queries."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from programs import CHECKOUT, KeysOnDisk, bench_lookup

from megatron_graft.bank.keys import UNUSED, BankKeys, canonical_order
from megatron_graft.building.count import OrderCounts, count_ngrams
from megatron_graft.building.documents import MegatronDocuments
from megatron_graft.data.tokenizer import load_tokenizer
from megatron_graft.errors import PlatformError
from megatron_graft.log import get_logger

ORDERS = (2, 3, 4, 5)
MIN_COUNT = 2


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A prepared corpus: a tokenizer and two Megatron data sets made with it."""

    tokenizer: Path
    train_prefixes: list[str]
    held_out_prefixes: list[str]


def prepare_corpus(work: Path, texts: list[Path], tokenizer: Path | None) -> Corpus:
    """Fetch (or read ``texts``), train a tokenizer (or take ``tokenizer``) and tokenise, as for a training run.

    Raises:
        PlatformError: a stage failed, perhaps because nothing could be fetched.
    """
    command = [sys.executable, str(CHECKOUT / "tools" / "prepare_run.py"), "--work-dir", str(work), "--bank", "none"]
    command += ["--input", *map(str, texts)] if texts else []
    command += ["--tokenizer-model", str(tokenizer)] if tokenizer else []
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode != 0:
        raise PlatformError("the real corpus", "could not be prepared; the stage's own message stands above")
    return Corpus(
        tokenizer=tokenizer or work / "tokenizer" / "tokenizer.model",
        train_prefixes=[str(work / "data" / "train_text_document")],
        held_out_prefixes=[str(work / "data" / "heldout_text_document")],
    )


def measure_corpus(programs: Path, data: Path, corpus: Corpus, *, rounds: int, threads: int) -> dict[str, Any]:
    """What ``bench_lookup`` says of the corpus, and what it was made of."""
    keys = _keys_of_corpus(data / "corpus", corpus)
    positions = keys.made["held_out_tokens"]
    measured = bench_lookup(programs, keys, positions=positions, rounds=rounds, threads=threads, measure="pages")
    return {"made": keys.made, **measured}


def _keys_of_corpus(directory: Path, corpus: Corpus) -> KeysOnDisk:
    """Count the corpus, or take what an earlier run left if it was of the same corpus."""
    tokenizer = load_tokenizer(corpus.tokenizer)
    train = MegatronDocuments(corpus.train_prefixes, split=None, vocab_size=tokenizer.vocab_size)
    held_out = MegatronDocuments(corpus.held_out_prefixes, split=None, vocab_size=tokenizer.vocab_size)
    source = {
        "tokenizer": tokenizer.fingerprint,
        "train": train.fingerprint(),
        "held_out": held_out.fingerprint(),
        "orders": list(ORDERS),
    }
    made_path = directory / "made.json"
    if made_path.is_file():
        made = json.loads(made_path.read_text())
        if made["source"] == source:
            return KeysOnDisk(directory=directory, made=made)
        made_path.unlink()
    get_logger().info("counting %s tokens of the real corpus", f"{train.num_tokens:,}")
    keys = _in_bank_order(count_ngrams(train, orders=ORDERS, eod=tokenizer.eod, min_count=MIN_COUNT))
    directory.mkdir(parents=True, exist_ok=True)
    keys.key_ids.tofile(directory / "ids.i32")
    keys.key_orders.tofile(directory / "orders.u8")
    keys.key_counts.astype(np.uint32).tofile(directory / "counts.u32")
    np.concatenate([tokens.astype(np.int32) for tokens in held_out]).tofile(directory / "text.i32")
    made = {
        "source": source,
        "tokens": train.num_tokens,
        "held_out_tokens": held_out.num_tokens,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "max_order": ORDERS[-1],
        "min_count": MIN_COUNT,
        "entries": len(keys.key_orders),
        "entries_by_order": {str(order): int((keys.key_orders == order).sum()) for order in ORDERS},
    }
    made_path.write_text(json.dumps(made))
    return KeysOnDisk(directory=directory, made=made)


def _in_bank_order(counts: list[OrderCounts]) -> BankKeys:
    total = sum(len(level.counts) for level in counts)
    ids = np.full((total, ORDERS[-1]), UNUSED, dtype=np.int32)
    orders = np.empty(total, dtype=np.uint8)
    start = 0
    for level in counts:
        end = start + len(level.counts)
        ids[start:end, ORDERS[-1] - level.order :] = level.ids
        orders[start:end] = level.order
        start = end
    keys = BankKeys(key_ids=ids, key_orders=orders, key_counts=np.concatenate([level.counts for level in counts]))
    order = canonical_order(keys)
    return BankKeys(
        key_ids=np.ascontiguousarray(ids[order]), key_orders=orders[order], key_counts=keys.key_counts[order]
    )
