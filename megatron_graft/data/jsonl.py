"""Read documents from JSON lines, strictly: every fault is reported with its file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from megatron_graft.errors import CorpusError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def require_text_file(path: Path, subject: str = "") -> None:
    """Raise :class:`CorpusError` unless ``path`` is a file with something in it."""
    where = f"{subject} {path}".strip()
    if not path.is_file():
        problem = "is a directory, not a file" if path.is_dir() else "does not exist"
        raise CorpusError(where, problem, expected="a text file", remedy="Check the path.")
    if path.stat().st_size == 0:
        raise CorpusError(where, "is empty", got="0 bytes", remedy="Remove it from the input or fill it.")


def decode_utf8(data: bytes, subject: str) -> str:
    """Decode strictly; a fault names ``subject``, the byte and its offset."""
    try:
        return data.removeprefix(_BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
            subject,
            "is not UTF-8",
            got=f"byte 0x{data[error.start]:02x} at offset {error.start}",
            expected="UTF-8 text",
            remedy="Convert the file first, for example with iconv -t utf-8.",
        ) from error


def parse_line(data: bytes, key: str, subject: str) -> str | None:
    """The text of one JSON line; None for a blank line.

    Args:
        data: the line's bytes.
        key: member that holds the text (Megatron's ``--json-keys``).
        subject: ``file:line``, for the error.
    """
    line = decode_utf8(data, subject)
    if not line.strip():
        return None
    try:
        value = json.loads(line)
    except ValueError as error:
        raise CorpusError(
            subject,
            f"is not valid JSON: {error}",
            got=_shortened(line),
            expected=f'one object a line, such as {{"{key}": "..."}}',
        ) from error
    if not isinstance(value, dict) or not isinstance(value.get(key), str):
        raise CorpusError(
            subject,
            f'has no string under the key "{key}"',
            got=_shortened(line),
            expected=f'one object a line, such as {{"{key}": "..."}}',
            remedy="Name the member that holds the text with --json-keys.",
        )
    text: str = value[key]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CorpusError(
            subject,
            "holds half of a surrogate pair, which no UTF-8 text can",
            got=f"\\u{ord(text[error.start]):04x}",
            expected="whole characters in every JSON escape",
        ) from error
    return text


def read_texts(path: Path, key: str) -> Iterator[tuple[int, str]]:
    """Yield ``(line number from 1, text)`` for every line of a JSONL file that is not blank."""
    require_text_file(path)
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            text = parse_line(line, key, f"{path}:{number}")
            if text is not None:
                yield number, text


def _shortened(line: str, limit: int = 80) -> str:
    line = line.strip()
    return line if len(line) <= limit else f"{line[:limit]}..."
