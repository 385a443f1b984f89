"""Backbones of timm: a wrong name, missing weights and options that a model does not take are explained."""

from __future__ import annotations

import difflib
import sys
from typing import Any

import timm
import torch

OPTIONS = {  # what a model may refuse, for people
    "output_stride": "output stride",
    "drop_path_rate": "stochastic depth",
    "dynamic_img_size": "images of any size",
}


def build_backbone(name: str, pretrained: bool | str, drop_path: float = 0.0, **options: Any) -> Any:
    """A model of timm. What is wrong raises ValueError.

    Args:
        name: Of the model.
        pretrained: False, True for the weights of timm's hub, or the path of a file with weights.
        drop_path: Stochastic depth.
        options: For `timm.create_model`.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 1)
        raise ValueError(f"backbone: timm has no model {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    overlay = {"file": pretrained} if isinstance(pretrained, str) else None
    if drop_path > 0:
        options["drop_path_rate"] = drop_path
    try:
        if isinstance(pretrained, str):
            check_weights(name, pretrained)
        return timm.create_model(name, pretrained=bool(pretrained), pretrained_cfg_overlay=overlay, **options)
    except TypeError as error:
        refused = next((told for option, told in OPTIONS.items() if option in str(error)), None)
        if refused is None:
            raise
        raise ValueError(f"backbone: {name} takes no {refused}: {error}") from error
    except (OSError, RuntimeError, KeyError) as error:
        where = pretrained if isinstance(pretrained, str) else "timm's hub"
        raise ValueError(
            f"pretrained: no weights of {name} from {where} ({error!r}). Give the path of a file with its weights, or "
            "pretrained=false to train from scratch."
        ) from error


def check_weights(name: str, path: str) -> None:
    """Refuses a file that lacks weights of the backbone: timm loads what fits and passes over the rest."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    # What timm makes of the names in a file before it loads them, where it makes anything.
    renamed = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", lambda weights, model: weights)
    missing = sorted(model.state_dict().keys() - renamed(timm.models.load_state_dict(path), model).keys())
    if missing:
        raise KeyError(f"{len(missing)} of {len(model.state_dict())} are missing, {missing[0]} the first")
