"""Whether a result agrees with the oracle, for any numbers: `disagreement` says where it does not."""

from __future__ import annotations

from typing import Any

from backends import Target
from random_inputs import RandomCall


def call(random_call: RandomCall, target: Target) -> Any:
    """What the target makes of it; with gradients, a tuple of the result and them."""
    return random_call.on(target)


def disagreement(random_call: RandomCall, target: Target) -> str | None:
    """Runs the call and says what is wrong with the result; None where nothing is."""
    return random_call.disagreement(random_call, target, call(random_call, target))
