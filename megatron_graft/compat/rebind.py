"""The only way in which a function of Megatron is ever replaced: one name, at run time, checked against a signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from megatron_graft.errors import PlatformError


def rebind(owner: ModuleType | type, name: str, parameters: tuple[str, ...], wrap: Callable[[Any], Any]) -> None:
    """Replace ``owner.name`` by ``wrap(original)``.

    Args:
        owner: module or class that holds the function.
        name: its attribute.
        parameters: names of the leading parameters that the wrapper relies on, in order.
        wrap: takes the original, returns the replacement.

    Raises:
        PlatformError: the installed Megatron has no such function, or its parameters differ.
    """
    original = getattr(owner, name, None)
    found = tuple(inspect.signature(original).parameters) if callable(original) else ()
    if found[: len(parameters)] != parameters:
        raise PlatformError(
            f"{owner.__name__}.{name}",
            "does not have the parameters that megatron-graft relies on",
            got=", ".join(found) or "no such function",
            expected=", ".join(parameters),
            remedy="Install megatron-core >=0.19.2,<0.20.",
        )
    setattr(owner, name, wrap(original))
