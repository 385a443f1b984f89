"""Random calls of every op for `fuzz.py`, made of what `support` says of each."""

from __future__ import annotations

import random

import torch
from random_inputs import RandomCall
from support import OPS

OP_OF = {function: op for op, support in OPS.items() for function in support.FUNCTIONS}
MAKERS = {make: weight for support in OPS.values() for make, weight in support.RANDOM.items()}


def random_call(seed: int, index: int) -> RandomCall:
    """The call of that number: the same one every time."""
    r = random.Random(f"{seed}/{index}")
    torch.manual_seed(r.getrandbits(60))
    made = r.choices(list(MAKERS), list(MAKERS.values()))[0](r)
    made.threads = r.choice((1, 1, 2, 3))
    return made
