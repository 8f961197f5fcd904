"""Settings on their own: what they mean together, and that every limit is where its message says."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_graft.compat.parameter_groups import ROWS_RATE, SITE_RATE, TABLE_RATE, Multipliers
from megatron_graft.errors import ConfigError
from megatron_graft.training.settings import EngramSettings, GraftSettings, check_settings

TABLES = EngramSettings(
    layers=(1, 4), layer_ids=(0, 3), dialect="deepseek", max_order=3, heads=2, vocab_sizes=(11, 13), dim=8, seed=0,
    pad_id=None, across_documents=False, lr_mult=5.0, wd_mult=0.0,
)  # fmt: skip
BANKS = GraftSettings(
    banks=(Path("a"), Path("b")), layers=(2, 3), donor_layers=(None, None), engram=None,
    rows="frozen", rows_lr_mult=1.0, rows_wd_mult=0.0, lr_mult=1.0, combine="exclusive",
    gate="plain", conv_kernel=4, conv_dilation=None, lookup="auto", look_ahead=None, verify_every=0,
    adopt_checkpoint=False, allow_raw_bank=False, verify_bank="header", bank_rows=None, bank_node_copy=None,
    bank_lookup_threads=1, bank_huge_pages=False, run_dir=None,
)  # fmt: skip
STOCK = dataclasses.replace(BANKS, banks=(), layers=(), donor_layers=())


def check(settings: GraftSettings, num_layers: int = 4, **changes: Any) -> None:
    check_settings(dataclasses.replace(settings, **changes), num_layers)


def test_a_run_has_sites_if_it_has_a_bank_or_a_table() -> None:
    assert BANKS.has_sites
    assert dataclasses.replace(STOCK, engram=TABLES).has_sites
    assert not STOCK.has_sites


def test_only_groups_with_rates_of_their_own_are_told_to_the_optimizer() -> None:
    """A group that is named is another one in checkpoints."""
    assert BANKS.multipliers == {}
    assert dataclasses.replace(BANKS, engram=TABLES).multipliers == {TABLE_RATE: Multipliers(lr=5.0, wd=0.0)}
    for rows in ("trained", "fresh"):
        assert dataclasses.replace(BANKS, rows=rows).multipliers == {ROWS_RATE: Multipliers(lr=1.0, wd=0.0)}
    all_of_them = dataclasses.replace(
        BANKS, engram=TABLES, rows="fresh", rows_lr_mult=2.0, rows_wd_mult=0.5, lr_mult=3.0
    )
    assert all_of_them.multipliers == {
        TABLE_RATE: Multipliers(lr=5.0, wd=0.0), ROWS_RATE: Multipliers(lr=2.0, wd=0.5), SITE_RATE: Multipliers(lr=3.0)
    }  # fmt: skip


def test_a_single_bank_is_every_sites_and_several_are_the_sites_in_order() -> None:
    assert [BANKS.bank_of_site(site) for site in range(2)] == [0, 1]
    assert [dataclasses.replace(BANKS, banks=(Path("a"),)).bank_of_site(site) for site in range(2)] == [0, 0]


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        (BANKS, {}),
        (STOCK, {}),
        (STOCK, {"engram": TABLES}),
        (BANKS, {"engram": TABLES}),
        (BANKS, {"layers": (3, 1)}),  # any order
        (BANKS, {"banks": (Path("a"),), "layers": (1, 2, 3, 4), "donor_layers": ((8, 24),)}),
        (BANKS, {"banks": (Path("a"), Path("a"))}),
        (STOCK, {"conv_kernel": 0, "conv_dilation": 1, "look_ahead": 1, "bank_lookup_threads": 1, "verify_every": 1}),
        (BANKS, {"bank_rows": 1, "bank_huge_pages": True, "lookup": "native"}),
        (BANKS, {"engram": dataclasses.replace(TABLES, lr_mult=0.0, wd_mult=0.0, layer_ids=(9, 4))}),
        (BANKS, {"rows": "trained", "rows_lr_mult": 0.0, "rows_wd_mult": 2.0, "lr_mult": 0.0}),
        (BANKS, {"rows": "fresh", "engram": TABLES}),
        (STOCK, {"engram": TABLES, "lr_mult": 3.0}),
    ],
)
def test_what_can_be_honoured_passes(settings: GraftSettings, changes: dict[str, Any]) -> None:
    check(settings, **changes)


@pytest.mark.parametrize(
    ("settings", "changes", "flag"),
    [
        (STOCK, {"layers": (2,)}, "--graft-layers"),
        (STOCK, {"donor_layers": ((8,),)}, "--graft-donor-layers"),
        (STOCK, {"engram": TABLES, "bank_rows": 3}, "--bank-rows"),
        (STOCK, {"engram": TABLES, "bank_node_copy": Path("x")}, "--bank-node-copy"),
        (STOCK, {"engram": TABLES, "bank_huge_pages": True}, "--bank-huge-pages"),
        (STOCK, {"rows": "fresh"}, "--graft-rows"),
        (STOCK, {"engram": TABLES, "rows": "trained"}, "--graft-rows"),
        (STOCK, {"lr_mult": 2.0}, "--graft-lr-mult"),
        (BANKS, {"lr_mult": float("nan")}, "--graft-lr-mult"),
        (BANKS, {"rows_lr_mult": 2.0}, "--graft-rows-lr-mult"),
        (BANKS, {"rows_wd_mult": 1.0}, "--graft-rows-wd-mult"),
        (BANKS, {"rows": "fresh", "rows_lr_mult": -1.0}, "--graft-rows-lr-mult"),
        (BANKS, {"rows": "trained", "rows_wd_mult": float("inf")}, "--graft-rows-wd-mult"),
        (BANKS, {"layers": ()}, "--graft-layers"),
        (BANKS, {"layers": (2, 5)}, "--graft-layers"),
        (BANKS, {"layers": (0, 2)}, "--graft-layers"),
        (BANKS, {"layers": (2, 2)}, "--graft-layers"),
        (BANKS, {"banks": (Path("a"), Path("b"), Path("c"))}, "--graft-bank"),
        (BANKS, {"donor_layers": ((8,), (9,), (10,))}, "--graft-donor-layers"),
        (STOCK, {"engram": dataclasses.replace(TABLES, layers=())}, "--engram-layers"),
        (STOCK, {"engram": dataclasses.replace(TABLES, layers=(1, 5))}, "--engram-layers"),
        (STOCK, {"engram": dataclasses.replace(TABLES, layers=(4, 4))}, "--engram-layers"),
        (STOCK, {"engram": dataclasses.replace(TABLES, layer_ids=(0,))}, "--engram-layer-ids"),
        (STOCK, {"engram": dataclasses.replace(TABLES, layer_ids=(3, 3))}, "--engram-layer-ids"),
        (STOCK, {"engram": dataclasses.replace(TABLES, layer_ids=(-1, 3))}, "--engram-layer-ids"),
        (STOCK, {"engram": dataclasses.replace(TABLES, lr_mult=-0.1)}, "--engram-lr-mult"),
        (STOCK, {"engram": dataclasses.replace(TABLES, wd_mult=float("inf"))}, "--engram-wd-mult"),
        (BANKS, {"bank_huge_pages": True, "lookup": "reference"}, "--bank-huge-pages"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_flag(
    settings: GraftSettings, changes: dict[str, Any], flag: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{flag}: "):
        check(settings, **changes)


@pytest.mark.parametrize(
    ("flag", "name", "least"),
    [
        ("--graft-conv-kernel", "conv_kernel", 0),
        ("--graft-conv-dilation", "conv_dilation", 1),
        ("--graft-look-ahead", "look_ahead", 1),
        ("--graft-verify", "verify_every", 0),
        ("--bank-rows", "bank_rows", 1),
        ("--bank-lookup-threads", "bank_lookup_threads", 1),
    ],
)
def test_a_numbers_limit_is_where_the_message_says(flag: str, name: str, least: int) -> None:
    check(BANKS, **{name: least})
    message = re.escape(f"{flag}: is too small (got {least - 1}; expected at least {least})")
    with pytest.raises(ConfigError, match=f"^{message}$"):
        check(BANKS, **{name: least - 1})


def test_the_numbers_of_a_run_without_a_memory_are_checked_as_well() -> None:
    with pytest.raises(ConfigError, match="^--graft-look-ahead: is too small"):
        check(STOCK, look_ahead=0)


@pytest.mark.parametrize(("asked", "micro_batches", "depth"), [(None, 1, 2), (None, 3, 3), (None, 64, 4), (9, 1, 9)])
def test_a_run_looks_as_far_ahead_as_a_step_within_limits(asked: int | None, micro_batches: int, depth: int) -> None:
    assert dataclasses.replace(STOCK, look_ahead=asked).look_ahead_of(micro_batches) == depth


def test_settings_are_read_without_torch_or_megatron() -> None:
    program = "import sys, megatron_graft.training.settings; print(sorted({'torch', 'megatron'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
