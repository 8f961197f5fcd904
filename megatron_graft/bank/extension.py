"""Finding the compiled extension. It is never built at run time, and its absence is never silent."""

from __future__ import annotations

import importlib
from types import ModuleType

from megatron_graft.errors import NativeExtensionError

MODULE_NAME = "megatron_graft._native"
INTERFACE_VERSION = 4  # raised together with csrc/bindings.cpp whenever a signature changes
_REMEDY = "Run `make native` in a checkout, or reinstall the package."


def load_extension() -> ModuleType:
    """Import the extension.

    Raises:
        NativeExtensionError: it is missing, cannot be loaded, or was built from other sources than this
            package.
    """
    try:
        extension = importlib.import_module(MODULE_NAME)
    except ImportError as error:
        raise NativeExtensionError(
            MODULE_NAME, "the compiled extension cannot be imported", got=error, remedy=_REMEDY
        ) from error
    found = getattr(extension, "INTERFACE_VERSION", None)
    if found != INTERFACE_VERSION:
        raise NativeExtensionError(
            MODULE_NAME,
            "the compiled extension belongs to other sources",
            got=f"interface {found}",
            expected=f"interface {INTERFACE_VERSION}",
            remedy=_REMEDY,
        )
    return extension
