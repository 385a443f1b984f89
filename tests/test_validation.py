"""Wrong arguments: the exception and that its message starts with the argument's name."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from corrmatch import RegionMasks, nn, ops

Q, K, V = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 6, 2), torch.randn(2, 7, 4, 5)
INDEX = torch.arange(4)
LABELS = torch.randint(4, (2, 5, 6))
FLAGS = torch.rand(2, 5, 6) < 0.5
MASKS = RegionMasks.from_bool(torch.rand(2, 3, 5, 6) < 0.5)
LOGITS = torch.randn(2, 3, 4, 5)
NAN, INF = float("nan"), float("inf")
FLOATS = "float16, bfloat16, float32, float64"
INTEGERS = "uint8, int8, int16, int32, int64"
SCALAR = "threshold: expected a number or a 0-d floating tensor"
PACKED = "masks.packed: expected shape (2, K, 1)"


def pixel(query=Q, key=K, value=V, **options):
    return ops.pixel_propagate(query, key, value, **options)


def rows(query=Q, key=K, index=INDEX, **options):
    return ops.correlation_rows(query, key, index, **options)


def masks(query=Q, key=K, index=INDEX, size=(9, 8), **options):
    return ops.region_masks(query, key, index, size, **options)


def region(labels=LABELS, reliable=FLAGS, masks=MASKS, threshold=0.5, num_classes=4, **options):
    return ops.region_propagate(labels, reliable, masks, threshold, num_classes=num_classes, **options)


def parts(image=LABELS, **options):
    return ops.connected_components(image, **options)


def pseudo(logits=LOGITS, **options):
    return ops.pseudo_label(logits, **options)


def entropy(logits=LOGITS, labels=LABELS % 3, **options):
    return ops.cross_entropy(logits, labels, **options)


def distance(logits=LOGITS, target=LOGITS + 1, **options):
    return ops.divergence(logits, target, **options)


def from_bool(masks):
    return RegionMasks.from_bool(masks)


def sized(size):
    return RegionMasks(MASKS.packed, size)


META = torch.empty(2, 3, 4, 5, device="meta")

# The call, its arguments, the exception and the start of the message, which names the argument.
WRONG = [
    *[
        case
        for call in (pixel, rows, masks)
        for case in (
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
        )
    ],
    (pixel, {"value": V.int()}, TypeError, "value: expected dtype"),
    (pixel, {"value": V[:1]}, ValueError, "value: expected a batch of 2"),
    (pixel, {"value": V[..., :4]}, ValueError, "value: expected positions (4, 5) as in query, got (4, 4)"),
    (pixel, {"value": V.mT}, ValueError, "value: expected positions (4, 5) as in query, got (5, 4)"),
    (pixel, {"value": V.flatten(2)}, ValueError, "value: expected positions (4, 5) as in query, got (20,)"),
    (pixel, {"value": V[:, :0]}, ValueError, "value: expected at least one"),
    (pixel, {"confidence": torch.rand(2, 4, 5)}, ValueError, "threshold: expected one along with confidence, got None"),
    (pixel, {"confidence": torch.rand(2, 5, 4), "threshold": 0.5}, ValueError, "confidence: expected shape (2, 4, 5)"),
    (pixel, {"confidence": torch.rand(4, 5), "threshold": 0.5}, ValueError, "confidence: expected shape (2, 4, 5)"),
    (pixel, {"confidence": FLAGS, "threshold": 0.5}, TypeError, "confidence: expected dtype"),
    (pixel, {"confidence": 0.5, "threshold": 0.5}, TypeError, "confidence: expected a tensor, got float"),
    *[
        case
        for call in (pixel, region)
        for case in (
            (call, {"threshold": "0.5"}, TypeError, "threshold: expected a number, got str"),
            (call, {"threshold": True}, TypeError, "threshold: expected a number, got bool"),
            (call, {"threshold": NAN}, ValueError, "threshold: expected a finite number, got nan"),
            (call, {"threshold": torch.tensor([0.5])}, ValueError, SCALAR),
            (call, {"threshold": torch.tensor(1)}, ValueError, SCALAR),
        )
    ],
    (pixel, {"normalize": 1}, TypeError, "normalize: expected a bool, got int"),
    (pixel, {"normalize": torch.ones(2)}, TypeError, "normalize: expected a bool, got Tensor"),
    (pixel, {"threshold": META[0, 0, 0, 0]}, ValueError, "threshold: expected a tensor on cpu as the others, got meta"),
    (region, {"threshold": None}, TypeError, "threshold: expected a number, got NoneType"),
    (rows, {"key": K.double()}, TypeError, "key: expected torch.float32 as query, got torch.float64"),
    *[
        case
        for call in (rows, masks)
        for case in (
            (call, {"index": INDEX.int()}, TypeError, "index: expected dtype int64, got int32"),
            (call, {"index": [0, 1]}, TypeError, "index: expected a tensor, got list"),
            (call, {"index": torch.tensor(0)}, ValueError, "index: expected shape (K,) or (2, K), got ()"),
            (call, {"index": INDEX.expand(3, 4)}, ValueError, "index: expected shape (K,) or (2, K), got (3, 4)"),
            (call, {"index": INDEX.expand(2, 1, 4)}, ValueError, "index: expected shape (K,) or (2, K)"),
            (call, {"index": torch.tensor([0, -1])}, ValueError, "index: expected values in [0, 19], got -1"),
            (call, {"index": torch.tensor([20, 19])}, ValueError, "index: expected values in [0, 19], got 20"),
            (call, {"index": torch.tensor([[0], [99]])}, ValueError, "index: expected values in [0, 19], got 99"),
        )
    ],
    (masks, {"query": Q.flatten(2)}, ValueError, "query: expected shape (B, channels, H, W), got (2, 3, 20)"),
    (masks, {"key": K.flatten(2)}, ValueError, "key: expected shape (B, channels, H, W), got (2, 3, 12)"),
    *[
        case
        for call in (masks, pseudo)
        for case in (
            (call, {"size": 9}, TypeError, "size: expected (H, W), got 9"),
            (call, {"size": (9,)}, TypeError, "size: expected (H, W), got (9,)"),
            (call, {"size": (9, 8, 7)}, TypeError, "size: expected (H, W), got (9, 8, 7)"),
            (call, {"size": (9.0, 8)}, TypeError, "size: expected two integers (H, W), got (9.0, 8)"),
            (call, {"size": "ab"}, TypeError, "size: expected two integers (H, W), got 'ab'"),
            (call, {"size": (0, 8)}, ValueError, "size: expected at least 1 x 1, got (0, 8)"),
            (call, {"size": (9, -1)}, ValueError, "size: expected at least 1 x 1, got (9, -1)"),
        )
    ],
    (masks, {"threshold": torch.tensor(0.5)}, TypeError, "threshold: expected a number, got Tensor"),
    (masks, {"threshold": "a"}, TypeError, "threshold: expected a number, got str"),
    (masks, {"threshold": INF}, ValueError, "threshold: expected a finite number, got inf"),
    (masks, {"connected": "foo"}, ValueError, "connected: expected one of None, 'peak', 'seed', got 'foo'"),
    (masks, {"connected": True}, ValueError, "connected: expected one of None, 'peak', 'seed', got True"),
    *[
        (call, {"connectivity": c}, ValueError, f"connectivity: expected one of 4, 8, got {c!r}")
        for call in (masks, parts)
        for c in (6, 0, "8", None, 8.0, torch.tensor([4, 8]))
    ],
    (region, {"labels": LABELS.float()}, TypeError, f"labels: expected dtype {INTEGERS}, got float32"),
    (region, {"labels": FLAGS}, TypeError, f"labels: expected dtype {INTEGERS}, got bool"),
    (region, {"labels": LABELS[0]}, ValueError, "labels: expected shape (B, H, W), got (5, 6)"),
    (region, {"labels": LABELS + 3, "reliable": FLAGS | True}, ValueError, "labels: "),
    (region, {"labels": LABELS - 3, "reliable": FLAGS | True}, ValueError, "labels: "),
    (region, {"reliable": FLAGS.float()}, TypeError, "reliable: expected dtype bool, got float32"),
    (region, {"reliable": FLAGS.to(torch.uint8)}, TypeError, "reliable: expected dtype bool, got uint8"),
    (region, {"reliable": FLAGS[:, :4]}, ValueError, "reliable: expected shape (2, 5, 6), got (2, 4, 6)"),
    (region, {"valid": LABELS}, TypeError, "valid: expected dtype bool, got int64"),
    (region, {"valid": FLAGS[:1]}, ValueError, "valid: expected shape (2, 5, 6), got (1, 5, 6)"),
    (region, {"masks": MASKS.packed}, TypeError, "masks: expected RegionMasks, got Tensor"),
    (region, {"masks": RegionMasks(MASKS.packed, (6, 5))}, ValueError, "masks: expected masks of (5, 6) pixels"),
    (region, {"masks": RegionMasks(MASKS.packed.long(), (5, 6))}, TypeError, "masks.packed: expected dtype int32"),
    (region, {"masks": RegionMasks(MASKS.packed[:1], (5, 6))}, ValueError, PACKED),
    (region, {"masks": RegionMasks(MASKS.packed[..., :0], (5, 6))}, ValueError, PACKED),
    (region, {"masks": RegionMasks(MASKS.packed[:, 0], (5, 6))}, ValueError, PACKED),
    (region, {"num_classes": 0}, ValueError, "num_classes: expected 1 to 65536, got 0"),
    (region, {"num_classes": 65537}, ValueError, "num_classes: expected 1 to 65536, got 65537"),
    (region, {"num_classes": 4.0}, TypeError, "num_classes: expected an integer, got float"),
    (region, {"num_classes": True}, TypeError, "num_classes: expected an integer, got bool"),
    (parts, {"image": LABELS.float()}, TypeError, f"image: expected dtype bool, {INTEGERS}, got float32"),
    (parts, {"image": LABELS[0, 0]}, ValueError, "image: expected shape (..., H, W), got (6,)"),
    (parts, {"image": [[1]]}, TypeError, "image: expected a tensor, got list"),
    (parts, {"background": 0.0}, TypeError, "background: expected an integer, got float"),
    (parts, {"background": 2**63}, ValueError, "background: expected"),
    (pseudo, {"logits": LABELS}, TypeError, "logits: expected dtype"),
    (pseudo, {"logits": LOGITS[0]}, ValueError, "logits: expected shape (B, channels, H, W), got (3, 4, 5)"),
    (pseudo, {"logits": LOGITS[:, :0]}, ValueError, "logits: expected at least one channel"),
    (pseudo, {"ignore": torch.zeros(2, 4, 5)}, TypeError, "ignore: expected dtype bool, got float32"),
    (pseudo, {"ignore": FLAGS}, ValueError, "ignore: expected shape (2, 4, 5), got (2, 5, 6)"),
    (pseudo, {"ignore": FLAGS, "size": (6, 5)}, ValueError, "ignore: expected shape (2, 6, 5), got (2, 5, 6)"),
    *[
        case
        for call in (entropy, distance)
        for case in (
            (call, {"logits": LABELS}, TypeError, "logits: expected dtype"),
            (call, {"logits": LOGITS.flatten(2)}, ValueError, "logits: expected shape (B, channels, H, W)"),
            (call, {"logits": LOGITS[:, :0]}, ValueError, "logits: expected at least one channel"),
            (call, {"weight": FLAGS}, TypeError, f"weight: expected dtype {FLOATS}, got bool"),
            (call, {"weight": 0.5}, TypeError, "weight: expected a tensor, got float"),
            (call, {"weight": torch.rand(1, 5, 6)}, ValueError, "weight: expected shape (2, H, W), got (1, 5, 6)"),
            (call, {"weight": torch.rand(2, 5)}, ValueError, "weight: expected shape (2, H, W), got (2, 5)"),
            (call, {"weight": torch.rand(2, 0, 6)}, ValueError, "weight: expected shape (2, H, W), got (2, 0, 6)"),
            (call, {"weight": torch.rand(2, 5, 6).requires_grad_()}, ValueError, "weight: it is given no gradient"),
            (call, {"weight": META[:, 0]}, ValueError, "weight: expected a tensor on cpu as the others, got meta"),
        )
    ],
    (entropy, {"weight": torch.rand(2, 6, 5)}, ValueError, "weight: expected shape (2, 5, 6) as labels, got (2, 6, 5)"),
    (entropy, {"labels": LABELS.float()}, TypeError, f"labels: expected dtype {INTEGERS}, got float32"),
    (entropy, {"labels": FLAGS}, TypeError, f"labels: expected dtype {INTEGERS}, got bool"),
    (entropy, {"labels": LABELS[:1]}, ValueError, "labels: expected shape (2, H, W), got (1, 5, 6)"),
    (entropy, {"labels": LABELS[0]}, ValueError, "labels: expected shape (2, H, W), got (5, 6)"),
    (entropy, {"labels": LABELS + 3}, ValueError, "labels: expected values in [0, 2] where the weight is not 0, got "),
    (distance, {"target": LOGITS[..., :4]}, ValueError, "target: expected shape (2, 3, 4, 5) as logits"),
    (distance, {"target": LOGITS[:1]}, ValueError, "target: expected a batch of 2 as the others, got 1"),
    (distance, {"target": LABELS}, TypeError, "target: expected dtype"),
    (distance, {"target": LOGITS.clone().requires_grad_()}, ValueError, "target: it is given no gradient; detach it"),
    *[
        (sized, {"size": size}, TypeError, f"size: expected {what}, got {size!r}")
        for what, sizes in {
            "(H, W)": (None, 30, torch.tensor([5, 6])),
            "two integers (H, W)": ((5,), (5, 6, 7), (5.0, 6), "56", {5: 1}),
        }.items()
        for size in sizes
    ],
    (from_bool, {"masks": LABELS[None]}, TypeError, "masks: expected a bool tensor, got torch.int64"),
    (from_bool, {"masks": FLAGS}, ValueError, "masks: expected shape (B, K, H, W), got (2, 5, 6)"),
    *[
        case
        for call in (pixel, masks, region, parts, pseudo, entropy, distance)
        for case in (
            (call, {"backend": "gpu"}, ValueError, "backend: expected one of cuda, triton, cpu, reference, got 'gpu'"),
            (call, {"backend": 0}, TypeError, "backend: expected a name or None, got int"),
        )
    ],
]


@pytest.mark.parametrize(("call", "arguments", "exception", "message"), WRONG)
def test_refused(call, arguments, exception, message):
    with pytest.raises(exception, match=f"^{re.escape(message)}") as caught:
        call(**arguments)
    assert type(caught.value) is exception


@pytest.mark.parametrize("call", [pixel, rows, masks, region, parts, pseudo, entropy, distance])
def test_not_refused(call):
    """What the table above varies is right."""
    assert call() is not None


def test_only_keywords_after_the_tensors():
    with pytest.raises(TypeError, match="positional"):
        ops.pixel_propagate(Q, K, V, 0.5)


LAYOUTS = {
    "sparse_coo": lambda x: x.to_sparse(),
    "sparse_csr": lambda x: x.flatten(0, -2).to_sparse_csr(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
}
PIXELS = torch.rand(2, 5, 6)
GATED = {"confidence": torch.rand(2, 4, 5), "threshold": 0.5}
# A call, its further arguments and the name of each tensor that it takes, with one that it would take were it dense.
DENSE = [
    *[(call, {}, name, x) for call in (pixel, rows, masks) for name, x in (("query", Q), ("key", K))],
    *[(call, {}, "index", INDEX.expand(2, -1)) for call in (rows, masks)],
    (pixel, {}, "value", V),
    (pixel, GATED, "confidence", GATED["confidence"]),
    (pixel, {}, "threshold", torch.tensor(0.5)),
    (region, {}, "labels", LABELS),
    (region, {}, "reliable", FLAGS),
    (region, {}, "valid", FLAGS),
    (region, {}, "threshold", torch.tensor(0.5)),
    (parts, {}, "image", LABELS),
    (parts, {}, "image", FLAGS),
    (pseudo, {}, "logits", LOGITS),
    (pseudo, {"size": (5, 6)}, "ignore", FLAGS),
    (entropy, {}, "logits", LOGITS),
    (entropy, {}, "labels", LABELS % 3),
    (entropy, {}, "weight", PIXELS),
    (distance, {}, "logits", LOGITS),
    (distance, {}, "target", LOGITS),
    (distance, {}, "weight", PIXELS),
    (from_bool, {}, "masks", torch.rand(2, 3, 5, 6) < 0.5),
]


def placed(x, layout):
    """Whether there are tensors like x of that layout."""
    return not (layout == "mkldnn" and not x.is_floating_point()) and (x.dim() >= 2 or layout == "sparse_coo")


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize(
    ("call", "options", "name", "x", "layout"),
    [(*case, layout) for case in DENSE for layout in LAYOUTS if placed(case[3], layout)],
)
def test_other_layouts_are_refused(call, options, name, x, layout):
    """With a message that names the argument and the layout."""
    message = rf"^{name}: expected a dense tensor \(torch\.strided\), got layout {layout}$"
    with pytest.raises(TypeError, match=message):
        call(**{**options, name: LAYOUTS[layout](x)})


@pytest.mark.parametrize("layout", ["sparse_coo", "nested"])
def test_packed_masks_of_another_layout_are_refused(layout):
    placed = RegionMasks(LAYOUTS[layout](MASKS.packed), MASKS.size)
    with pytest.raises(TypeError, match=rf"^masks\.packed: expected a dense tensor .*got layout {layout}$"):
        region(masks=placed)


@pytest.mark.parametrize("size", [[9, 8], (9, 8), torch.Size([9, 8]), np.array([9, 8])], ids=repr)
def test_any_sequence_is_a_size(size):
    assert masks(size=size) == masks(size=(9, 8))
    assert pseudo(size=size)[0].shape == (2, 9, 8)
    assert nn.DynamicThreshold()(LOGITS, size=size)[0].shape == (2, 9, 8)
    head = nn.CorrelationHead(3, 3, hidden_channels=4)
    assert head(LOGITS, LOGITS, num_masks=2, mask_size=size).masks.size == (9, 8)
