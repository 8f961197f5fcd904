"""The contents of ``report.json``: every figure of a run, from its files.

Losses are in nats per token. Keys are plain names, so that a figure has an address: ``held_out.by_order.2.loss``.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import shlex
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_graft.files import beside
from megatron_graft.reporting.run_files import HELD_OUT, Run, read_json

LOSS = "lm loss"
MISS = "miss"
SIGNIFICANT_DIGITS = 5
_LAST_STEPS = 20
_TEXT_KEYS = {HELD_OUT: "held_out", "foreign": "foreign"}
_SITE_FIGURES = ("gate_mean", "gate_p10", "gate_p50", "gate_p90", "delta_ratio", "participation")
_NOT_CONFIGURATION = ("graft_bank", "data_path", "train_data_path", "bf16", "fp16", "train_iters")


def figures_of(run: Run, work_dir: Path | None, command: str | None) -> dict[str, Any]:
    """Every figure of a run, in full precision.

    Args:
        run: the finished run.
        work_dir: where it was prepared; its ``stages.json`` tells how long that took.
        command: the command that makes the run, or None for the bare ``torchrun`` one.
    """
    evaluation = run.evaluation
    texts = {name: _text(evaluation, name) for name in evaluation["data"]}
    return {
        "name": run.name,
        "arm": run.arm,
        "command": command or _torchrun_command(run, work_dir),
        "machine": machine(),
        "config": _config(run),
        "parameters": evaluation["parameters"],
        "bank": _bank(run),
        "further_banks": run.bank_digests[1:],
        "engram": run.memory and run.memory["engram"],
        "tokenizer": _tokenizer(run),
        "tokens": {name.removeprefix("tokens_"): value for name, value in evaluation["training_text"].items()},
        "training_loss": _training_loss(run),
        **{key: texts.pop(name, None) for name, key in _TEXT_KEYS.items()},
        "other_texts": texts,
        "hit_rate": _hit_rates(run),
        "sites": _sites(run),
        "speed": _speed(run),
        "seconds": _seconds(run, work_dir),
    }


def round_all(value: Any) -> Any:
    """The same JSON value with floats at :data:`SIGNIFICANT_DIGITS`; None for those that are not finite."""
    if isinstance(value, dict):
        return {key: round_all(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [round_all(member) for member in value]
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else None
    return value


def texts_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The evaluated texts of a report by key, held-out first."""
    by_key = {key: report[key] for key in _TEXT_KEYS.values()} | report["other_texts"]
    return {key: text for key, text in by_key.items() if text is not None}


def machine() -> dict[str, Any]:
    """Processor, cores and library versions of the machine that this runs on."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core")}
    return {"cpu": _cpu_model(), "cores": os.cpu_count(), "python": platform.python_version()} | versions


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _torchrun_command(run: Run, work_dir: Path | None) -> str:
    processes = ["--nproc-per-node", str(run.world_size)] if run.world_size else []
    command = shlex.join(["torchrun", *processes, "-m", "megatron_graft.training.pretrain", *run.arguments])
    # Where the directories lay on this machine is of no use to a reader.
    for directory, name in ((run.directory, f"runs/{run.name}"), (work_dir, "work")):
        if directory is not None and directory.is_absolute():
            command = command.replace(str(directory), name)
    return command


def _config(run: Run) -> dict[str, Any]:
    """The main flags that were given; a switch that is off and a size of nothing are left out."""
    precision = "bf16" if run.flags["bf16"] else "fp16" if run.flags["fp16"] else "fp32"
    values = {"steps": run.evaluation["train_iters"], **run.flags}
    values |= {"precision": precision, "world_size": run.world_size}
    return {name: value for name, value in values.items() if name not in _NOT_CONFIGURATION and value}


def _bank(run: Run) -> dict[str, Any] | None:
    if run.bank is None:
        return None
    identity = run.bank.identity.to_json()
    kept = ("row_dim", "row_dtype", "orders", "processing", "control", "donor")
    return {"digest": run.bank_digests[0], "num_rows": run.bank_rows} | {name: identity[name] for name in kept}


def _tokenizer(run: Run) -> dict[str, Any]:
    kind = {"type": run.flags["tokenizer_type"]}
    if run.bank is not None:
        identity = run.bank.identity.tokenizer
        return kind | {"fingerprint": identity.fingerprint, "vocab_size": identity.vocab_size}
    prefixes = [*run.flags["train_data_path"], *run.flags["data_path"]]
    for path in (Path(f"{prefix}.tokenizer.json") for prefix in prefixes):
        if path.is_file():
            note = read_json(path, "Tokenise the text again.")
            return kind | {"fingerprint": note["fingerprint"], "vocab_size": note["vocab_size"]}
    return kind | {"fingerprint": None, "vocab_size": None}


def _training_loss(run: Run) -> dict[str, float]:
    losses = [record[LOSS] for record in run.metrics if LOSS in record]  # a skipped step has none
    last = losses[-_LAST_STEPS:]
    return {"first": losses[0], "last": losses[-1], f"mean_last_{_LAST_STEPS}": statistics.fmean(last)}


def _text(evaluation: dict[str, Any], name: str) -> dict[str, Any]:
    measured = evaluation["data"][name]
    off = measured.get("memory_off")
    bigram = evaluation["bigram_loss"].get(name)
    text = {key: measured[key] for key in ("tokens", "bytes", "loss", "bits_per_byte")}
    text["memory_off"] = off and {
        "loss": off["loss"], "bits_per_byte": off["bits_per_byte"], "difference": off["loss"] - measured["loss"],
    }  # fmt: skip
    text["bigram"] = bigram and {"loss": bigram, "difference": bigram - measured["loss"]}
    text["beats_bigram"] = bigram and measured["loss"] < bigram
    text["by_order"] = (
        {
            order: {
                "tokens": part["tokens"],
                "share": part["tokens"] / measured["tokens"],
                "loss": part["loss"],
                "loss_memory_off": off and off["by_order"][order]["loss"],
            }
            for order, part in measured["by_order"].items()
        }
        if set(measured["by_order"]) != {MISS}
        else None
    )  # nobody looked anything up
    return text


def _hit_rates(run: Run) -> dict[str, Any] | None:
    """Share of positions that match, in all and by order: in training, and in texts as evaluated, else as covered."""
    if run.bank is None:
        return None
    orders = [str(order) for order in run.bank.identity.orders]
    rates = {_TEXT_KEYS.get(name, name): share for name, share in _coverage(run, orders).items()}
    for name, text in run.evaluation["data"].items():
        parts = {order: text["by_order"].get(order, {"tokens": 0})["tokens"] for order in orders}
        shares = {order: tokens / text["tokens"] for order, tokens in parts.items()}
        rates[_TEXT_KEYS.get(name, name)] = {"any": sum(shares.values())} | shares
    of_first = "graft/bank_1/hit_rate" if len(run.banks) > 1 else "graft/hit_rate"  # else the mean over all banks
    trained = [_trained(record, of_first, orders) for record in run.intervals]
    means = {name: statistics.fmean(record[name] for record in trained) for name in trained[0]} if trained else None
    return {"training": means, **rates}


def _trained(record: Mapping[str, Any], prefix: str, orders: list[str]) -> dict[str, float]:
    """Shares of an interval, in all and by order; what is told of no order is that of single tokens."""
    shares = {order: record[f"{prefix}_order_{order}"] for order in orders if order != "1"}
    matched = record[prefix]
    return {"any": matched} | ({"1": matched - sum(shares.values())} if "1" in orders else {}) | shares


def _coverage(run: Run, orders: list[str]) -> dict[str, dict[str, float]]:
    """What the bank's builder measured, if it did and it is of this bank."""
    if run.bank is None:
        return {}
    path = beside(Path(run.flags["graft_bank"][0]), ".coverage.json")
    if not path.is_file():
        return {}
    coverage = read_json(path, "Delete it, or build the bank again.")
    if coverage["bank"] != run.bank_digests[0]:
        return {}
    return {
        name: {"any": shares["hit_rate"]} | {order: shares["share_by_order"][order] for order in orders}
        for name, shares in coverage["data_sets"].items()
        if name != "train"  # training itself says more
    }


def _sites(run: Run) -> dict[str, Any] | None:
    """What each site told of itself over the last log interval, by layer number."""
    if run.memory is None or not run.intervals:
        return None
    last = run.intervals[-1]
    return {
        str(layer): {name: last[f"graft/{name}_layer_{layer}"] for name in _SITE_FIGURES} for layer in run.site_layers
    }


def _speed(run: Run) -> dict[str, Any] | None:
    """Medians over the log intervals; the first one also holds the start-up and is left out if there is another."""
    steady = run.intervals[1:] or run.intervals
    if not steady:
        return None
    stalls = [record["graft/stall_ms"] for record in steady]
    return {
        "tokens_per_second": statistics.median(record["tokens_per_second"] for record in steady),
        "stall_ms": {"median": statistics.median(stalls), "max": max(stalls)},
        "fetch_ms": {"median": statistics.median(record["graft/fetch_ms"] for record in steady)},
    }


def _seconds(run: Run, work_dir: Path | None) -> dict[str, float | None]:
    """Wall seconds of each stage. Intervals are of one length, so their mean seconds per token give the training's."""
    stages = work_dir / "stages.json" if work_dir else None
    seconds: dict[str, float | None] = {}
    if stages is not None and stages.is_file():
        seconds |= read_json(stages, "Delete it; the times of the stages are lost.")
    per_token = [1 / record["tokens_per_second"] for record in run.intervals]
    seen = run.evaluation["training_text"]["tokens_seen"]
    seconds["training"] = statistics.fmean(per_token) * seen if per_token else None
    seconds["evaluation"] = run.evaluation.get("seconds")
    return seconds
