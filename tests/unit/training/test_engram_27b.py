"""The flags that write Engram-27B's tables down give the sizes that the paper states."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

from megatron_graft.ngram.hashing import DIALECTS, EngramConfig, layer_hashes
from megatron_graft.training.arguments import add_graft_arguments, graft_settings
from tests.unit.training.test_arguments import MEGATRON_DEFAULTS

SCRIPT = Path(__file__).resolve().parents[3] / "examples" / "engram_27b.sh"


def flags() -> list[str]:
    """What a launch script gets that sources the file."""
    program = 'source "$1"; printf "%s\\n" "${ENGRAM_27B[@]}"'
    printed = subprocess.run(["bash", "-euc", program, "bash", SCRIPT], capture_output=True, text=True, check=True)
    return printed.stdout.splitlines()


def test_the_tables_have_the_papers_layers_slots_and_parameters() -> None:
    args = add_graft_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_args(flags())
    vars(args).update(MEGATRON_DEFAULTS | {"num_layers": 30})
    engram = graft_settings(args).engram
    assert engram is not None
    assert (engram.layers, engram.layer_ids) == ((2, 15), (1, 14))  # counted from 1 in the paper, from 0 in the code
    assert (engram.lr_mult, engram.wd_mult, engram.across_documents) == (5, 0, True)
    config = EngramConfig(
        dialect=DIALECTS[engram.dialect], max_order=engram.max_order, heads=engram.heads,
        vocab_sizes=engram.vocab_sizes, dim=engram.dim, seed=engram.seed, pad_id=2,
        across_documents=engram.across_documents, layer_ids=tuple(zip(engram.layers, engram.layer_ids, strict=True)),
    )  # fmt: skip
    hashes = layer_hashes(config, 99_092)
    slots = sum(config.vocab_sizes)
    assert slots == 2_262_400
    parameters = sum(layer.num_rows for layer in hashes.values()) * config.head_dim
    assert 5.7e9 < parameters < 5.8e9
    assert 0 <= parameters - len(hashes) * slots * config.dim < 1e-3 * parameters  # primes lie just above the sizes
