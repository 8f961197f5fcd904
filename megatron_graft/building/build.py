"""The whole way from data sets to a bank: count -> select -> encode -> assemble."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import megatron_graft
from megatron_graft.bank.manifest import (
    MAX_VOCAB_SIZE,
    Control,
    DonorIdentity,
    Manifest,
    Processing,
    TokenizerIdentity,
)
from megatron_graft.bank.quantise import BUILD_DTYPES, StoredRows, stored_as
from megatron_graft.bank.reader import Bank, open_bank
from megatron_graft.bank.writer import write_bank
from megatron_graft.building.controls import control_rows
from megatron_graft.building.count import OrderCounts, check_orders, count_ngrams
from megatron_graft.building.documents import MegatronDocuments
from megatron_graft.building.encode import Encoder, rows_from_states
from megatron_graft.building.select import NgramTokenizer, Selection, select_ngrams
from megatron_graft.errors import BankError, BankVersionError, ConfigError
from megatron_graft.log import format_seconds, get_logger

_MAKE_ROOM = "Remove it or choose another --output."


@dataclass(frozen=True, kw_only=True)
class BankBuildConfig:
    """What to build. Every field but ``output`` and the paths in ``data_prefixes`` can change the result."""

    data_prefixes: tuple[str, ...]
    """Megatron data sets to count, without ``.bin``/``.idx``."""
    split: str | None
    """``--split`` of the training run, so that only its training share is counted; None counts everything."""
    orders: tuple[int, ...]
    """Lengths of the n-grams: ascending, without a gap, 2 to 8."""
    num_rows: int
    """How many n-grams to keep, over all orders."""
    min_count: int
    """Rarer n-grams are never kept."""
    donor_layers: tuple[int, ...]
    """Donor blocks, counted from 1, whose outputs stand side by side in a row; 0 is the embedding."""
    raw: bool
    """Keep the donor's states as they are, neither centred nor normalised."""
    control: Control | None
    """Make a control bank instead of the real one."""
    row_dtype: str
    """What rows are stored as: ``bfloat16``, or ``int8`` with a scale for every row and donor layer."""
    output: Path
    """The bank's directory."""


def build_bank(config: BankBuildConfig, *, tokenizer: NgramTokenizer, encoder: Encoder) -> Manifest:
    """Build a bank, or return the manifest of the one that was already built with the same settings.

    Args:
        config: what to build.
        tokenizer: the recipient's. That it made the data sets is for the caller to check; ids outside its
            vocabulary are refused here.
        encoder: the donor.

    Raises:
        ConfigError: the configuration is unusable.
        BankError: ``config.output`` holds something else, or no n-gram qualifies.
        DataError: a data set cannot be read.
        DonorError: the donor lacks a layer or cannot read a text.
        StorageError: the bank could not be written; nothing is left behind.
    """
    check_orders(config.orders)
    for flag, value in (("--num-rows", config.num_rows), ("--min-count", config.min_count)):
        if value < 1:
            raise ConfigError(flag, "is too small", got=value, expected="at least 1")
    if config.row_dtype not in BUILD_DTYPES:
        raise ConfigError("--row-dtype", "cannot be built", got=config.row_dtype, expected=" or ".join(BUILD_DTYPES))
    if tokenizer.vocab_size > MAX_VOCAB_SIZE:
        largest = f"at most {MAX_VOCAB_SIZE}"
        raise ConfigError("--tokenizer-model", "has too many tokens", got=tokenizer.vocab_size, expected=largest)
    encoder.check_layers(config.donor_layers)
    documents = MegatronDocuments(config.data_prefixes, split=config.split, vocab_size=tokenizer.vocab_size)
    settings = _settings(config, documents, tokenizer, encoder)
    if config.output.exists():
        return _existing(config.output, settings).manifest
    clock = _Clock()
    counts = count_ngrams(documents, orders=config.orders, eod=tokenizer.eod, min_count=config.min_count)
    clock.lap("count")
    selection = select_ngrams(counts, tokenizer, config.num_rows)
    clock.lap("select")
    processing = Processing(centred=not config.raw, normalised=not config.raw)
    rows = _encode(config, encoder, selection.texts, processing, clock)
    manifest = write_bank(
        config.output,
        keys=selection.keys,
        layers=rows.layers,
        scales=rows.scales,
        row_dtype=rows.row_dtype,
        threads=len(os.sched_getaffinity(0)),
        tokenizer=TokenizerIdentity(
            fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size, eod=tokenizer.eod
        ),
        donor=DonorIdentity(
            name=encoder.name,
            revision=encoder.revision,
            layers=config.donor_layers,
            hidden_size=encoder.hidden_size,
        ),
        processing=processing,
        control=config.control,
        provenance={
            "settings": settings,
            "corpus": _corpus_facts(documents, counts),
            "selection": _selection_facts(selection, config.orders),
            **_build_facts(clock),
        },
    )
    _announce(config.output, manifest, clock)
    return manifest


def _encode(
    config: BankBuildConfig, encoder: Encoder, texts: Sequence[str], processing: Processing, clock: _Clock
) -> StoredRows:
    """Rows of every layer, as they are to be stored."""
    states = encoder.encode(texts, config.donor_layers)
    clock.lap("encode")
    layers = {layer: rows_from_states(states.pop(layer), processing) for layer in config.donor_layers}
    rows = StoredRows(row_dtype="bfloat16", layers=layers)
    if config.control is not None:
        rows = control_rows(rows, config.control)
    rows = stored_as(config.row_dtype, rows.layers)
    clock.lap("process")
    return rows


def build_control(source: Path, control: Control, output: Path) -> Manifest:
    """Make a control bank from a bank on disk, without its donor.

    Args:
        source: a real bank.
        control: kind and seed.
        output: the directory to create.

    Raises:
        BankError: ``source`` is no usable bank or is itself a control, or ``output`` holds something else.
        ConfigError: that control cannot be made from these rows.
        StorageError: the bank could not be written; nothing is left behind.
    """
    bank = open_bank(source, verify="full")
    identity = bank.manifest.identity
    if identity.control is not None:
        raise BankError(
            "--from-bank", "is itself a control bank", got=identity.control.kind, remedy="Give the real bank."
        )
    settings = {"from_bank": bank.digest, "control": control.kind, "seed": control.seed}
    if output.exists():
        return _existing(output, settings).manifest
    clock = _Clock()
    rows = control_rows(_stored_rows(bank), control)
    clock.lap("process")
    manifest = write_bank(
        output,
        keys=bank.keys,
        layers=rows.layers,
        scales=rows.scales,
        row_dtype=rows.row_dtype,
        threads=len(os.sched_getaffinity(0)),
        tokenizer=identity.tokenizer,
        donor=identity.donor,
        processing=identity.processing,
        control=control,
        provenance={"settings": settings, **_build_facts(clock)},
    )
    _announce(output, manifest, clock)
    return manifest


def _settings(
    config: BankBuildConfig, documents: MegatronDocuments, tokenizer: NgramTokenizer, encoder: Encoder
) -> dict[str, Any]:
    """Everything asked for that can change the bank, for telling whether one on disk is the one asked for."""
    return {
        "data": documents.fingerprint(),
        "split": config.split,
        "tokenizer": tokenizer.fingerprint,
        "orders": list(config.orders),
        "num_rows": config.num_rows,
        "min_count": config.min_count,
        "donor": encoder.revision,
        "donor_layers": list(config.donor_layers),
        **encoder.settings(),
        "raw": config.raw,
        "row_dtype": config.row_dtype,
        "control": config.control.kind if config.control else None,
        "seed": config.control.seed if config.control else None,
    }


def _existing(output: Path, settings: Mapping[str, Any]) -> Bank:
    """Open the bank at ``output`` if it was built with ``settings``; refuse it otherwise."""
    try:
        bank = open_bank(output)
    except BankVersionError as error:
        raise BankError(output, "holds a bank of another format version", remedy=_MAKE_ROOM) from error
    found = bank.manifest.provenance.get("settings", {})
    different = [name for name in sorted({*settings, *found}) if settings.get(name) != found.get(name)]
    if different:
        raise BankError(
            output,
            "is a bank with other settings",
            got=", ".join(f"{name} {found.get(name)}" for name in different),
            expected=", ".join(f"{name} {settings.get(name)}" for name in different),
            remedy=_MAKE_ROOM,
        )
    get_logger().info("%s is complete (%s): nothing to do", output, bank.digest[:12])
    return bank


def _stored_rows(bank: Bank) -> StoredRows:
    """All rows of a bank, without a copy where a layer is one file."""
    layers, scales = {}, {}
    for layer, rows in bank.rows_by_layer.items():
        layers[layer] = _joined(rows.shards)
        if rows.scales:
            scales[layer] = _joined(rows.scales)
    return StoredRows(row_dtype=bank.manifest.identity.row_dtype, layers=layers, scales=scales)


def _joined(shards: Sequence[np.ndarray]) -> np.ndarray:
    return shards[0] if len(shards) == 1 else np.concatenate(shards)


def _corpus_facts(documents: MegatronDocuments, counts: Sequence[OrderCounts]) -> dict[str, Any]:
    return {
        "data_prefixes": documents.prefixes,
        "documents": documents.num_documents,
        "tokens": documents.num_tokens,
        "candidates_by_order": {str(level.order): len(level.counts) for level in counts},
    }


def _selection_facts(selection: Selection, orders: Sequence[int]) -> dict[str, Any]:
    keys = selection.keys
    return {
        "rows_by_order": {str(order): int((keys.key_orders == order).sum()) for order in orders},
        "smallest_count": int(keys.key_counts.min()),
        "skipped": selection.skipped,
    }


def _build_facts(clock: _Clock) -> dict[str, Any]:
    return {"seconds": dict(clock.laps), "megatron_graft": megatron_graft.__version__}


class _Clock:
    """Wall seconds of each stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.laps[stage] = round(now - self._last, 2)
        self._last = now


def _announce(output: Path, manifest: Manifest, clock: _Clock) -> None:
    clock.lap("write")
    identity = manifest.identity
    stages = ", ".join(f"{stage} {format_seconds(seconds)}" for stage, seconds in clock.laps.items())
    get_logger().info(
        "%s: %s rows x %s %s, digest %s (%s)",
        output, f"{identity.num_rows:,}", identity.row_dim, identity.row_dtype, manifest.digest[:12], stages,
    )  # fmt: skip
