"""Registration of ops under `torch.ops.corrmatch`."""

from __future__ import annotations

from collections.abc import Callable

import torch


def register(
    name: str,
    kernel: Callable[..., object],
    *,
    fake: Callable[..., object],
    save: Callable[..., None] | None = None,
    backward: Callable[..., object] | None = None,
) -> None:
    """Registers `kernel` as torch.ops.corrmatch.<name> for every device.

    The schema is read off its annotations; no argument is mutated and no result is a view of one. What
    `torch.library.custom_op` does besides is left out for its price: the first call would import the compiler (two
    seconds, 150 MB), and every call would take 0.15 ms longer.

    Args:
        name: Name of the op.
        kernel: The implementation.
        fake: Same arguments; empty results of the right shapes, dtypes and strides.
        save: `setup_context(ctx, inputs, output)` of the gradient.
        backward: `backward(ctx, *grads)`. Without it the results never require a gradient.
    """
    op = f"corrmatch::{name}"
    torch.library.define(op, torch.library.infer_schema(kernel, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(op, "CompositeExplicitAutograd", kernel)
    torch.library.register_fake(op, fake)
    if backward is None:
        torch.library.impl(op, "Autograd", torch.library.fallthrough_kernel)
    else:
        torch.library.register_autograd(op, backward, setup_context=save)
