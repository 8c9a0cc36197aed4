"""What arguments may be: each check returns its value or raises ValueError naming the argument and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real

from torch import Tensor


def check_integer(name: str, value: int, low: int, high: int | None = None) -> int:
    """``value`` as an int, if it is an integer of [low, high]; booleans are not."""
    # True is 1 to Python, and never what a caller means by a number.
    if isinstance(value, Integral) and not isinstance(value, bool) and low <= value and (high is None or value <= high):
        return int(value)
    allowed = f"at least {low}" if high is None else f"between {low} and {high}"
    raise ValueError(f"{name} must be an integer {allowed}, got {value!r}")


def check_integers(name: str, values: Iterable[int], low: int) -> tuple[int, ...]:
    """``values`` as a tuple, if it is a sequence of integers, none below ``low``."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a sequence of integers at least {low}, got {values!r}")
    return tuple(check_integer(name, value, low) for value in values)


def check_positive(name: str, value: float) -> float:
    """``value`` as a float, if it is a positive finite number."""
    if isinstance(value, Real) and not isinstance(value, bool) and 0.0 < value < math.inf:
        return float(value)
    raise ValueError(f"{name} must be a positive number, got {value!r}")


def check_non_negative(name: str, value: float) -> float:
    """``value`` as a float, if it is a finite number and not below 0."""
    if isinstance(value, Real) and not isinstance(value, bool) and 0.0 <= value < math.inf:
        return float(value)
    raise ValueError(f"{name} must be a number of at least 0, got {value!r}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """``value``, if it is one of ``choices``."""
    if isinstance(value, str) and value in choices:
        return value
    raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_type(name: str, value, kind: type):
    """``value``, if it is a ``kind``."""
    if isinstance(value, kind):
        return value
    raise ValueError(f"{name} must be a {kind.__name__}, got {value!r}")


def check_name(name: str | None) -> str | None:
    """``name``, if it is None or a word."""
    if name is None or (isinstance(name, str) and name and "\n" not in name):
        return name
    raise ValueError(f"name must be a word, or None, got {name!r}")


def check_named_parameters(named: Iterable) -> list[tuple[str, Tensor]]:
    """A list of (name, parameter) pairs, if it is that."""
    pairs = list(named) if isinstance(named, Iterable) else [None]
    if all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Tensor) for pair in pairs):
        return pairs
    raise ValueError("named_parameters must be (name, parameter) pairs, as model.named_parameters() gives")


def check_process_set(value):
    """``value``, if it is one of Horovod's process sets."""
    if hasattr(value, "included") and hasattr(value, "rank"):
        return value
    raise ValueError(f"process_set must be a horovod.torch.ProcessSet, got {value!r}")
