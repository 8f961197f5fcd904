"""Reading YAML with errors that name the place: ``arms.yaml: arms.sum.group``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, overload

import yaml

from megatron_graft.errors import ConfigError

_REQUIRED: Any = object()
_NAMES = {int: "whole number", float: "number", str: "text", dict: "mapping", list: "list"}


def read_yaml(path: Path) -> YamlFields:
    """The mapping that a YAML file holds.

    Raises:
        ConfigError: it cannot be read, or holds none.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(path, f"cannot be read: {error}", expected="a YAML file") from error
    if not isinstance(value, dict):
        raise ConfigError(path, "holds no mapping", got=type(value).__name__, expected="name: value lines")
    return YamlFields(f"{path}: ", value)


class YamlFields:
    """A mapping whose members are taken one by one; what was not taken is an error in the end.

    Args:
        prefix: what stands before a member's name in messages.
        values: the members.
    """

    def __init__(self, prefix: str, values: Mapping[str, Any]) -> None:
        self._prefix, self._values = prefix, dict(values)

    @property
    def place(self) -> str:
        """Where the mapping stands, for messages."""
        return self._prefix.rstrip(" .:")

    @overload
    def text(self, name: str) -> str: ...
    @overload
    def text[T](self, name: str, default: T) -> str | T: ...
    def text(self, name: str, default: Any = _REQUIRED) -> Any:
        """A member that is text; a number is taken as it is written."""
        value = self._take(name, default)
        return str(value) if isinstance(value, (int, float)) else self._checked(name, value, str, default)

    @overload
    def number(self, name: str) -> int: ...
    @overload
    def number[T](self, name: str, default: T) -> int | T: ...
    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        """A member that is a whole number."""
        return self._checked(name, self._take(name, default), int, default)

    def real(self, name: str, default: float) -> float:
        """A member that is a number."""
        value = self._take(name, default)
        return float(value) if isinstance(value, int) else cast(float, self._checked(name, value, float, default))

    def choice(self, name: str, choices: Sequence[str]) -> str:
        """A member that is one of some words."""
        value = self.text(name)
        if value not in choices:
            raise ConfigError(self._at(name), "is unknown", got=value, expected=", ".join(choices))
        return value

    def list_of[T](self, name: str, kind: type[T]) -> list[T]:
        """A member that is a list; empty if it is not there."""
        values = self._checked(name, self._take(name, []), list, [])
        return [self._checked(f"{name}[{place}]", value, kind, _REQUIRED) for place, value in enumerate(values)]

    def words(self, name: str) -> dict[str, str]:
        """A member that maps names to text; empty if it is not there."""
        fields = self.member(name)
        return {key: fields.text(key) for key in list(fields._values)}

    def flags(self, name: str) -> dict[str, Any]:
        """A member that maps flags to their values; empty if it is not there."""
        flags = self._checked(name, self._take(name, {}), dict, {})
        for flag, value in flags.items():
            for part in value if isinstance(value, list) else [value]:
                if not isinstance(part, (str, int, float)) or part is False:
                    raise ConfigError(
                        self._at(f"{name}.{flag}"), "is no flag's value", got=value,
                        expected="a number, a word, a list of them, or true",
                    )  # fmt: skip
        return dict(flags)

    def member(self, name: str) -> YamlFields:
        """A member that is a mapping; empty if it is not there."""
        return YamlFields(self._at(f"{name}."), self._checked(name, self._take(name, {}), dict, {}))

    def members(self, name: str) -> dict[str, YamlFields]:
        """A member whose members are mappings, each by its name."""
        inner = self._checked(name, self._take(name, {}), dict, {})
        return {
            str(key): YamlFields(self._at(f"{name}.{key}."), self._checked(f"{name}.{key}", value, dict, _REQUIRED))
            for key, value in inner.items()
        }

    def items_of(self, name: str) -> list[YamlFields]:
        """A member that is a list of mappings."""
        return [
            YamlFields(self._at(f"{name}[{place}]."), value) for place, value in enumerate(self.list_of(name, dict))
        ]

    def skip(self, *names: str) -> None:
        """Let members stand unread."""
        for name in names:
            self._values.pop(name, None)

    def finish(self) -> None:
        """Refuse members that nobody took."""
        if self._values:
            unknown = ", ".join(map(str, self._values))
            raise ConfigError(self.place, "has members that nothing reads", got=unknown)

    def _take(self, name: str, default: Any) -> Any:
        if name not in self._values and default is _REQUIRED:
            raise ConfigError(self._at(name), "is missing")
        return self._values.pop(name, default)

    def _checked(self, name: str, value: Any, kind: type, default: Any) -> Any:
        if value is default and default is not _REQUIRED and value is not None:
            return value
        if value is None and default is None:
            return None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ConfigError(self._at(name), "is of the wrong kind", got=repr(value), expected=f"a {_NAMES[kind]}")
        return value

    def _at(self, name: str) -> str:
        return f"{self._prefix}{name}"
