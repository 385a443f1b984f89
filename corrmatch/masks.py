"""Bit-packed boolean masks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from corrmatch.dtypes import dense

WORD = 32


@dataclass(frozen=True, eq=False)
class RegionMasks:
    """K boolean masks of H x W pixels for each of B images, one bit a pixel.

    Bit `p % 32` of word `p // 32` is pixel `p = y * W + x`; the bits behind the last pixel are 0. 128 masks of
    321 x 321 take 1.65 MB an image, against 13.2 MB as bool.

    Masks are equal if they have the same size, device and bits; a comparison waits for a GPU. They are a pytree with
    the leaf `packed`, so torch.export, torch.compile, torch.func and `tree_map` accept them. After an import of
    corrmatch torch.load reads them with weights_only=True.

    Args:
        packed: int32 (B, K, ceil(H * W / 32)).
        size: (H, W), any sequence of two integers. It is stored as a tuple.

    Raises:
        TypeError: The size is not a sequence of two integers.
    """

    packed: Tensor
    size: tuple[int, int]

    def __post_init__(self) -> None:
        size = self.size
        if type(size) is not tuple or len(size) != 2 or type(size[0]) is not int or type(size[1]) is not int:
            object.__setattr__(self, "size", _plain(size))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RegionMasks):
            return NotImplemented
        a, b = self.packed, other.packed
        if self.size != other.size or a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
            return False
        return a is b or (not a.is_meta and torch.equal(a, b))

    def __hash__(self) -> int:
        return hash((self.size, self.packed.shape))

    @property
    def device(self) -> torch.device:
        """The device of the masks."""
        return self.packed.device

    @staticmethod
    def words(size: tuple[int, int]) -> int:
        """The number of 32-bit words of a mask of this size."""
        return -(-size[0] * size[1] // WORD)

    @classmethod
    def from_bool(cls, masks: Tensor) -> RegionMasks:
        """Packs a bool tensor (B, K, H, W)."""
        if masks.dtype != torch.bool:
            raise TypeError(f"masks: expected a bool tensor, got {masks.dtype}")
        dense("masks", masks)
        if masks.dim() != 4:
            raise ValueError(f"masks: expected shape (B, K, H, W), got {tuple(masks.shape)}")
        batch, count, height, width = masks.shape
        words = cls.words((height, width))
        padding = words * WORD - height * width
        bits = torch.nn.functional.pad(masks.flatten(2).to(torch.uint8), (0, padding)).view(batch, count, words, 4, 8)
        # Eight bits are added up to a byte. Four bytes are reinterpreted as a word: the low byte is first in memory.
        octets = (bits << torch.arange(8, dtype=torch.uint8, device=masks.device)).sum(-1, dtype=torch.uint8)
        return cls(octets.view(torch.int32).squeeze(-1), (height, width))

    def to_bool(self) -> Tensor:
        """The masks as a bool tensor (B, K, H, W)."""
        height, width = self.size
        batch, count = self.packed.shape[:2]
        octets = self._octets().unsqueeze(-1)
        bits = (octets >> torch.arange(8, dtype=torch.uint8, device=octets.device)) & 1
        return bits.flatten(2)[..., : height * width].reshape(batch, count, height, width).to(torch.bool)

    def area(self) -> Tensor:
        """The number of pixels of each mask, int64 (B, K)."""
        # The population count of a byte adds neighbouring groups of 1, 2 and 4 bits. Four counts are added for a word.
        octets = self._octets()
        octets = octets - ((octets >> 1) & 0x55)
        octets = (octets & 0x33) + ((octets >> 2) & 0x33)
        octets = (octets + (octets >> 4)) & 0x0F
        return ((octets.view(torch.int32) * 0x01010101) >> 24).sum((-2, -1), dtype=torch.int64)

    def _octets(self) -> Tensor:
        """The words as uint8 (B, K, words, 4), low byte first."""
        # contiguous() would not do: it keeps any stride of a last dimension of one word.
        return self.packed.clone(memory_format=torch.contiguous_format).unsqueeze(-1).view(torch.uint8)

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False, copy: bool = False) -> RegionMasks:
        """The same masks on another device, as `Tensor.to` moves a tensor."""
        moved = self.packed.to(torch.device(device), non_blocking=non_blocking, copy=copy)
        return RegionMasks(moved, self.size)

    def cpu(self) -> RegionMasks:
        """The same masks on the CPU."""
        return self.to("cpu")

    def cuda(self, device: torch.device | str | int = "cuda", *, non_blocking: bool = False) -> RegionMasks:
        """The same masks on a GPU, by default the current one."""
        return self.to(device, non_blocking=non_blocking)

    def pin_memory(self) -> RegionMasks:
        """The same masks in pinned memory, from which copies to a GPU can be asynchronous."""
        return RegionMasks(self.packed.pin_memory(), self.size)

    def is_pinned(self) -> bool:
        """Whether the masks are in pinned memory."""
        return self.packed.is_pinned()


def _plain(size: Any) -> tuple[int, int]:
    """A size as a tuple of integers of Python, or of symbolic integers of torch."""
    if not isinstance(size, Iterable) or isinstance(size, Tensor):
        raise TypeError(f"size: expected (H, W), got {size!r}")
    sides = tuple(size)
    if len(sides) != 2 or not all(isinstance(x, Integral | torch.SymInt) for x in sides):
        raise TypeError(f"size: expected two integers (H, W), got {size!r}")
    height, width = (x if isinstance(x, torch.SymInt) else int(x) for x in sides)
    return height, width  # type: ignore[return-value]


# A side that is a number is part of the structure. torch.export traces a dynamic side, which is then a leaf, too.
Structure = tuple[int | None, int | None]


def _flatten(masks: RegionMasks) -> tuple[list[Any], Structure]:
    symbolic = [side for side in masks.size if isinstance(side, torch.SymInt)]
    height, width = (None if isinstance(side, torch.SymInt) else side for side in masks.size)
    return [masks.packed, *symbolic], (height, width)


def _flatten_with_keys(masks: RegionMasks) -> tuple[list[tuple[pytree.KeyEntry, Any]], Structure]:
    leaves, structure = _flatten(masks)
    keys: list[pytree.KeyEntry] = [pytree.GetAttrKey("packed")]
    keys += [pytree.SequenceKey(i) for i, side in enumerate(structure) if side is None]
    return list(zip(keys, leaves, strict=True)), structure


def _unflatten(leaves: Iterable[Any], structure: Structure) -> RegionMasks:
    packed, *symbolic = leaves
    rest = iter(symbolic)
    return RegionMasks(packed, tuple(next(rest) if side is None else side for side in structure))  # type: ignore[arg-type]


pytree.register_pytree_node(
    RegionMasks,
    _flatten,
    _unflatten,
    serialized_type_name="corrmatch.RegionMasks",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
    flatten_with_keys_fn=_flatten_with_keys,
)
torch.serialization.add_safe_globals([RegionMasks])
