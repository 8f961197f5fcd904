"""Records of runs that were never run: loss is a document's difficulty, a seed's luck, and an arm's chosen effect."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_graft.experiments.experiment import Experiment, load_experiment

TEXTS = {"heldout": {"novel": 25, "press": 40}, "email": {"email": 30}, "untouched": {"novel": 20, "press": 30}}
BUCKETS = {"2": {"2-3": 900, "4-15": 1500, "16-63": 3000}, "3": {"2-3": 700, "4-15": 2500}}
STEPS, BINS = 40, 12

YAML = """
name: small-arms
seeds: [1, 2, 3]
primary: heldout
baseline: none
texts: {held_out_fraction: 0.15, longest_document: 6000, foreign: [email]}
tokenizer: {vocab_size: 512}
recipient: {train-iters: 40}
banks:
  real: {donor: smollm2-135m, flags: {num-rows: 1000}}
  shuffled: {from: real, control: shuffled}
arms:
  none: {label: no memory, group: core}
  engram: {label: hashed tables, group: core, flags: {engram-layers: 2}}
  sum: {label: both summed, group: core, bank: real, flags: {graft-layers: 2}}
  sum_shuffled: {label: rows shuffled, group: core, bank: shuffled, flags: {graft-layers: 2}}
  graft: {label: bank alone, group: further, bank: real, seeds: [1]}
  rows_100: {label: 100 rows, group: sweep, sweeps: {bank size: "100"}, varies: rows_1000, bank: real, seeds: [1]}
  rows_500: {label: 500 rows, group: sweep, sweeps: {bank size: "500"}, varies: rows_1000, bank: real, seeds: [1]}
  rows_1000: {label: 1000 rows, group: sweep, sweeps: {bank size: "1,000"}, bank: real, seeds: [1]}
  layer_2: {label: layer 2, group: sweep, sweeps: {donor layer: "2"}, bank: real, seeds: [1]}
  layer_9: {label: layer 9, group: sweep, sweeps: {donor layer: "9"}, bank: real, seeds: [1]}
  tuned: {label: best learning rate, group: round, varies: sum, bank: real}
pairs:
  - {first: sum_shuffled, second: none}
hypotheses:
  - {name: H1, better: engram, worse: none, claim: a table beats no memory}
  - {name: H2, better: sum, worse: engram, claim: a bank added beats the table alone}
  - {name: H3, better: sum, worse: sum_shuffled, claim: the donor's rows pay}
"""
# What each arm's loss differs from the baseline's by, nats per token.
EFFECTS = {
    "none": 0.0, "engram": -0.10, "sum": -0.20, "sum_shuffled": -0.20, "graft": -0.12, "rows_100": -0.11,
    "rows_500": -0.15, "rows_1000": -0.2, "layer_2": -0.17, "layer_9": -0.19, "tuned": -0.25,
}  # fmt: skip
BANK_ROWS = {"rows_100": 100, "rows_500": 500}
_BANKLESS = ("none", "engram")


def write_experiment(directory: Path, text: str = YAML) -> Experiment:
    """The experiment of these records, read from a file as commands read it."""
    path = directory / "arms.yaml"
    path.write_text(text)
    return load_experiment(path)


def make_record(
    arm: str, seed: int, effect: float | None = None, noise: float = 0.02, **changes: Any
) -> dict[str, Any]:
    """A record as ``record.py`` writes them; documents and difficulties are the same in all of them."""
    effect = EFFECTS[arm] if effect is None else effect
    banked = arm not in _BANKLESS
    control = "shuffled" if "shuffled" in arm else None
    rows = BANK_ROWS.get(arm, 1000)
    bank = {"digest": f"{arm}", "rows": rows, "row_dim": 16, "donor": "d", "donor_layers": [3], "control": control}
    tokens = (np.arange(1, BINS + 1) * 1000.0).tolist()
    site = {
        "gate_mean": 0.4,
        "gate_p10": 0.1,
        "gate_p50": 0.4,
        "gate_p90": 0.8,
        "delta_ratio": 0.2,
        "participation": 5.5,
    }
    record = {
        "experiment": "small-arms", "arm": arm, "group": "core", "seed": seed, "name": f"{arm}-seed{seed}",
        "commit": "0123456789abcdef", "command": _command(arm, seed), "machine": {"cpu": "a processor", "cores": 2},
        "steps": STEPS, "tokens_seen": int(tokens[-1]),
        "parameters": {"backbone": 6_000_000, "sites": 1000, "tables": 0, "trained": 6_001_000,
                       "stored": rows * 16 if banked else 0, "fetched_per_token": 16 if banked else 0},
        "flops_per_token": {"backbone": 12_000_000, "sites": 0, "total": 12_000_000},
        "bank": bank if banked else None,
        "training": {"tokens": tokens, "loss": _curve(effect, seed)},
        "sites": {"2": site} if banked else None,
        "speed": {"tokens_per_second": 1000.0 + seed},
        "seconds": {"training": 60.0, "evaluation": 6.0},
        "hit_rate": None,
        "texts": {name: text_record(name, arm, seed, effect, noise, rows if banked else 0) for name in TEXTS},
    }  # fmt: skip
    return record | changes


def _command(arm: str, seed: int) -> str:
    flags = {"engram": " --engram-layers 2", "sum": " --graft-layers 2", "sum_shuffled": " --graft-layers 2"}
    return f"pretrain --seed {seed} --eval-iters 0 --train-iters {STEPS}{flags.get(arm, '')}"


def text_record(name: str, arm: str, seed: int, effect: float, noise: float, rows: int) -> dict[str, Any]:
    """One text of a record: ``noise`` is the deviation of documents' mean losses that an arm and a seed have alone.

    An arm without a bank (``rows`` 0) is split by the matches of one of 1,000 rows.
    """
    documents = _draws(name).integers(50, 400, size=sum(TEXTS[name].values()))
    sources = [source for source, number in TEXTS[name].items() for _ in range(number)]
    difficulty = 5 + _draws(name, "difficulty").normal(0, 0.5, documents.size) + 0.01 * seed
    own = _draws(name, arm, seed).normal(0, noise, documents.size)
    losses = documents * (difficulty + effect + own)
    text = _measured(documents, losses, effect, rows)
    text["documents"] = {"source": sources, "tokens": documents.tolist(), "bytes": (4 * documents).tolist(),
                         "loss": losses.tolist()}  # fmt: skip
    text["memory_off"] = None
    if rows:
        changed = {"off": losses + 0.5 * documents, "shuffled": losses + 0.05 * documents}
        off, other = (
            _measured(documents, one, effect, rows) | {"documents": {"loss": one.tolist()}} for one in changed.values()
        )
        text |= {"memory_off": off, "other_bank": {"shuffled": other}}
    return text


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """The file of records, a line each."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def all_records(experiment: Experiment, **changes: Any) -> list[dict[str, Any]]:
    """Every run of an experiment."""
    return [make_record(name, seed, **changes) for name, arm in experiment.arms.items() for seed in arm.seeds]


def _measured(tokens_D: np.ndarray, losses_D: np.ndarray, effect: float, rows: int) -> dict[str, Any]:
    tokens, loss = int(tokens_D.sum()), float(losses_D.sum() / tokens_D.sum())
    hit = 3 * (rows or 1000)
    parts = {"miss": tokens - hit, "2": hit // 2, "3": hit - hit // 2}
    by_order = {
        order: {"tokens": number, "loss": 6 - place + effect * place}
        for place, (order, number) in enumerate(parts.items())
    }
    grid: dict[str, Any] = {"miss": by_order["miss"]}
    for order, buckets in BUCKETS.items():
        grid[order] = {
            bucket: {"tokens": number, "loss": 5 + effect * (place + 1)}
            for place, (bucket, number) in enumerate(buckets.items())
        }
    bits = loss / np.log(2) / 4
    return {"tokens": tokens, "bytes": 4 * tokens, "loss": loss, "bits_per_byte": float(bits), "by_order": by_order,
            "by_order_and_count": grid}  # fmt: skip


def _curve(effect: float, seed: int) -> list[float]:
    shares = np.arange(1, BINS + 1) / BINS
    return (9 - 4 * shares + effect * shares + 0.05 * _draws("curve", seed).normal(size=BINS)).tolist()


def _draws(*names: object) -> np.random.Generator:
    return np.random.default_rng([ord(letter) for letter in "/".join(map(str, names))])
