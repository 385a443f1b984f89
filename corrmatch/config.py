"""What a run is made of: every key of a configuration, its type and default. YAML files and `a.b=c` set them."""

from __future__ import annotations

import difflib
import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key."""


@dataclass
class DataConfig:
    """Where pictures and masks are. Lists are text files in root; a line is an id, or a picture and a mask."""

    root: str = MISSING
    pictures: str = "images/{}.*"  # relative to root, {} is the id; .* is any extension
    masks: str = "masks/{}.png"  # 8-bit class ids
    classes: Any = "classes.txt"  # names in order, or a text file of them, a line each
    labeled: str | None = None  # none: every picture with a mask
    unlabeled: str | None = None  # none: every other picture
    val: str | None = None  # none: every `val_every`-th picture with a mask, held out
    val_every: int = 5
    ids: list[int] | None = None  # what the masks call the classes, in order; none: 0, 1, ...
    ignore: list[int] = field(default_factory=lambda: [255])  # ids in the masks that do not count
    check: bool = True  # read every file before the first step


@dataclass
class ModelConfig:
    """DeepLabV3+."""

    backbone: str = "resnet101"  # of timm
    pretrained: Any = True  # true: from timm's hub; a path: from that file; false: from scratch
    output_stride: int = 8
    atrous_rates: list[int] = field(default_factory=lambda: [12, 24, 36])
    channels: int = 256


@dataclass
class CorrMatchConfig:
    """The method's own."""

    threshold: float = 0.85  # before the first step
    momentum: float = 0.999  # of the threshold
    num_masks: int = 128
    connected: str | None = None  # as in ops.region_masks: "peak", "seed"


@dataclass
class TrainConfig:
    """Optimisation, devices, and how often what happens. Batches are per process."""

    crop: int = 321
    epochs: int = 80  # passes over the unlabelled pictures, or the labelled ones if there are more of them
    batch_size: int = 4  # labelled pictures, and as many unlabelled ones
    accumulate: int = 1  # batches for one step
    lr: float = 0.001
    lr_multi: float = 10.0  # of all but the backbone
    momentum: float = 0.9
    weight_decay: float = 1e-4
    power: float = 0.9  # of the polynomial decay
    ohem: bool = False
    ema: float | None = None  # decay of averaged weights, which are then what is evaluated
    seed: int = 0
    workers: int = 4
    precision: str = "no"  # or bf16
    channels_last: bool = False
    compile: bool = False
    cpu: bool = False  # even where there is a GPU
    log_every: int = 20  # steps
    save_every: int = 500  # steps; after every evaluation besides
    eval_every: int = 1  # epochs


@dataclass
class EvalConfig:
    """How whole pictures are segmented."""

    mode: str = "original"  # or center_crop (of the training crop), sliding
    window: int = 801
    stride: int = 534
    panels: int = 4  # validation pictures shown in TensorBoard


@dataclass
class Config:
    """A run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: str = "corrmatch"  # or supervised
    corrmatch: CorrMatchConfig = field(default_factory=CorrMatchConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    work_dir: str = "runs/corrmatch"


CHOICES = {
    "method": ("supervised", "corrmatch"),
    "corrmatch.connected": (None, "peak", "seed"),
    "model.output_stride": (8, 16),
    "train.precision": ("no", "bf16"),
    "eval.mode": ("original", "center_crop", "sliding"),
}
AT_LEAST = {
    "data.val_every": 2, "model.channels": 1, "corrmatch.num_masks": 1,
    "train.crop": 33, "train.epochs": 1, "train.batch_size": 2, "train.accumulate": 1, "train.workers": 0,
    "train.log_every": 1, "train.save_every": 1, "train.eval_every": 1,
    "train.lr": 0, "train.lr_multi": 0, "train.weight_decay": 0, "train.power": 0,
    "eval.window": 33, "eval.stride": 1, "eval.panels": 0,
}  # fmt: skip
FRACTIONS = ("train.momentum", "train.ema", "corrmatch.threshold", "corrmatch.momentum")


def load_config(source: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, or one of the shipped configurations by name, and sets `a.b=c` over it."""
    path = Path(source)
    if not path.is_file():
        shipped = importlib.resources.files("corrmatch.configs")
        names = sorted(entry.name.removesuffix(".yaml") for entry in shipped.iterdir() if entry.name.endswith(".yaml"))
        if source not in names:
            raise ConfigError(f"{source}: no such file; shipped configurations are {', '.join(names)}")
        text = (shipped / f"{source}.yaml").read_text()
    else:
        text = path.read_text()
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"{override}: expected key=value, such as data.root=FOLDER")
    try:
        file = OmegaConf.create(text)
    except YAMLError as error:
        raise ConfigError(f"{source}: not YAML: {error}") from error
    if not OmegaConf.is_dict(file):
        raise ConfigError(f"{source}: expected keys and values")
    return parse([file, OmegaConf.from_dotlist(list(overrides))])


def parse(parts: Sequence[Any]) -> Config:
    """Merges the parts over the defaults; unknown keys and wrong values raise ConfigError."""
    merged = OmegaConf.structured(Config)
    try:
        for part in parts:
            _refuse_unknown(OmegaConf.to_container(part))
            merged = OmegaConf.merge(merged, part)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{missing[0]}: expected a value; add {missing[0]}=...")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error.msg or error).splitlines()[0]}") from error
    for key, choices in CHOICES.items():
        if OmegaConf.select(merged, key) not in choices:
            expected = ", ".join(map(str, choices))
            raise ConfigError(f"{key}: expected one of {expected}, got {OmegaConf.select(merged, key)}")
    for key, low in AT_LEAST.items():
        value = OmegaConf.select(merged, key)
        if value is not None and not low <= value:
            raise ConfigError(f"{key}: expected at least {low}, got {value}")
    for key in FRACTIONS:
        value = OmegaConf.select(merged, key)
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(f"{key}: expected 0 to 1, got {value}")
    return config  # type: ignore[return-value]


def keys(kind: Any = Config, prefix: str = "") -> list[str]:
    """Every key of a configuration, dotted."""
    found = []
    for entry in fields(kind):
        section = entry.default_factory
        found += keys(section, f"{prefix}{entry.name}.") if is_dataclass(section) else [f"{prefix}{entry.name}"]
    return found


def _refuse_unknown(part: Any) -> None:
    known = keys()
    for path in _leaves(part) if part else ():
        if any(path == name or path.startswith(f"{name}.") for name in known):
            continue
        if any(name.startswith(f"{path}.") for name in known):
            raise ConfigError(f"{path}: expected a section of keys, not a value")
        # What is nearest as it stands, or has the nearest last name: `epochs` is meant to be train.epochs.
        last = {name.rpartition(".")[2]: name for name in known}
        near = difflib.get_close_matches(path.rpartition(".")[2], last, 1, 0.75)
        meant = difflib.get_close_matches(path, known, 1, 0.75) or [last[name] for name in near]
        raise ConfigError(f"{path}: no such key" + (f"; did you mean {meant[0]}?" if meant else ""))


def _leaves(part: Any, prefix: str = "") -> list[str]:
    if not isinstance(part, dict) or not part:
        return [prefix[:-1]]
    return [path for key, value in part.items() for path in _leaves(value, f"{prefix}{key}.")]


def to_yaml(config: Config) -> str:
    """The whole configuration, defaults included."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
