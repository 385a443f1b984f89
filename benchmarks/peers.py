"""What corrmatch is measured against: other ways to compute the same things with what others have written.

Functions take what the op of the same name does, for maps (B, channels, H, W), and return its numbers: masks as bools,
of losses the sum.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Propagate = Callable[[Tensor, Tensor, Tensor], Tensor]


def published(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The published formulation: the whole map, in the dtype of the inputs."""
    q, k, v = query.flatten(2), key.flatten(2), value.flatten(2)
    p = (q.mT @ k / math.sqrt(q.shape[1])).softmax(-1)
    return (v @ p).view(*v.shape[:2], *key.shape[2:])


class _RowChunked(torch.autograd.Function):
    """A few rows of the map at a time, computed again in the backward."""

    @staticmethod
    def forward(ctx, query, key, value, rows):  # type: ignore[no-untyped-def]
        q, k, v = query.flatten(2), key.flatten(2), value.flatten(2)
        scale, out = 1 / math.sqrt(q.shape[1]), torch.zeros_like(v)
        for i in range(0, q.shape[2], rows):
            p = (q[:, :, i : i + rows].mT @ k).mul_(scale).softmax(-1)
            out.baddbmm_(v[:, :, i : i + rows], p)
        ctx.save_for_backward(query, key, value)
        ctx.rows = rows
        return out.view(*v.shape[:2], *key.shape[2:])

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        query, key, value = ctx.saved_tensors
        q, k, v, g = (x.flatten(2) for x in (query, key, value, grad))
        scale, rows = 1 / math.sqrt(q.shape[1]), ctx.rows
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.empty_like(v)
        for i in range(0, q.shape[2], rows):
            at = slice(i, i + rows)
            p = (q[:, :, at].mT @ k).mul_(scale).softmax(-1)
            if ctx.needs_input_grad[2]:
                dv[:, :, at] = g @ p.mT
            t = v[:, :, at].mT @ g
            t.sub_((p * t).sum(-1, keepdim=True)).mul_(p).mul_(scale)
            dq[:, :, at] = k @ t.mT
            dk.baddbmm_(q[:, :, at], t)
        return dq.view_as(query), dk.view_as(key), dv.view_as(value) if ctx.needs_input_grad[2] else None, None


def row_chunked(rows: int) -> Propagate:
    """Row-chunked eager PyTorch with recomputation in the backward."""
    return lambda query, key, value: _RowChunked.apply(query, key, value, rows)


Attention = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def attention_composition(attention: Attention, *, power_of_two: bool = False) -> Propagate:
    """Two attentions from parts that exist; differentiable where the lse of `attention` is.

    The first gives lse_i. The second swaps the roles of query and key with -lse_i folded into spare channels, so its
    softmax over i is proportional to P_ij; the exponential of its own lse undoes its normalisation.

    Args:
        attention: (query, key, value, scale), each (B, 1, N, channels), to the result and the lse (B, 1, N).
        power_of_two: Whether it takes only so many channels.
    """

    def propagate(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.flatten(2).mT.unsqueeze(1) for x in (query, key, value))
        scale, exact = 1 / math.sqrt(q.shape[-1]), q.dtype in (torch.float32, torch.float64)
        pieces = 1 if exact else 3  # an lse in half precision needs three channels
        channels = max(q.shape[-1] + pieces, v.shape[-1])
        if power_of_two:
            channels = max(16, 1 << (channels - 1).bit_length())

        def widen(*columns: Tensor) -> Tensor:
            x = torch.cat(columns, -1)
            return F.pad(x, (0, channels - x.shape[-1]))

        _, lse = attention(widen(q), widen(k), widen(k), scale)
        rest, folded = -lse.unsqueeze(-1), []
        for _ in range(pieces):
            folded.append(rest.to(q.dtype))
            rest = (rest - folded[-1]).detach()  # the first piece carries the gradient
        out, mass = attention(widen(k, *[torch.ones_like(k[..., :1])] * pieces), widen(q * scale, *folded), widen(v), 1)
        out = out[..., : v.shape[-1]] * mass.unsqueeze(-1).exp().to(v.dtype)
        return out.squeeze(1).mT.reshape(*value.shape[:2], *key.shape[2:])

    return propagate


def cpu_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Flash attention of PyTorch on a CPU, forward only: its lse has no gradient there."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)
    return out, lse.reshape(query.shape[:-1])


@functools.cache
def flex_attention() -> Attention:
    """FlexAttention, compiled: a GPU's flash attention whose lse has a gradient."""
    from torch.nn.attention.flex_attention import AuxRequest
    from torch.nn.attention.flex_attention import flex_attention as flex

    compiled = torch.compile(flex, dynamic=False)

    def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, aux = compiled(query, key, value, scale=scale, return_aux=AuxRequest(lse=True))
        return out, aux.lse

    return attention


def region_masks(query: Tensor, key: Tensor, index: Tensor, size: tuple[int, int]) -> Tensor:
    """The published steps: rows of the map, enlarged as floats, min-max normalised, cut at one half. Bool."""
    q, k = query.flatten(2), key.flatten(2)
    rows = (q[:, :, index].mT @ k / math.sqrt(q.shape[1])).softmax(-1).view(q.shape[0], -1, *key.shape[2:])
    large = F.interpolate(rows, size=size, mode="bilinear", align_corners=True).flatten(2)
    low, high = large.min(2, keepdim=True)[0], large.max(2, keepdim=True)[0]
    return ((large - low) / (high - low) > 0.5).view(q.shape[0], -1, *size)


def region_masks_chunked(query: Tensor, key: Tensor, index: Tensor, size: tuple[int, int], masks: int = 8) -> Tensor:
    """The same a few masks at a time, so that the enlarged maps stay in the cache."""
    out = torch.empty(query.shape[0], index.shape[0], *size, dtype=torch.bool, device=query.device)
    for b in range(query.shape[0]):
        for i in range(0, index.shape[0], masks):
            out[b, i : i + masks] = region_masks(query[b : b + 1], key[b : b + 1], index[i : i + masks], size)[0]
    return out


def region_propagate(
    labels: Tensor, reliable: Tensor, masks: Tensor, threshold: float, num_classes: int
) -> tuple[Tensor, Tensor]:
    """The published kind of loop: over pictures and masks in Python, with a read of the result in each turn."""
    labels, after = labels.clone(), reliable.clone()
    for b in range(labels.shape[0]):
        for region in masks[b]:
            counted = region & reliable[b]
            count = counted.sum().float()
            if count == 0 or count / region.sum().float() < threshold:
                continue
            classes, counts = labels[b][counted].unique(return_counts=True)
            dominant = counts.argmax()
            if counts[dominant].float() / count > threshold:
                labels[b][region] = classes[dominant]
                after[b] |= region
    return labels, after


def region_propagate_numpy(
    labels: Tensor, reliable: Tensor, masks: Tensor, threshold: float, num_classes: int
) -> tuple[Tensor, Tensor]:
    """The same loop in NumPy, which starts its steps sooner and counts bits faster than PyTorch does on a CPU."""
    labels, after = labels.clone(), reliable.clone()
    limit = np.float32(threshold)
    for label, sure, out, regions in zip(labels.numpy(), reliable.numpy(), after.numpy(), masks.numpy(), strict=True):
        for region in regions:
            counted = region & sure
            count = np.float32(np.count_nonzero(counted))
            if count == 0 or count / np.float32(np.count_nonzero(region)) < limit:
                continue
            counts = np.bincount(label[counted], minlength=num_classes)
            dominant = counts.argmax()
            if np.float32(counts[dominant]) / count > limit:
                label[region] = dominant
                out |= region
    return labels, after


def pseudo_label(logits: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Enlargement, softmax, maximum, and the largest confidence of each class."""
    large = F.interpolate(logits, size=size, mode="bilinear", align_corners=True)
    confidence, labels = large.softmax(1).max(1)
    return labels, confidence.float(), _class_peak(confidence, labels, logits.shape[1])


def pseudo_label_logsumexp(logits: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The same without the softmax of every class: the largest logit against the log of the sum."""
    large = F.interpolate(logits, size=size, mode="bilinear", align_corners=True)
    peak, labels = large.max(1)
    confidence = (peak - large.logsumexp(1)).exp()
    return labels, confidence.float(), _class_peak(confidence, labels, logits.shape[1])


def _class_peak(confidence: Tensor, labels: Tensor, classes: int) -> Tensor:
    return confidence.new_zeros(classes).scatter_reduce(0, labels.flatten(), confidence.flatten(), "amax").float()


def cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Enlargement, cross-entropy, weighted sum."""
    large = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=True)
    return (F.cross_entropy(large, labels, reduction="none") * weight).sum()


def component_peers(connectivity: int) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Connected components of a binary picture by the libraries that are installed."""
    peers: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
    if importlib.util.find_spec("scipy"):
        from scipy import ndimage

        structure = np.ones((3, 3)) if connectivity == 8 else None
        peers["scipy"] = lambda image: ndimage.label(image, structure)[0]
    if importlib.util.find_spec("cv2"):
        import cv2

        cv2.setNumThreads(torch.get_num_threads())
        peers["OpenCV"] = lambda image: cv2.connectedComponents(image, connectivity=connectivity)[1]
    if importlib.util.find_spec("cc3d"):
        import cc3d

        peers["cc3d"] = lambda image: cc3d.connected_components(image, connectivity=connectivity)
    return peers


def cupyx_components(connectivity: int) -> Callable[[Tensor], Tensor] | None:
    """Connected components of a binary picture on a GPU by CuPy, where it is installed."""
    if importlib.util.find_spec("cupyx") is None:
        return None
    import cupy
    from cupyx.scipy import ndimage

    structure = cupy.ones((3, 3)) if connectivity == 8 else None
    return lambda image: torch.from_dlpack(ndimage.label(cupy.from_dlpack(image), structure)[0])
