"""Small finished runs on disk, as training and evaluation leave them; every loss is chosen, so figures are known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_graft.bank.manifest import Control
from tests.helpers.banks import make_bank

STEPS, LOG_INTERVAL = 40, 10
COUNTS = {(1, 2): 9, (3, 1, 2): 5, (4, 4): 1}
TABLES = {
    "dialect": "deepseek", "max_order": 3, "heads": 2, "vocab_sizes": [101, 67], "dim": 8, "seed": 0, "pad_id": 2,
    "across_documents": False, "layer_ids": [[2, 1], [3, 2]], "compressed_vocabulary": "c" * 64,
}  # fmt: skip
ORDERS = {"miss": 500, "2": 300, "3": 200}
HELD_OUT_BYTES = 4000
MakeRun = Callable[..., Path]


def metrics_lines(memory: bool, sites: bool, first: float, steps: int = STEPS) -> list[dict[str, Any]]:
    lines = []
    for step in range(1, steps + 1):
        line = {"iteration": step, "consumed_samples": 16 * step, "lm loss": first - step / 10, "grad_norm": 1.0}
        if step % LOG_INTERVAL == 0:
            interval = step // LOG_INTERVAL
            line |= {"graft/stall_ms": float(interval), "graft/fetch_ms": 2.0, "tokens_per_second": 100.0 * interval}
        if step % LOG_INTERVAL == 0 and memory:
            line |= {"graft/hit_rate": 0.1 * interval, "graft/hit_rate_order_2": 0.06 * interval}
            line |= {"graft/hit_rate_order_3": 0.04 * interval}
        if step % LOG_INTERVAL == 0 and sites:
            for layer in (2, 3):
                line |= {
                    f"graft/gate_mean_layer_{layer}": layer / 10,
                    f"graft/delta_ratio_layer_{layer}": interval / 100,
                }
                line |= {f"graft/gate_p{share}_layer_{layer}": share / 100 for share in (10, 50, 90)}
                line |= {f"graft/participation_layer_{layer}": 1.5}
        lines.append(line)
    return lines


def losses(loss: float, memory: bool, slope: float = 0.0) -> dict[str, Any]:
    parts = ORDERS if memory else {"miss": sum(ORDERS.values())}
    by_order = {
        order: {"tokens": tokens, "loss": loss - slope * place} for place, (order, tokens) in enumerate(parts.items())
    }
    return {"tokens": 1000, "loss": loss, "bits_per_byte": loss / 2, "by_order": by_order}


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """``make_run(name, loss=..., bank=..., engram="exclusive", flags=[...], evaluation={...})`` -> its directory.

    ``engram`` gives the run hashed tables: how they are combined with the bank, "" without one.
    """

    def make(
        name: str,
        loss: float = 5.0,
        bank: str | None = "bank",
        control: Control | None = None,
        engram: str | None = None,
        flags: tuple[str, ...] = (),
        evaluation: dict[str, Any] | None = None,
    ) -> Path:
        run, memory = tmp_path / "runs" / name, bank is not None
        run.mkdir(parents=True)
        arguments = ["--num-layers", "4", "--hidden-size", "256", "--num-experts", "4", "--moe-router-topk", "2"]
        arguments += ["--seq-length", "256", "--global-batch-size", "16", "--train-iters", str(STEPS), "--lr", "2e-3"]
        arguments += ["--train-data-path", str(tmp_path / "data" / "train"), "--tokenizer-type", "SentencePiece"]
        held_out = losses(loss, memory, 0.25) | {"bytes": HELD_OUT_BYTES}
        identity: dict[str, Any] | None = None
        if bank is not None:
            directory = tmp_path / bank
            opened = make_bank(directory, COUNTS, control=control) if not directory.exists() else None
            digest = opened.digest if opened else json.loads((directory / "bank.json").read_text())["digest"]
            identity = {"banks": [digest], "engram": None, "sites": {}}
            arguments += ["--graft-bank", str(directory), "--graft-layers", "2", "3"]
            held_out["memory_off"] = losses(loss + 0.5, memory)
        if engram is not None:
            identity = {"banks": [], **(identity or {}), "engram": TABLES, "sites": {"2": {"combine": engram or None}}}
            arguments += ["--engram-layers", "2", "3"]
            held_out["memory_off"] = losses(loss + 0.5, memory)
        result = {
            "iteration": STEPS,
            "train_iters": STEPS,
            "memory": identity,
            "parameters": {"total": 10_000, "memory_sites": 500 if memory else 0},
            "data": {"heldout": held_out},
            "training_text": {"tokens_seen": STEPS * 16 * 256, "tokens_available": 1_000_000, "passes": 0.16384},
            "bigram_loss": {"heldout": 5.25},
        } | (evaluation or {})
        (run / "run.json").write_text(json.dumps({"arguments": [*arguments, *flags], "started": 0.0}))
        (run / "evaluation.json").write_text(json.dumps(result))
        lines = metrics_lines(memory, identity is not None, loss + 4)
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return run

    return make
