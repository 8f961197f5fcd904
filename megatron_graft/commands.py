"""What every command shares: a :class:`GraftError` becomes one line and an exit code, never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable

from megatron_graft.errors import GraftError

EXIT_BAD_INPUT = 2


def without_flags(flags: Collection[str], arguments: Iterable[str]) -> list[str]:
    """Arguments of a command that are flags with their values, without these flags and whatever values they have."""
    kept, left_out = [], False
    for word in arguments:
        if word.startswith("--"):
            left_out = word.partition("=")[0] in flags
        if not left_out:
            kept.append(word)
    return kept


def value_of(flag: str, arguments: Iterable[str]) -> str | None:
    """The value of a flag in a command's arguments, the last one if it was given several times; None without it."""
    value, is_next = None, False
    for word in arguments:
        if is_next:
            value = word
        name, joined, rest = word.partition("=")
        is_next = name == flag and not joined
        if name == flag and joined:
            value = rest
    return value


def is_number(word: str) -> bool:
    """Whether a word of a command is a number, as the weights of a blend are."""
    try:
        float(word)
    except ValueError:
        return False
    return True


def run_command(body: Callable[[], None]) -> int:
    """Run ``body``; return 0, or print ``error: ...`` on stderr and return :data:`EXIT_BAD_INPUT`."""
    try:
        body()
    except GraftError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0
