"""Checkpoints. A run that is resumed from one continues bit for bit as if it had not been interrupted."""

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

VERSION = 2  # of the format
FREE = (
    "train.workers", "train.log_every", "train.save_every", "train.cpu", "data.check", "data.root", "work_dir",
    "eval.pseudo_labels",
)  # fmt: skip


def random_state() -> dict[str, Any]:
    """The states of the random generators of Python, NumPy and torch in this process."""
    kind, words, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(words).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restores the states that `random_state` returned."""
    random.setstate(state["python"])
    kind, words, *rest = state["numpy"]
    np.random.set_state((kind, words.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def save(paths: list[Path], content: dict[str, Any], main: bool) -> None:
    """Writes the same checkpoint to all paths, each atomically. All processes have to call it."""
    states = gather_object([random_state()])
    if not main:
        return
    for path in paths:
        draft = path.with_suffix(".partial")
        torch.save(content | {"random": states}, draft)
        os.replace(draft, path)


def load(path: Path) -> dict[str, Any]:
    """Loads a checkpoint onto the CPU. No code from the file is executed."""
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such checkpoint")
    try:
        with zipfile.ZipFile(path) as file:  # torch accepts other formats, and verifies no checksums
            damaged = file.testzip()
        if damaged is not None:
            raise RuntimeError(f"{damaged} has a wrong checksum")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, ValueError, OSError, EOFError) as error:
        raise ConfigError(f"{path}: not a checkpoint, or a broken one") from error
    if not isinstance(content, dict) or not {"config", "classes", "method"} <= content.keys():
        raise ConfigError(f"{path}: not a checkpoint of corrmatch")
    if content.get("version", 1) > VERSION:
        raise ConfigError(f"{path}: written by a later version of corrmatch")
    return content


def config_of(content: dict[str, Any], overrides: list[str] | None = None) -> Config:
    """The configuration of the run that wrote the checkpoint, with overrides."""
    return parse([OmegaConf.create(content["config"]), from_arguments(overrides or [])])


def check_classes(trained: list[str], classes: list[str]) -> None:
    """Raises ConfigError unless the classes are those of the training, in the same order."""
    if trained != classes:
        then, now = (", ".join(names) for names in (trained, classes))
        raise ConfigError(f"data.classes: the checkpoint was trained with {then}, not with {now}")


def check_same(config: Config, content: dict[str, Any], processes: int) -> None:
    """Raises ConfigError where a setting differs from that of the checkpoint."""
    if content.get("version", 1) != VERSION:
        raise ConfigError("the run to be resumed was written by an earlier version of corrmatch; it can only be used")
    now, then = (OmegaConf.create(to_yaml(x)) for x in (config, config_of(content)))
    for key in keys(config):
        was, wanted = OmegaConf.select(then, key), OmegaConf.select(now, key)
        if key not in FREE and was != wanted:
            raise ConfigError(f"{key}: the run to be resumed had {was}, not {wanted}")
    if processes != len(content["random"]):
        raise ConfigError(f"the run to be resumed had {len(content['random'])} processes, not {processes}")
