"""Taking a JSON object apart without trusting it: fields are asked for by name and type, none may be left."""

from __future__ import annotations

import re
from typing import Any

from megatron_graft.errors import BankFormatError

_HEX_SHA256 = re.compile(r"[0-9a-f]{64}")


def object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json.loads``, which else lets the last of two fields of one name win.

    Raises:
        ValueError: two have one name.
    """
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name is given twice")
    return fields


class Fields:
    """The fields of one JSON object, each to be taken exactly once.

    Args:
        value: the decoded JSON value; must be an object.
        where: file and path of the object, for messages.

    Every method raises :class:`BankFormatError` if the field is missing or has another type.
    """

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise BankFormatError(where, "is malformed", got=type(value).__name__, expected="an object")
        self._left = dict(value)
        self.where = where

    def take(self, name: str) -> Any:
        """The field as it is."""
        if name not in self._left:
            raise BankFormatError(self.where, f"lacks the field {name!r}")
        return self._left.pop(name)

    def integer(self, name: str, least: int, most: int) -> int:
        """A whole number between ``least`` and ``most``."""
        value = self.take(name)
        if type(value) is not int or not least <= value <= most:
            raise self._malformed(name, value, f"a whole number from {least} to {most}")
        return value

    def boolean(self, name: str) -> bool:
        """True or false."""
        value = self.take(name)
        if type(value) is not bool:
            raise self._malformed(name, value, "true or false")
        return value

    def text(self, name: str, pattern: str = r".+") -> str:
        """A printable string that matches ``pattern`` as a whole."""
        value = self.take(name)
        if not isinstance(value, str) or not value.isprintable() or not re.fullmatch(pattern, value):
            raise self._malformed(name, value, f"a string like {pattern}")
        return value

    def sha256(self, name: str) -> str:
        """A hex SHA-256."""
        return self.text(name, _HEX_SHA256.pattern)

    def integers(self, name: str, least: int, most: int) -> tuple[int, ...]:
        """A list, not empty, of distinct whole numbers between ``least`` and ``most``."""
        values = self.array(name)
        fits = all(type(value) is int and least <= value <= most for value in values)
        if not values or not fits or len(set(values)) != len(values):
            raise self._malformed(name, values, f"distinct whole numbers from {least} to {most}")
        return tuple(values)

    def array(self, name: str) -> list[Any]:
        """A list of anything."""
        value = self.take(name)
        if not isinstance(value, list):
            raise self._malformed(name, value, "a list")
        return value

    def object(self, name: str) -> Fields:
        """A nested object."""
        return Fields(self.take(name), f"{self.where}.{name}")

    def done(self) -> None:
        """Refuse fields that nobody asked for."""
        if self._left:
            raise BankFormatError(self.where, "has unknown fields", got=", ".join(sorted(self._left)))

    def _malformed(self, name: str, value: Any, expected: str) -> BankFormatError:
        return BankFormatError(f"{self.where}.{name}", "is malformed", got=repr(value)[:80], expected=expected)
