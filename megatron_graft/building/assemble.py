"""The last steps of a build: rows from states, the control if one is wanted, and the bank written in one step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import megatron_graft
from megatron_graft.bank.keys import BankKeys
from megatron_graft.bank.quantise import StoredRows, stored_as
from megatron_graft.bank.writer import write_bank
from megatron_graft.building.build_plan import BuildPlan
from megatron_graft.building.controls import control_rows
from megatron_graft.building.existing import existing_bank
from megatron_graft.building.norms import LayerNorms, norm_quantiles
from megatron_graft.building.rows import DonorStates, ProcessedLayer, process_layer
from megatron_graft.processes import available_processors


def assemble_bank(
    plan: BuildPlan,
    *,
    keys: BankKeys,
    states: DonorStates,
    lengths_of_row: np.ndarray,
    selection: Mapping[str, Any],
    donor_facts: Mapping[str, Any],
    scratch: Path,
) -> dict[str, Any]:
    """Write the bank, unless the same one is there already.

    Args:
        plan: of the build.
        keys: N chosen n-grams in bank order.
        states: the donor's, in the same order.
        lengths_of_row: int32 ``[N]``, donor tokens of each text.
        selection: facts of the selection, for the bank's provenance.
        donor_facts: facts of the donor's work, likewise.
        scratch: a directory on disk, where rows lie until they are written.

    Returns:
        the bank's digest, and quantiles of the states' norms by donor layer, n-gram order and donor length.

    Raises:
        BankError: the output holds another bank.
        DonorError: a state is not finite.
        ConfigError: the rows cannot be stored as asked, or the control cannot be made of them.
        StorageError: the bank could not be written; nothing is left behind.
    """
    config = plan.config
    layers = _process(plan, states, scratch)
    facts = {
        "state_norms": {
            str(layer): LayerNorms(
                by_order=norm_quantiles(processed.raw_norms, keys.key_orders),
                by_donor_length=norm_quantiles(processed.raw_norms, lengths_of_row),
            ).to_json()
            for layer, processed in layers.items()
        }
    }
    if config.output.exists():  # a build that was killed between the bank and the end of this task
        digest = existing_bank(config.output, plan.settings).digest
    else:
        digest = _write(plan, keys, layers, selection, donor_facts)
    for layer in layers:
        _rows_path(scratch, layer).unlink()
    return {"digest": digest, **facts}


def _write(
    plan: BuildPlan,
    keys: BankKeys,
    layers: Mapping[int, ProcessedLayer],
    selection: Mapping[str, Any],
    donor_facts: Mapping[str, Any],
) -> str:
    """Write the bank; return its digest."""
    config = plan.config
    rows = _stored_rows(plan, layers)
    return write_bank(
        config.output,
        keys=keys,
        layers=rows.layers,
        scales=rows.scales,
        row_dtype=rows.row_dtype,
        threads=available_processors(),
        tokenizer=plan.tokenizer,
        donor=plan.donor,
        processing=config.processing,
        control=config.control,
        # Nothing of when, where or by how many it was made: the same build gives the same bytes.
        provenance={
            "settings": plan.settings,
            "corpus": plan.corpus,
            "selection": selection,
            "donor": donor_facts,
            "statistics": {str(layer): processed.statistics() for layer, processed in layers.items()},
            "megatron_graft": megatron_graft.__version__,
        },
    ).digest


def _rows_path(scratch: Path, layer: int) -> Path:
    return scratch / f"rows-{layer}.npy"


def _process(plan: BuildPlan, states: DonorStates, scratch: Path) -> dict[int, ProcessedLayer]:
    # int8 is made of bfloat16 rows, after a control has been drawn from them.
    kept_as = "float16" if plan.config.row_dtype == "float16" else "bfloat16"
    return {
        layer: process_layer(states, layer, plan.config.processing, row_dtype=kept_as, path=_rows_path(scratch, layer))
        for layer in plan.config.donor_layers
    }


def _stored_rows(plan: BuildPlan, layers: Mapping[int, ProcessedLayer]) -> StoredRows:
    config = plan.config
    kept_as = "float16" if config.row_dtype == "float16" else "bfloat16"
    rows = StoredRows(row_dtype=kept_as, layers={layer: processed.rows for layer, processed in layers.items()})
    if config.control is not None:
        rows = control_rows(rows, config.control)
    return rows if config.row_dtype == kept_as else stored_as(config.row_dtype, rows.layers)
