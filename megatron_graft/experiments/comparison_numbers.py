"""How the page of a comparison writes its numbers: losses with four digits after the point, differences with a sign."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_graft.reporting.page import NOTHING

MINUS = "\N{MINUS SIGN}"
FEW_TOKENS = 1000  # differences over fewer tokens are set in italics
BOLD = (
    "bold where the interval over documents excludes zero and every seed has the sign, † where the one over seeds "
    "does, too"
)


def loss(value: float | None) -> str:
    """``5.0123``."""
    return _shown(value, ".4f")


def signed(value: float | None, digits: int = 4) -> str:
    """``+0.0123``, with a true minus sign."""
    return _shown(value, f"+.{digits}f")


def with_sd(part: Mapping[str, Any] | None, digits: int = 4, sign: str = "") -> str:
    """``5.0123 ± 0.0021``; of one seed the mean alone."""
    if not part:
        return NOTHING
    mean = _shown(part["mean"], f"{sign}.{digits}f")
    return mean if part["sd"] is None else f"{mean} ± {_shown(part['sd'], f'.{digits}f')}"


def interval(found: Mapping[str, Any] | None) -> str:
    """``[−0.0600, −0.0450]``."""
    return f"[{signed(found['low'])}, {signed(found['high'])}]" if found else NOTHING


def with_interval(found: Mapping[str, Any] | None) -> str:
    """A difference, its spread over seeds, and its interval over documents: ``−0.0523 ± 0.0041 [−0.0600, −0.0450]``."""
    if not found:
        return NOTHING
    mean = with_sd(found, sign="+")
    return f"{mean} {interval(found['documents'])}" if found["documents"] else mean


def marked(found: Mapping[str, Any] | None) -> str:
    """A difference, bold as :data:`BOLD` says."""
    if not found:
        return NOTHING
    mean = signed(found["mean"])
    bounds = found["documents"] or {"low": None, "high": None}
    if bounds["low"] is None or bounds["high"] is None:
        return mean
    signs = {math.copysign(1, one) for one in found["by_seed"].values()}
    if not _excludes_zero(bounds) or len(signs) != 1:
        return mean
    return f"**{mean}**{'†' if found.get('over_seeds') and _excludes_zero(found['over_seeds']) else ''}"


def _excludes_zero(bounds: Mapping[str, Any]) -> bool:
    return bool(bounds["high"] < 0 or bounds["low"] > 0)


def count(value: float | None) -> str:
    """``1,234,567``."""
    return _shown(value, ",.0f")


def millions(value: float | None) -> str:
    """``6.92 M``."""
    return NOTHING if value is None else f"{value / 1e6:,.2f} M"


def percent(value: float | None) -> str:
    """``58.5 %``."""
    return NOTHING if value is None else f"{value:.1%}".replace("%", " %")


def level(value: float) -> str:
    """``99.17 %`` of 0.99167."""
    return f"{100 * value:.4g} %"


def seeds_of(arm: Mapping[str, Any]) -> str:
    """How many seeds an arm's figures are of, in words a table can hold."""
    return "one seed" if len(arm["seeds"]) == 1 else f"{len(arm['seeds'])} seeds"


def sentence(text: str) -> str:
    """Text as a sentence begins: its first letter a capital."""
    return text[:1].upper() + text[1:]


def _shown(value: float | None, form: str) -> str:
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "not finite"
    return format(value, form).replace("-", MINUS)
