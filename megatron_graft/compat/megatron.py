"""The range of megatron-core versions that this package was built against, and what two of its gaps need."""

from __future__ import annotations

import argparse
import importlib.metadata

from packaging.version import Version

from megatron_graft.errors import PlatformError

OLDEST = "0.19.2"
BEFORE = "0.20"


def require_megatron() -> Version:
    """Return the installed megatron-core's version.

    Raises:
        PlatformError: it is not installed, or outside the supported range.
    """
    try:
        installed = Version(importlib.metadata.version("megatron-core"))
    except importlib.metadata.PackageNotFoundError as error:
        raise PlatformError(
            "megatron-core",
            "is not installed",
            expected=f">={OLDEST},<{BEFORE}",
            remedy=f"Run: pip install 'megatron-core>={OLDEST},<{BEFORE}'",
        ) from error
    if not Version(OLDEST) <= installed < Version(BEFORE):
        raise PlatformError(
            "megatron-core",
            "has a version that megatron-graft was not built against",
            got=installed,
            expected=f">={OLDEST},<{BEFORE}",
            remedy=f"Run: pip install 'megatron-core>={OLDEST},<{BEFORE}'",
        )
    return installed


def use_shipped_dataset_helpers() -> None:
    """Keep Megatron's launcher from running ``make`` for its data set helpers.

    The wheel ships them built, without the Makefile that the launcher would call on rank 0 (it exits there). Where
    they are missing, the launcher is left to try.
    """
    import megatron.core.datasets.utils as dataset_utils

    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError:
        return
    dataset_utils.compile_helpers = lambda: None


def mend_help(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Escape the percent signs of help texts that argparse cannot format: one of Megatron's ends ``--help``."""
    for action in parser._actions:
        if isinstance(action.help, str):
            try:
                action.help % {**vars(action), "prog": parser.prog}
            except (ValueError, KeyError, TypeError):
                action.help = action.help.replace("%", "%%")
    return parser
