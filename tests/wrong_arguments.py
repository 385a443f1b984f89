"""Arguments that several ops refuse, for the tables WRONG of `support`."""

from __future__ import annotations

import torch

from corrmatch import RegionMasks

Q, K, V = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 6, 2), torch.randn(2, 7, 4, 5)
INDEX = torch.arange(4)
LABELS = torch.randint(4, (2, 5, 6))
FLAGS = torch.rand(2, 5, 6) < 0.5
MASKS = RegionMasks.from_bool(torch.rand(2, 3, 5, 6) < 0.5)
LOGITS = torch.randn(2, 3, 4, 5)
META = torch.empty(2, 3, 4, 5, device="meta")
NAN, INF = float("nan"), float("inf")
FLOATS = "float16, bfloat16, float32, float64"
INTEGERS = "uint8, int8, int16, int32, int64"
SCALAR = "threshold: expected a number or a 0-d floating tensor"
NAMES = "cuda, triton, cpu, reference"


def query_key(call):
    return [
        (call, {"query": [1.0]}, TypeError, "query: expected a tensor, got list"),
        (call, {"query": None}, TypeError, "query: expected a tensor, got NoneType"),
        (call, {"query": Q.numpy()}, TypeError, "query: expected a tensor, got ndarray"),
        (call, {"query": Q.int()}, TypeError, f"query: expected dtype {FLOATS}, got int32"),
        (call, {"query": Q > 0}, TypeError, f"query: expected dtype {FLOATS}, got bool"),
        (call, {"query": Q.to(torch.complex64)}, TypeError, "query: expected dtype"),
        (call, {"query": Q[0, 0]}, ValueError, "query: expected shape (B, channels, H, W)"),
        (call, {"query": Q[None]}, ValueError, "query: expected shape (B, channels, H, W)"),
        (call, {"query": Q[:, :0]}, ValueError, "query: expected at least one channel and one position"),
        (call, {"query": Q[:, :, :0]}, ValueError, "query: expected at least one channel and one position"),
        (call, {"key": K[:1]}, ValueError, "key: expected a batch of 2 as the others, got 1"),
        (call, {"key": K[:, :2]}, ValueError, "key: expected 3 channels as in query, got 2"),
        (call, {"key": K.long()}, TypeError, "key: expected dtype"),
        (call, {"key": K[..., :0]}, ValueError, "key: expected at least one"),
        (call, {"key": META}, ValueError, "key: expected a tensor on cpu as the others, got meta"),
        (call, {"scale": "1"}, TypeError, "scale: expected a number, got str"),
        (call, {"scale": True}, TypeError, "scale: expected a number, got bool"),
        (call, {"scale": torch.tensor(1.0)}, TypeError, "scale: expected a number, got Tensor"),
        (call, {"scale": 1j}, TypeError, "scale: expected a number, got complex"),
        (call, {"scale": NAN}, ValueError, "scale: expected a finite number, got nan"),
        (call, {"scale": -INF}, ValueError, "scale: expected a finite number, got -inf"),
    ]


def threshold(call):
    return [
        (call, {"threshold": "0.5"}, TypeError, "threshold: expected a number, got str"),
        (call, {"threshold": True}, TypeError, "threshold: expected a number, got bool"),
        (call, {"threshold": NAN}, ValueError, "threshold: expected a finite number, got nan"),
        (call, {"threshold": torch.tensor([0.5])}, ValueError, SCALAR),
        (call, {"threshold": torch.tensor(1)}, ValueError, SCALAR),
    ]


def index(call):
    return [
        (call, {"index": INDEX.int()}, TypeError, "index: expected dtype int64, got int32"),
        (call, {"index": [0, 1]}, TypeError, "index: expected a tensor, got list"),
        (call, {"index": torch.tensor(0)}, ValueError, "index: expected shape (K,) or (2, K), got ()"),
        (call, {"index": INDEX.expand(3, 4)}, ValueError, "index: expected shape (K,) or (2, K), got (3, 4)"),
        (call, {"index": INDEX.expand(2, 1, 4)}, ValueError, "index: expected shape (K,) or (2, K)"),
        (call, {"index": torch.tensor([0, -1])}, ValueError, "index: expected values in [0, 19], got -1"),
        (call, {"index": torch.tensor([20, 19])}, ValueError, "index: expected values in [0, 19], got 20"),
        (call, {"index": torch.tensor([[0], [99]])}, ValueError, "index: expected values in [0, 19], got 99"),
    ]


def size(call):
    return [
        (call, {"size": 9}, TypeError, "size: expected (H, W), got 9"),
        (call, {"size": (9,)}, TypeError, "size: expected (H, W), got (9,)"),
        (call, {"size": (9, 8, 7)}, TypeError, "size: expected (H, W), got (9, 8, 7)"),
        (call, {"size": (9.0, 8)}, TypeError, "size: expected two integers (H, W), got (9.0, 8)"),
        (call, {"size": "ab"}, TypeError, "size: expected two integers (H, W), got 'ab'"),
        (call, {"size": (0, 8)}, ValueError, "size: expected at least 1 x 1, got (0, 8)"),
        (call, {"size": (9, -1)}, ValueError, "size: expected at least 1 x 1, got (9, -1)"),
    ]


def connectivity(call):
    return [
        (call, {"connectivity": c}, ValueError, f"connectivity: expected one of 4, 8, got {c!r}")
        for c in (6, 0, "8", None, 8.0, torch.tensor([4, 8]))
    ]


def backend(call):
    return [
        (call, {"backend": "gpu"}, ValueError, f"backend: expected one of {NAMES}, got 'gpu'"),
        (call, {"backend": 0}, TypeError, "backend: expected a name or None, got int"),
    ]
