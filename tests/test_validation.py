"""Wrong arguments: the exception and that its message starts with the argument's name."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from support import OPS
from wrong_arguments import FLAGS, LABELS, LOGITS, MASKS, K, Q, V

from corrmatch import RegionMasks, nn, ops

SUPPORT = OPS.values()


def from_bool(masks):
    return RegionMasks.from_bool(masks)


def sized(size):
    return RegionMasks(MASKS.packed, size)


# The call, its arguments, the exception and the start of the message, which names the argument.
WRONG = [
    *[case for support in SUPPORT for case in support.WRONG],
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
]


@pytest.mark.parametrize(("call", "arguments", "exception", "message"), WRONG)
def test_refused(call, arguments, exception, message):
    with pytest.raises(exception, match=f"^{re.escape(message)}") as caught:
        call(**arguments)
    assert type(caught.value) is exception


@pytest.mark.parametrize("call", [call for support in SUPPORT for call in support.VALID])
def test_not_refused(call):
    """The arguments that the table above varies are valid."""
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
# A call, its further arguments and the name of each tensor that it takes, with one that it would take were it dense.
DENSE = [
    *[case for support in SUPPORT for case in support.DENSE],
    (from_bool, {}, "masks", torch.rand(2, 3, 5, 6) < 0.5),
]


def placed(x, layout):
    """Whether tensors like x exist with that layout."""
    return not (layout == "mkldnn" and not x.is_floating_point()) and (x.dim() >= 2 or layout == "sparse_coo")


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize(
    ("call", "options", "name", "x", "layout"),
    [(*case, layout) for case in DENSE for layout in LAYOUTS if placed(case[3], layout)],
)
def test_other_layouts_are_refused(call, options, name, x, layout):
    """The message names the argument and the layout."""
    message = rf"^{name}: expected a dense tensor \(torch\.strided\), got layout {layout}$"
    with pytest.raises(TypeError, match=message):
        call(**{**options, name: LAYOUTS[layout](x)})


@pytest.mark.parametrize("layout", ["sparse_coo", "nested"])
def test_packed_masks_of_another_layout_are_refused(layout):
    placed = RegionMasks(LAYOUTS[layout](MASKS.packed), MASKS.size)
    with pytest.raises(TypeError, match=rf"^masks\.packed: expected a dense tensor .*got layout {layout}$"):
        OPS["region_propagate"].call(masks=placed)


@pytest.mark.parametrize("size", [[9, 8], (9, 8), torch.Size([9, 8]), np.array([9, 8])], ids=repr)
def test_any_sequence_is_a_size(size):
    masks, pseudo_label = OPS["region_masks"].call, OPS["pseudo_label"].call
    assert masks(size=size) == masks(size=(9, 8))
    assert pseudo_label(size=size)[0].shape == (2, 9, 8)
    assert nn.DynamicThreshold()(LOGITS, size=size)[0].shape == (2, 9, 8)
    head = nn.CorrelationHead(3, 3, hidden_channels=4)
    assert head(LOGITS, LOGITS, num_masks=2, mask_size=size).masks.size == (9, 8)
