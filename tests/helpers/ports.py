"""Ports for servers that a test starts: below those that the system hands out by itself, so that no client gets one."""

from __future__ import annotations

import os
import random
import socket

_FIRST, _END = 20_000, 32_000  # Linux gives clients 32768 and above
_random = random.Random(os.getpid())


def free_port() -> int:
    """A port of the loopback that nobody listens on now, chosen at random so that tests side by side do not meet."""
    while True:
        port = _random.randrange(_FIRST, _END)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def free_ports(count: int) -> list[int]:
    """So many different ones."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return sorted(ports)
