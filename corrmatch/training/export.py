"""Exports the evaluated network as a file that needs neither corrmatch nor timm to run."""

from __future__ import annotations

import json
import math
import operator
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Graph

from corrmatch.config import ConfigError
from corrmatch.data.views import DEVIATION, MEAN
from corrmatch.models.network import Network
from corrmatch.paths import make_folder

SMALLEST = 48  # pixels of a side: feature maps then have more than one position, a case that exporters specialise
METADATA = "corrmatch.json"  # the file inside a .pt2 that holds the class names


class Whole(nn.Module):
    """Logits (B, C, H, W) of normalised images (B, 3, H, W) of any size, as in `corrmatch predict`."""

    def __init__(self, network: Network):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """The logits of `Network.whole`."""
        return self.network.whole(images)


def export(network: Network, classes: list[str], out: Path) -> None:
    """Writes the network as `out`: a .pt2 of torch.export, or .onnx. Any batch, and sides from `SMALLEST` pixels on.

    Both carry the names of the classes and the mean and deviation that images are normalised with: a .pt2 as JSON in
    the extra file `METADATA`, an .onnx in its metadata.
    """
    if out.suffix not in (".pt2", ".onnx"):
        raise ConfigError(f"{out}: expected the name of a .pt2 or an .onnx")
    try:
        make_folder(out.parent)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    metadata = {"classes": classes, "mean": MEAN, "deviation": DEVIATION}
    draft = out.with_suffix(f".partial{out.suffix}")
    if out.suffix == ".pt2":
        torch.export.save(program_of(network), draft, extra_files={METADATA: json.dumps(metadata)})
    else:
        _save_onnx(program_of(network), metadata, draft)
    os.replace(draft, out)


def program_of(network: Network) -> ExportedProgram:
    """The network in evaluation mode, traced once for images of all sizes."""
    smallest = max(SMALLEST, 3 * getattr(network, "patch", 1))
    sides = {side: Dim(name, min=smallest) for side, name in ((2, "height"), (3, "width"))}
    example = torch.zeros(2, 3, 2 * smallest + 3, 2 * smallest + 6)
    program = torch.export.export(
        Whole(network).eval(), (example,), dynamic_shapes={"images": {0: Dim("batch", min=1)} | sides},
        prefer_deferred_runtime_asserts_over_guards=True,
    )  # fmt: skip
    _divide_whole_numbers(program.graph)
    return program


def _divide_whole_numbers(graph: Graph) -> None:
    """Computes ceil(x / n) as -(-x // n). Padded layers of timm use the former, which a .pt2 cannot represent."""
    for node in graph.find_nodes(op="call_function", target=math.ceil):
        quotient = node.args[0]
        if quotient.target is not operator.truediv:
            raise ConfigError("the backbone computes sizes that cannot be exported")
        x, n = quotient.args
        with graph.inserting_before(node):
            negated = graph.call_function(operator.neg, (x,))
            floor = graph.call_function(operator.floordiv, (negated, n))
            whole = graph.call_function(operator.neg, (floor,))
        negated.meta["val"] = -x.meta["val"]
        floor.meta["val"] = negated.meta["val"] // n
        whole.meta["val"] = -floor.meta["val"]
        node.replace_all_uses_with(whole)
    graph.eliminate_dead_code()


def _save_onnx(program: ExportedProgram, metadata: dict[str, Any], out: Path) -> None:
    for name in ("onnx", "onnxscript"):  # a clearer message than that of torch's exporter
        __import__(name)
    converted = torch.onnx.export(program, dynamo=True, input_names=["images"], output_names=["logits"], verbose=False)
    if converted is None:
        raise RuntimeError("torch.onnx.export returned no program")
    converted.model.metadata_props.update({name: json.dumps(value) for name, value in metadata.items()})
    converted.save(out)
