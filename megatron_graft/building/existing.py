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
    found = bank.manifest.provenance.get("settings", {})
    wanted = json.loads(json.dumps(settings))
    different = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
    if different:
        raise BankError(
            output,
            "is a bank with other settings",
            got=", ".join(f"{name} {found.get(name)}" for name in different),
            expected=", ".join(f"{name} {wanted.get(name)}" for name in different),
            remedy=_MAKE_ROOM,
        )
    return bank
