"""What arguments may be: each check returns its value or raises ValueError naming the argument and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral


def check_integer(name: str, value: int, low: int, high: int | None = None) -> int:
    """``value`` as an int, if it is an integer of [low, high]; booleans are not."""
    if isinstance(value, Integral) and not isinstance(value, bool) and low <= value and (high is None or value <= high):
        return int(value)
    allowed = f"at least {low}" if high is None else f"between {low} and {high}"
    raise ValueError(f"{name} must be an integer {allowed}, got {value!r}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """``value``, if it is one of ``choices``."""
    if isinstance(value, str) and value in choices:
        return value
    raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
