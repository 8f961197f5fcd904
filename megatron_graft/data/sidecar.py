"""The note beside a ``.bin/.idx`` pair that says which tokenizer made it: ``<prefix>.tokenizer.json``.

``prefix`` is what Megatron's ``--data-path`` takes: the path of the pair without ``.bin`` or ``.idx``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_graft.data.tokenizer import TextTokenizer
from megatron_graft.errors import DataError, IdentityError
from megatron_graft.files import write_json_atomically


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """Identity of the tokenizer that made a data set; the fields are those of :class:`TextTokenizer`."""

    fingerprint: str
    kind: str
    vocab_size: int
    eod: int


def sidecar_path(prefix: Path | str) -> Path:
    """``<prefix>.tokenizer.json``."""
    return Path(f"{prefix}.tokenizer.json")


def write_sidecar(prefix: Path | str, tokenizer: TextTokenizer) -> None:
    """Write the note, all or nothing."""
    sidecar = Sidecar(
        fingerprint=tokenizer.fingerprint,
        kind=tokenizer.kind,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
    )
    write_json_atomically(sidecar_path(prefix), asdict(sidecar))


def read_sidecar(prefix: Path | str) -> Sidecar | None:
    """The note beside a data set, or None if it has none (one made by Megatron's own tool).

    Raises:
        DataError: the note is there but is not one.
    """
    path = sidecar_path(prefix)
    if not path.is_file():
        return None
    expected = {"fingerprint": str, "kind": str, "vocab_size": int, "eod": int}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(path, f"is not valid JSON: {error}", remedy="Tokenise the text again.") from error
    if not isinstance(value, dict) or {name: type(member) for name, member in value.items()} != expected:
        raise DataError(
            path,
            "is not a tokenizer note",
            got=value,
            expected=f"the members {sorted(expected)}",
            remedy="Tokenise the text again.",
        )
    return Sidecar(**value)


def require_same_tokenizer(prefix: Path | str, tokenizer: TextTokenizer) -> bool:
    """Whether the note beside a data set vouches for ``tokenizer``; False if there is no note.

    Raises:
        IdentityError: the data set was made by another tokenizer.
    """
    sidecar = read_sidecar(prefix)
    if sidecar is None:
        return False
    if sidecar.fingerprint != tokenizer.fingerprint:
        raise IdentityError(
            prefix,
            f"was tokenised by another tokenizer than {tokenizer.path}",
            got=f"{sidecar.kind} {sidecar.fingerprint} ({sidecar.vocab_size} ids)",
            expected=f"{tokenizer.kind} {tokenizer.fingerprint} ({tokenizer.vocab_size} ids)",
            remedy="Give the tokenizer it was made with, or tokenise again with tools/preprocess_data.py.",
        )
    return True
