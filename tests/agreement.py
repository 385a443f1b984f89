"""Comparison of a result with the oracle, for any numbers: `disagreement` describes a difference."""

from __future__ import annotations

from typing import Any

from backends import Target
from random_inputs import RandomCall


def call(random_call: RandomCall, target: Target) -> Any:
    """The result of the target; with gradients a tuple of result and gradients."""
    return random_call.on(target)


def disagreement(random_call: RandomCall, target: Target) -> str | None:
    """Runs the call and describes what is wrong with the result; None if it is right."""
    return random_call.disagreement(random_call, target, call(random_call, target))
