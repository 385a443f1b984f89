"""Checks of a configuration: unknown keys, wrong types, values out of range."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints


class ConfigError(ValueError):
    """A configuration that cannot be used. The message names the key."""


def check_values(section: Any, prefix: str = "") -> None:
    """Raises ConfigError if a value of a section is not one of its choices, or is out of range."""
    for entry in fields(section):
        value, name = getattr(section, entry.name), f"{prefix}{entry.name}"
        if is_dataclass(value):
            check_values(value, f"{name}.")
        elif value is not None:
            _check_value(name, value, entry.metadata)


def _check_value(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    choices, low, high = limits["choices"], limits["low"], limits["high"]
    if choices and value not in choices:
        raise ConfigError(f"{name}: expected one of {', '.join(map(str, choices))}, got {value}")
    for number in value if isinstance(value, list) else [value]:
        if low is not None and high is not None and not low <= number <= high:
            raise ConfigError(f"{name}: expected {low} to {high}, got {number}")
        if low is not None and not low <= number < math.inf:
            raise ConfigError(f"{name}: expected at least {low}, got {number}")


def refuse_unknown(part: dict[str, Any], known: Sequence[str]) -> None:
    """Raises ConfigError if a part of a configuration has a key that is not among the known ones (dotted)."""
    for path in _leaves(part):
        if any(path == name or path.startswith(f"{name}.") for name in known):
            continue
        if any(name.startswith(f"{path}.") for name in known):
            raise ConfigError(f"{path}: expected a section of keys, not a value")
        # The suggestion is the nearest key, or the key with the nearest last name: `epochs` suggests train.epochs.
        last = {name.rpartition(".")[2]: name for name in known}
        near = difflib.get_close_matches(path.rpartition(".")[2], last, 1, 0.75)
        meant = difflib.get_close_matches(path, known, 1, 0.75) or [last[name] for name in near]
        raise ConfigError(f"{path}: no such key" + (f"; did you mean {meant[0]}?" if meant else ""))


def refuse_numbers_for_text(part: Mapping[str, Any], schema: Any, prefix: str = "") -> None:
    """Refuses numbers and booleans for keys of text: YAML reads 2012_07 as a number, and no as false."""
    hints = get_type_hints(schema) if is_dataclass(schema) else {}
    for name, value in part.items():
        kind = hints.get(name)
        if isinstance(value, dict):
            refuse_numbers_for_text(value, kind, f"{prefix}{name}.")
        elif kind in (str, str | None) and isinstance(value, int | float):
            raise ConfigError(f"{prefix}{name}: expected text, got {value}; put it in quotes")


def _leaves(part: Any, prefix: str = "") -> list[str]:
    if not isinstance(part, dict):
        return [prefix[:-1]]
    return [path for key, value in part.items() for path in _leaves(value, f"{prefix}{key}.")]
