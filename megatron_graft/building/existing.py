"""The bank that lies where another is to be built: the same one, or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_graft.bank.reader import Bank, open_bank
from megatron_graft.errors import BankError, BankVersionError

_MAKE_ROOM = "Remove it or choose another --output."


def existing_bank(output: Path, settings: Mapping[str, Any]) -> Bank:
    """Open the bank at ``output`` if it was built with ``settings``.

    Raises:
        BankError: it was built with others, naming those that differ, or is no usable bank.
    """
    try:
        bank = open_bank(output)
    except BankVersionError as error:
        raise BankError(output, "holds a bank of another format version", remedy=_MAKE_ROOM) from error
    refuse_other_settings(
        output, "is a bank with other settings", bank.manifest.provenance.get("settings", {}), settings, _MAKE_ROOM
    )
    return bank


def refuse_other_settings(
    subject: Path, problem: str, found: Mapping[str, Any], wanted: Mapping[str, Any], remedy: str
) -> None:
    """Compare settings that were read from JSON with those asked for.

    Raises:
        BankError: naming those that differ, with both values.
    """
    wanted = json.loads(json.dumps(wanted))  # tuples as lists, as in what was read
    different = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
    if different:
        raise BankError(
            subject,
            problem,
            got=", ".join(f"{name} {found.get(name)}" for name in different),
            expected=", ".join(f"{name} {wanted.get(name)}" for name in different),
            remedy=remedy,
        )
