"""Rows of a correlation map: see `support`. They have one implementation for all devices."""

from __future__ import annotations

import random

import torch
import wrong_arguments
from bounds import RowsOfP, beyond, unbounded
from random_inputs import RandomCall, features, maps, row_index, scale
from wrong_arguments import INDEX, K, Q

from corrmatch import ops

FUNCTIONS = ("correlation_rows",)


def sample(size=(7, 9), device="cpu", backend=None):
    arguments = [maps(2, 6, *size, device), maps(2, 6, *size, device)]
    index = torch.randint(size[0] * size[1], (2, 5), device=device)
    return lambda q, k, i: ops.correlation_rows(q, k, i), [*arguments, index]


SAMPLES = {"correlation_rows": sample}
DIFFERENTIABLE = ("correlation_rows",)


def random_correlation_rows(r: random.Random) -> RandomCall:
    (query, key), _ = features(r, flat=r.random() < 0.3)
    key = key.to(query.dtype)
    tensors = {"query": query, "key": key, "index": row_index(r, query)}
    return RandomCall("correlation_rows", disagreement, tensors, {"scale": scale(r)})


def disagreement(random_call, target, found):
    t = random_call.tensors
    index = t["index"].expand(t["query"].shape[0], -1)
    sampled = t["query"].flatten(2).gather(2, index.unsqueeze(1).expand(-1, t["query"].shape[1], -1))
    rows = RowsOfP(sampled, t["key"], random_call.options["scale"], found.dtype)
    info = torch.finfo(found.dtype)
    error = rows.error + info.eps * rows.p + info.smallest_normal
    wild = unbounded(t["query"], t["key"]).view(-1, 1, 1)
    return beyond("rows", found.flatten(2), rows.p, error, wild)


RANDOM = {random_correlation_rows: 2}
CONTRACT = {}


def call(query=Q, key=K, index=INDEX, **options):
    return ops.correlation_rows(query, key, index, **options)


VALID = (call,)
WRONG = [
    *wrong_arguments.query_key(call),
    (call, {"key": K.double()}, TypeError, "key: expected torch.float32 as query, got torch.float64"),
    *wrong_arguments.index(call),
]
DENSE = [(call, {}, "query", Q), (call, {}, "key", K), (call, {}, "index", INDEX.expand(2, -1))]
TOO_LARGE = {}


def opcheck_calls():
    return iter(())


def opcheck_others():
    maps = torch.randn(2, 3, 20, requires_grad=True), torch.randn(2, 3, 6, requires_grad=True)
    halves = [x.detach().half().requires_grad_() for x in maps]
    for shape in ((2, 6), (2, 1)):
        for pair in (maps, halves):
            yield torch.ops.corrmatch.correlation_rows.default, (*pair, torch.randint(20, shape), 0.7)
