"""Dealing with the libraries that run donors: kept off the network, and their errors made ours."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_graft.errors import DonorError


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Keep transformers off the network while the block runs: a donor is local or it is refused."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def as_donor_error(subject: Path, problem: str) -> Iterator[None]:
    """Turn whatever a model library raises in the block into a :class:`DonorError`."""
    try:
        yield
    except Exception as error:  # a broken file surfaces as almost any exception from these libraries
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise DonorError(subject, problem, got=f"{type(error).__name__}: {first_line[:200]}") from error


def missing_extra(error: ImportError) -> DonorError:
    """The error for a donor asked for without the packages that run donors."""
    return DonorError(
        "donor",
        "the packages that run donors are not installed",
        got=str(error),
        remedy="Install them with: pip install transformers gguf",
    )
