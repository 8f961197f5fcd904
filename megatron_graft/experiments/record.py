"""The record of a finished run: one JSON line that holds all that the report needs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_graft.errors import ConfigError
from megatron_graft.experiments.cost import backbone_flops, fetched_per_token, site_flops
from megatron_graft.experiments.experiment import Experiment
from megatron_graft.experiments.runs import Places, PlannedRun
from megatron_graft.files import make_directory, storage_errors, take_lock
from megatron_graft.reporting.figures import LOSS, figures_of
from megatron_graft.reporting.run_files import Run, read_json, read_run

PLAN_FILE = "plan.json"
_BINS = 60
_DIGITS = 7


def make_record(experiment: Experiment, planned: PlannedRun, places: Places) -> dict[str, Any]:
    """The record of a run that is trained and evaluated.

    Raises:
        ConfigError: its directory holds no finished run.
    """
    directory = places.runs / planned.name
    run = read_run(directory)
    if run is None:
        raise ConfigError(directory, "holds no finished run", remedy="Give the same command again to go on.")
    figures = figures_of(run, None, None)
    sources = read_json(places.work / "texts" / "texts.json", "Prepare the texts again.")["texts"]
    plan = read_json(directory / PLAN_FILE, "Train the run again.")
    record = {
        "experiment": experiment.name,
        "arm": planned.arm.name,
        "group": planned.arm.group,
        "seed": planned.seed,
        "name": planned.name,
        "commit": plan["commit"],
        "changed": plan["changed"],
        "command": plan["command"],
        "bank_plan": plan.get("bank_plan"),
        "machine": figures["machine"],
        "steps": run.evaluation["train_iters"],
        "tokens_seen": run.evaluation["training_text"]["tokens_seen"],
        "passes": run.evaluation["training_text"]["passes"],
        "parameters": _parameters(run),
        "flops_per_token": _flops(run, figures),
        "bank": _bank(run),
        "training": _training(run),
        "sites": figures["sites"],
        "speed": figures["speed"],
        "seconds": figures["seconds"],
        "hit_rate": figures["hit_rate"],
        "texts": {name: _text(measured, sources[name]["sources"]) for name, measured in run.evaluation["data"].items()},
    }
    return rounded(record)  # type: ignore[no-any-return]


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line to the file of records; other processes may do the same.

    Raises:
        StorageError: it cannot be written.
    """
    make_directory(path.parent)
    with storage_errors(path), path.open("ab") as stream:
        take_lock(stream.fileno(), path, wait=True)
        if stream.tell() and not path.read_bytes().endswith(b"\n"):
            stream.write(b"\n")  # a killed writer left a line without its end
        stream.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")


def rounded(value: Any) -> Any:
    """A JSON value with floats at seven significant digits."""
    if isinstance(value, dict):
        return {key: rounded(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(member) for member in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def _parameters(run: Run) -> dict[str, int]:
    """``stored`` are all elements of the frozen banks' rows, whether or not a site reads them."""
    counted = run.evaluation["parameters"]
    tables = counted["tables"]
    frozen = run.memory is not None and not any("rows" in site for site in run.memory["sites"].values())
    stored = sum(bank.identity.num_rows * bank.identity.row_dim for bank in run.banks) if frozen else 0
    return {
        "backbone": counted["total"] - counted["memory_sites"],
        "sites": counted["memory_sites"] - tables,
        "tables": tables,
        "trained": counted["total"],
        "stored": run.bank_rows * run.banks[0].identity.row_dim if stored and len(run.banks) == 1 else stored,
        "fetched_per_token": fetched_per_token(run.memory),
    }


def _flops(run: Run, figures: Mapping[str, Any]) -> dict[str, int]:
    vocab_size = figures["tokenizer"]["vocab_size"]
    backbone = backbone_flops(run.flags, vocab_size, gated="--swiglu" in run.arguments)
    sites = site_flops(run.memory, run.flags["hidden_size"])
    return {"backbone": backbone, "sites": sites, "total": backbone + sites}


def _bank(run: Run) -> dict[str, Any] | None:
    if run.bank is None:
        return None
    identity = run.bank.identity
    return {
        "digest": run.bank_digests[0],
        "rows": run.bank_rows,
        "row_dim": identity.row_dim,
        "orders": list(identity.orders),
        "donor": identity.donor.name,
        "donor_layers": list(identity.donor.layers),
        "control": identity.control.kind if identity.control else None,
    }


def _training(run: Run) -> dict[str, list[float]]:
    """Mean training loss over equal spans of steps, and the tokens seen at the end of each.

    Where no token comes twice it is the loss on fresh text, of every batch before the step that learns from it.
    """
    losses = [record[LOSS] for record in run.metrics if LOSS in record]
    batch = run.evaluation["training_text"]["tokens_seen"] / run.evaluation["iteration"]
    spans = np.array_split(np.arange(len(losses)), min(_BINS, len(losses)))
    return {
        "tokens": [float((span[-1] + 1) * batch) for span in spans],
        "loss": [float(np.mean([losses[step] for step in span])) for span in spans],
    }


def _text(measured: Mapping[str, Any], sources: Mapping[str, int]) -> dict[str, Any]:
    text = _summary(measured)
    text["documents"] = {"source": _sources(sources)} | measured["documents"]
    off = measured.get("memory_off")
    text["memory_off"] = off and _summary(off) | {"documents": {"loss": off["documents"]["loss"]}}
    others = measured.get("other_bank", {})
    text["other_bank"] = {
        name: _summary(other) | {"documents": {"loss": other["documents"]["loss"]}} for name, other in others.items()
    }
    return text


def _summary(measured: Mapping[str, Any]) -> dict[str, Any]:
    kept: Iterable[str] = ("tokens", "bytes", "loss", "bits_per_byte", "by_order", "by_order_and_count")
    return {name: measured[name] for name in kept if name in measured}


def _sources(sources: Mapping[str, int]) -> list[str]:
    """The source of every document; data sets are in the order of their texts."""
    return [name for name, documents in sources.items() for _ in range(documents)]
