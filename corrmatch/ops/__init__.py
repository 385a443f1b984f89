"""The public functions: each validates its arguments, chooses a backend and calls the registered op."""

from corrmatch.ops.connected_components import connected_components
from corrmatch.ops.correlation_rows import correlation_rows
from corrmatch.ops.pixel_loss import cross_entropy, divergence
from corrmatch.ops.pixel_propagate import pixel_propagate
from corrmatch.ops.pseudo_label import pseudo_label
from corrmatch.ops.region_masks import region_masks
from corrmatch.ops.region_propagate import region_propagate

__all__ = [
    "connected_components",
    "correlation_rows",
    "cross_entropy",
    "divergence",
    "pixel_propagate",
    "pseudo_label",
    "region_masks",
    "region_propagate",
]
