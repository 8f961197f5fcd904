"""Another bank in place of a run's: the trained weights stay, the rows that they read are exchanged."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from megatron_graft.bank.row_layout import RowLayout
from megatron_graft.errors import ConfigError, IdentityError
from megatron_graft.lookup.index import open_index
from megatron_graft.training.bank_setup import checked_banks, open_run_bank
from megatron_graft.training.memory_setup import RunMemory
from megatron_graft.training.settings import GraftSettings


def other_memories(
    banks: Mapping[str, Path], memory: RunMemory | None, settings: GraftSettings
) -> dict[str, RunMemory]:
    """A run's memory with each of the given banks in place of its own.

    They are opened as the run opens its bank, ``--bank-rows`` and a node's copy included.

    Args:
        banks: name -> directory.
        memory: the run's, or None.
        settings: the run's.

    Raises:
        ConfigError: the run has several banks or none, or trains its own rows, or a bank has fewer rows than the run's
            ``--bank-rows``.
        IdentityError: a bank was made for another tokenizer, or its rows are laid out otherwise.
        BankError: a bank cannot be used.
        StorageError: a bank cannot be copied to the node.
    """
    if not banks:
        return {}
    number = len(memory.banks) if memory else 0
    if memory is None or number != 1:
        raise ConfigError(
            "--other-bank", "takes the place of the one bank of a run", got=f"a run with {number or 'no'} banks",
            expected="a run with one bank", remedy="Leave it out for this run.",
        )  # fmt: skip
    if settings.trains_rows:
        raise ConfigError(
            "--other-bank", "has no rows to read in a run that trains its own", got=f"--graft-rows {settings.rows}",
            remedy="Leave it out for this run.",
        )  # fmt: skip
    return {name: _with_bank(path, memory, settings) for name, path in banks.items()}


def _with_bank(path: Path, memory: RunMemory, settings: GraftSettings) -> RunMemory:
    [bank] = checked_banks(dataclasses.replace(settings, banks=(path,)), memory.tokenizer)
    wanted = memory.banks[0].row_layout
    if bank.row_layout != wanted:
        raise IdentityError(
            f"--other-bank {path}", f"has rows of another layout than the run's bank {memory.banks[0].path}",
            got=_described(bank.row_layout), expected=_described(wanted),
            remedy="Build it with as many --donor-layers of a donor as wide, and with the same --row-dtype.",
        )  # fmt: skip
    opened = open_run_bank(path, settings)
    index = open_index(
        opened,
        settings.lookup,  # type: ignore[arg-type]
        pages="huge" if settings.bank_huge_pages else "file",
        threads=settings.bank_lookup_threads,
    )
    return dataclasses.replace(memory, banks=(opened,), indexes=(index,))


def _described(layout: RowLayout) -> str:
    return f"{layout.dtype.name} elements, {' + '.join(map(str, layout.widths))} of them"
