"""What every command shares: a :class:`GraftError` becomes one line and an exit code, never a traceback."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence

from megatron_graft.errors import GraftError

EXIT_BAD_INPUT = 2


def without_flags(flags: Iterable[str], arguments: Sequence[str]) -> list[str]:
    """Arguments of a command without these flags, each of which has one value."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for flag in flags:
        parser.add_argument(flag)
    return parser.parse_known_args(arguments)[1]


def run_command(body: Callable[[], None]) -> int:
    """Run ``body``; return 0, or print ``error: ...`` on stderr and return :data:`EXIT_BAD_INPUT`."""
    try:
        body()
    except GraftError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0
