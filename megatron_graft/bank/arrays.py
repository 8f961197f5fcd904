"""Refusing an array that is not what a function documents, before any byte of it is used."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_graft.errors import ConfigError, GraftError

MAX_THREADS = 1024


class ArrayError(GraftError, ValueError):
    """An array argument has the wrong dtype, shape, layout or contents."""


def check_array(
    name: str,
    array: object,
    *,
    dtypes: Sequence[type[np.generic]],
    shape: tuple[int | None, ...],
    writable: bool = False,
) -> np.ndarray:
    """Return ``array`` if it is a C-contiguous array of a wanted dtype and shape.

    Args:
        name: the argument's name, for the message.
        array: what the caller gave.
        dtypes: accepted element types.
        shape: wanted length of every axis; None accepts any.
        writable: whether the array is going to be written.

    Raises:
        ArrayError: naming the first property that differs.
    """
    if not isinstance(array, np.ndarray):
        raise ArrayError(name, "is not a NumPy array", got=type(array).__name__)
    if array.dtype not in dtypes:
        wanted = " or ".join(np.dtype(kind).name for kind in dtypes)
        raise ArrayError(name, "has the wrong dtype", got=array.dtype, expected=wanted)
    fits = len(shape) == array.ndim
    if not fits or any(want not in (None, have) for want, have in zip(shape, array.shape, strict=True)):
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise ArrayError(name, "has the wrong shape", got=list(array.shape), expected=f"[{wanted}]")
    if not array.flags.aligned:
        raise ArrayError(name, "is not aligned to its elements", remedy="Pass a copy of it.")
    if not array.flags.c_contiguous:
        raise ArrayError(name, "is not C-contiguous", remedy="Pass numpy.ascontiguousarray of it.")
    if writable and not array.flags.writeable:
        raise ArrayError(name, "is read-only", expected="a writable array")
    return array


def check_no_overlap(output_name: str, output: np.ndarray, input_name: str, given: np.ndarray) -> None:
    """Refuse an output that shares memory with an input still to be read."""
    if np.may_share_memory(output, given):
        raise ArrayError(output_name, f"shares memory with {input_name}", remedy="Pass a separate buffer.")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a word that is none of ``choices``.

    Raises:
        ConfigError: naming them.
    """
    if value not in choices:
        raise ConfigError(name, "is unknown", got=value, expected=" or ".join(choices))


def check_threads(threads: int) -> None:
    """Refuse a number of threads that the extension has no pool of.

    Raises:
        ConfigError: it is not from 1 to :data:`MAX_THREADS`.
    """
    if not 1 <= threads <= MAX_THREADS:
        raise ConfigError("threads", "is out of range", got=threads, expected=f"1 to {MAX_THREADS}")
