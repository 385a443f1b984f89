"""Random calls of all ops for `fuzz.py`, made by `support`."""

from __future__ import annotations

import random

import torch
from random_inputs import RandomCall
from support import OPS

OP_OF = {function: op for op, support in OPS.items() for function in support.FUNCTIONS}
MAKERS = {make: weight for support in OPS.values() for make, weight in support.RANDOM.items()}


def random_call(seed: int, index: int) -> RandomCall:
    """The call of this number, which is always the same."""
    r = random.Random(f"{seed}/{index}")
    torch.manual_seed(r.getrandbits(60))
    made = r.choices(list(MAKERS), list(MAKERS.values()))[0](r)
    made.threads = r.choice((1, 1, 2, 3))
    return made
