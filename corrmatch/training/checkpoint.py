"""Checkpoints: all that a run needs to go on as if it had never stopped."""

from __future__ import annotations

import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from omegaconf import OmegaConf

from corrmatch.config import Config, ConfigError, from_arguments, keys, parse, to_yaml

VERSION = 2  # of what a checkpoint holds
FREE = (
    "train.workers", "train.log_every", "train.save_every", "train.cpu", "data.check", "data.root", "work_dir",
    "eval.pseudo_labels",
)  # fmt: skip


def random_state() -> dict[str, Any]:
    """Of Python, NumPy and torch in this process."""
    kind, words, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(words).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """The inverse of `random_state`."""
    random.setstate(state["python"])
    kind, words, *rest = state["numpy"]
    np.random.set_state((kind, words.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def save(paths: list[Path], content: dict[str, Any], main: bool) -> None:
    """Writes the same checkpoint to all paths, each at once or not at all. Every process takes part."""
    states = gather_object([random_state()])
    if not main:
        return
    for path in paths:
        draft = path.with_suffix(".partial")
        torch.save(content | {"random": states}, draft)
        os.replace(draft, path)


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU; runs no code from it."""
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such checkpoint")
    try:
        with zipfile.ZipFile(path) as file:  # torch takes other files for its format of old, and checks no sums
            rotten = file.testzip()
        if rotten is not None:
            raise RuntimeError(f"{rotten} is not what was written")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, ValueError, OSError, EOFError) as error:
        raise ConfigError(f"{path}: not a checkpoint, or a broken one") from error
    if not isinstance(content, dict) or not {"config", "classes", "method"} <= content.keys():
        raise ConfigError(f"{path}: not a checkpoint of corrmatch")
    if content.get("version", 1) > VERSION:
        raise ConfigError(f"{path}: written by a later version of corrmatch")
    return content


def config_of(content: dict[str, Any], overrides: list[str] | None = None) -> Config:
    """The configuration of the run that wrote a checkpoint."""
    return parse([OmegaConf.create(content["config"]), from_arguments(overrides or [])])


def check_classes(trained: list[str], classes: list[str]) -> None:
    """Refuses classes that are not those of the training, in their order."""
    if trained != classes:
        then, now = (", ".join(names) for names in (trained, classes))
        raise ConfigError(f"data.classes: the checkpoint was trained with {then}, not with {now}")


def check_same(config: Config, content: dict[str, Any], processes: int) -> None:
    """Refuses to go on with other settings than those the checkpoint was written with."""
    if content.get("version", 1) != VERSION:
        raise ConfigError("the run to be resumed was written by an earlier version of corrmatch; it can only be used")
    now, then = (OmegaConf.create(to_yaml(x)) for x in (config, config_of(content)))
    for key in keys(config):
        was, wanted = OmegaConf.select(then, key), OmegaConf.select(now, key)
        if key not in FREE and was != wanted:
            raise ConfigError(f"{key}: the run to be resumed had {was}, not {wanted}")
    if processes != len(content["random"]):
        raise ConfigError(f"the run to be resumed had {len(content['random'])} processes, not {processes}")
