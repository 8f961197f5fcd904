"""What a finished bank is like: how much text it knows, by its size too; its norms, keys, bytes and times."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import megatron_graft
from megatron_graft.bank.manifest import MANIFEST_NAME
from megatron_graft.bank.reader import Bank, open_bank
from megatron_graft.building.coverage import (
    MOST_POSITIONS,
    Coverage,
    Documents,
    bank_sizes,
    coverage_by_rows,
    sample_documents,
)
from megatron_graft.building.log_summary import LogRecord, StageSummary, summarise_stages
from megatron_graft.building.norms import LayerNorms, stored_norms
from megatron_graft.files import beside, write_json_atomically

NUM_KEYS = 20
TextOf = Callable[[Sequence[int]], str | None]


def report_path(bank: Path) -> Path:
    """Where a bank's report lies: beside it, since it is no part of what the bank is."""
    return beside(bank, ".report.json")


def report_bank(
    bank_path: Path,
    sources: Mapping[str, Documents],
    *,
    log_records: Iterable[LogRecord] = (),
    raw_norms: Mapping[int, LayerNorms] | None = None,
    earlier: Mapping[str, Any] | None = None,
    text_of: TextOf | None = None,
    most_positions: int = MOST_POSITIONS,
    seed: int = 0,
    threads: int = 1,
) -> dict[str, Any]:
    """Measure a bank.

    Args:
        bank_path: the bank.
        sources: data sets to measure coverage on, by name.
        log_records: of its build.
        raw_norms: donor layer -> norms of its states before processing, as the assemble stage kept them.
        earlier: a report of the same bank (see :func:`kept_report`). What it tells of data sets that are not among
            ``sources``, and of raw norms and stages where nothing newer is given, stays.
        text_of: gives an n-gram's text (``ngram_text`` of the tokenizer); without it keys are shown as ids.
        most_positions: of each data set that are looked up.
        seed: of the random keys.
        threads: of the lookups.

    Returns:
        a JSON object: ``bank``, ``coverage`` (data set -> shares by order, and what was sampled),
        ``coverage_by_rows`` (data set -> one such object for every number of ``rows``), ``norms`` (``raw`` and
        ``stored``: layer -> quantiles by order and by donor length), ``keys`` (``most_frequent`` and ``random``),
        ``bytes`` (file -> size), ``stages`` (stage -> seconds and facts), ``selection``, ``donor_tokens``.

    Raises:
        BankError: there is no usable bank.
        DataError: a data set holds an id outside the vocabulary.
    """
    bank = open_bank(bank_path)
    curves = {
        name: _curve(bank_path, documents, bank.num_rows, most_positions, threads)
        for name, documents in sources.items()
    }
    before = earlier or {"coverage_by_rows": {}, "norms": {"raw": None}, "stages": {}, "donor_tokens": None}
    curves = {**before["coverage_by_rows"], **curves}
    stages = summarise_stages(log_records)
    provenance = bank.manifest.provenance
    return {
        "bank": _bank_facts(bank),
        "coverage": {name: curve[-1] for name, curve in curves.items()},
        "coverage_by_rows": curves,
        "norms": {
            "raw": _norms_json(raw_norms) if raw_norms else before["norms"]["raw"],
            "stored": _norms_json(stored_norms(bank)),
        },
        "keys": _keys(bank, text_of, seed),
        "bytes": _file_bytes(bank),
        "stages": {name: stage.to_json() for name, stage in stages.items()} or before["stages"],
        "selection": provenance.get("selection"),
        "corpus": provenance.get("corpus"),
        "donor_tokens": _donor_tokens(stages, bank.num_rows) or before["donor_tokens"],
        "megatron_graft": megatron_graft.__version__,
    }


def kept_report(bank_path: Path, digest: str) -> dict[str, Any] | None:
    """The report that lies beside a bank, if there is one and it is of the bank with this digest."""
    try:
        report = json.loads(report_path(bank_path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and report.get("bank", {}).get("digest") == digest else None


def coverages_of(report: Mapping[str, Any]) -> dict[str, Coverage]:
    """The coverage of the whole bank on every data set of a report, for its table and its file."""
    return {
        name: Coverage(
            positions=shares["positions"],
            hits_by_order={
                int(order): round(share * shares["positions"]) for order, share in shares["share_by_order"].items()
            },
        )
        for name, shares in report["coverage"].items()
    }


def write_report(bank_path: Path, report: Mapping[str, Any]) -> Path:
    """Write ``<bank>.report.json``; return its path."""
    path = report_path(bank_path)
    write_json_atomically(path, report)
    return path


def _curve(
    bank_path: Path, documents: Documents, num_rows: int, most_positions: int, threads: int
) -> list[dict[str, Any]]:
    """Coverage of one data set for every size of the bank, smallest first."""
    sample = list(sample_documents(documents, most_positions))
    taken = {"documents": len(sample), "of_documents": documents.num_documents, "of_positions": documents.num_tokens}
    measured = coverage_by_rows(bank_path, sample, bank_sizes(num_rows), threads=threads)
    return [{"rows": rows} | coverage.to_json() | taken for rows, coverage in measured.items()]


def _bank_facts(bank: Bank) -> dict[str, Any]:
    identity = bank.manifest.identity
    numbers, rows = np.unique(bank.key_orders, return_counts=True)
    return {
        "name": bank.path.name,
        "digest": bank.digest,
        "num_rows": bank.num_rows,
        "rows_by_order": {str(int(order)): int(number) for order, number in zip(numbers, rows, strict=True)},
        "orders": list(bank.orders),
        "row_dim": bank.row_dim,
        "row_dtype": identity.row_dtype,
        "phantoms": bank.manifest.index.phantoms,
        "smallest_count": int(bank.key_counts[-1]),
        "largest_count": int(bank.key_counts[0]),
        "control": None if identity.control is None else identity.control.kind,
        "centred": identity.processing.centred,
        "normalised": identity.processing.normalised,
        "tokenizer": identity.tokenizer.fingerprint,
        "donor": {
            "name": identity.donor.name,
            "revision": identity.donor.revision,
            "layers": list(identity.donor.layers),
            "hidden_size": identity.donor.hidden_size,
        },
    }


def _norms_json(norms: Mapping[int, LayerNorms]) -> dict[str, Any]:
    return {str(layer): of_layer.to_json() for layer, of_layer in norms.items()}


def _keys(bank: Bank, text_of: TextOf | None, seed: int) -> dict[str, Any]:
    frequent = np.arange(min(NUM_KEYS, bank.num_rows))
    drawn = np.random.default_rng(seed).choice(bank.num_rows, size=len(frequent), replace=False)
    return {
        "most_frequent": [_key(bank, int(row), text_of) for row in frequent],
        "random": [_key(bank, int(row), text_of) for row in np.sort(drawn)],
        "seed": seed,
    }


def _key(bank: Bank, row: int, text_of: TextOf | None) -> dict[str, Any]:
    order = int(bank.key_orders[row])
    ids = bank.key_ids[row, bank.max_order - order :].tolist()
    text = None if text_of is None else text_of(ids)
    return {"row": row, "text": text, "ids": ids, "order": order, "count": int(bank.key_counts[row])}


def _file_bytes(bank: Bank) -> dict[str, int]:
    manifest = bank.manifest
    sizes = {file.name: file.bytes for file in (*manifest.identity.files, manifest.index)}
    return {MANIFEST_NAME: (bank.path / MANIFEST_NAME).stat().st_size, **sizes}


def _donor_tokens(stages: Mapping[str, StageSummary], num_rows: int) -> dict[str, float] | None:
    """Donor tokens that ran, in all and a row, as the pack stage counted them; None if the log does not tell."""
    packed = stages.get("pack")
    if packed is None or "donor_tokens" not in packed.facts:
        return None
    tokens = packed.facts["donor_tokens"]
    return {"tokens": tokens, "per_row": tokens / max(1, num_rows)}
