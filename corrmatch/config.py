"""The keys of a configuration, with types, defaults and ranges. YAML files and `a.b=c` set them.

The keys of a method are declared in its own file. Their section has the name of the method.
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from typing import Any, ClassVar, Protocol, cast, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from corrmatch.config_checks import ConfigError as ConfigError
from corrmatch.config_checks import check_values, refuse_numbers_for_text, refuse_unknown
from corrmatch.paths import expand, read_text


def key(
    default: Any, about: str, *, low: float | None = None, high: float | None = None, choices: Sequence[Any] = ()
) -> Any:
    """A key of a configuration: its default, a sentence about it, and its valid values. None is always valid."""
    limits = {"about": about, "low": low, "high": high, "choices": tuple(choices)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=limits)
    return field(default=default, metadata=limits)


@dataclass
class DataConfig:
    """Files of images and masks. Lists are text files in root; a line is an id, or an image and a mask."""

    root: str = key(MISSING, "the folder that all other paths start from")
    images: str = key("images/{}.*", "pattern of the images; {} is the id, .* any extension")
    masks: str = key("masks/{}.png", "pattern of the masks, 8-bit class ids")
    classes: Any = key("classes.txt", "names in order, or a text file of them, a line each")
    labeled: str | None = key(None, "list of the labelled images; null: every image with a mask")
    unlabeled: str | None = key(None, "list of the unlabelled images; null: every other image")
    val: str | None = key(None, "list of the validation images; null: every `val_every`-th image with a mask")
    val_every: int = key(5, "see val", low=2)
    ids: list[int] | None = key(None, "what the masks call the classes, in order; null: 0, 1, ...", low=0, high=255)
    ignore: list[int] = key([255], "ids in the masks that do not count", low=0, high=255)
    check: bool = key(True, "read every file, and count the pixels of each class, before the first step")
    allow_absent: bool = key(False, "train although a class has no labelled pixel")


@dataclass
class ModelConfig:
    """A backbone and a decoder."""

    backbone: str = key("resnet101", "of timm")
    decoder: str = key("deeplabv3plus", "over it; dpt takes plain vision transformers",
                       choices=("deeplabv3plus", "dpt"))  # fmt: skip
    pretrained: Any = key(True, "true: from timm's hub; a path: from that file; false: from scratch")
    init: str | None = key(None, "a checkpoint of another run, whose evaluated network all networks start from")
    frozen: bool = key(False, "leave the backbone as it is: no gradient, evaluation mode")
    checkpointing: bool = key(False, "compute a transformer's blocks again in the backward: less memory, more time")
    output_stride: int = key(8, "of a convolutional backbone", choices=(8, 16))
    atrous_rates: list[int] = key([12, 24, 36], "of the convolutions of deeplabv3plus's pyramid", low=1)
    channels: int | None = key(None, "width of the decoder; null: as published, 256 in deeplabv3plus", low=1)
    multi_grid: list[int] = key([], "factors of the dilation in the blocks of the backbone's last stage", low=1)
    dropout: list[float] = key([0.0, 0.0, 0.0], "behind deeplabv3plus's pyramid and its decoder's two convolutions",
                               low=0, high=1)  # fmt: skip
    correlation_channels: int | None = key(None, "of query and key; null: the number of classes, as published", low=1)


@dataclass
class PropagationConfig:
    """Correlation propagation, an option of every method. null stands for the form in which a method was published."""

    head: bool | None = key(None, "train a correlation head, and supervise the logits that it propagates")
    regions: bool | None = key(None, "send pseudo-labels through region propagation before they are used")
    weight: float = key(1.0, "of the terms of propagated logits, where a method does not publish one", low=0)
    num_masks: int = key(128, "region masks an image", low=1)
    connected: str | None = key(None, "as in ops.region_masks", choices=(None, "peak", "seed"))
    mask_threshold: float = key(0.5, "of the region masks", low=0, high=1)
    region_threshold: float | None = key(None, "of a region's reliable and dominant shares; null: that of pixels",
                                         low=0, high=1)  # fmt: skip
    label_temperature: float | None = key(None, "propagate pseudo-labels along the correlation of the decoder's "
                                          "features, at this temperature; null: do not", low=0.001)  # fmt: skip
    rule: str = key("rewrite", "a region gives its label to all its pixels, or confirms those that have it already",
                    choices=("rewrite", "confirm"))  # fmt: skip
    regions_from: int = key(0, "the step from which regions are used", low=0)
    corr_from: int = key(0, "the step from which pseudo-labels supervise propagated logits", low=0)


@dataclass
class TrainConfig:
    """Optimisation, devices and intervals. Batch sizes are per process."""

    crop: int = key(321, "side of the training views, pixels", low=33)
    epochs: int = key(80, "passes, as `epoch` counts them", low=1)
    epoch: str = key("longest", "the images that an epoch passes over", choices=("longest", "labeled", "unlabeled"))
    epoch_steps: int | None = key(None, "so many steps are an epoch, whatever the images", low=1)
    batch_size: int = key(4, "labelled images", low=2)
    unlabeled_batch_size: int | None = key(None, "unlabelled images; null: as many as labelled ones", low=2)
    accumulate: int = key(1, "batches for one step of the optimiser", low=1)
    optimizer: str = key("sgd", "the optimiser", choices=("sgd", "adam", "adamw"))
    lr: float = key(0.001, "learning rate of the backbone", low=0)
    lr_multi: float = key(10.0, "times lr is the rate of all but the backbone", low=0)
    momentum: float = key(0.9, "of sgd", low=0, high=1)
    nesterov: bool = key(False, "Nesterov's form of sgd")
    weight_decay: float = key(1e-4, "of the weights", low=0)
    decay_norms: bool = key(True, "decay norm layers and biases too")
    schedule: str = key("poly", "of the rates", choices=("poly", "constant"))
    power: float = key(0.9, "of the polynomial decay", low=0)
    warmup: int = key(0, "steps in which the rates rise linearly from 0", low=0)
    labels_first: int = key(0, "steps on labelled images alone, before the method begins", low=0)
    ohem: bool = key(False, "hard pixels only in the supervised terms")
    ohem_pixels: int = key(100_000, "of a batch that hard pixels are at least", low=1)
    logit_adjustment: float = key(0.0, "tau: the supervised terms see logits + tau log(frequency of the class)", low=0)
    ema: float | None = key(None, "decay of averaged weights, which are then what is evaluated", low=0, high=1)
    seed: int = key(0, "of everything random", low=0, high=2**31 - 1)
    workers: int = key(4, "processes that read images", low=0)
    precision: str = key("no", "of the network's arithmetic", choices=("no", "bf16"))
    channels_last: bool = key(False, "memory format of the network")
    compile: bool = key(False, "torch.compile the network")
    cpu: bool = key(False, "even where there is a GPU")
    log_every: int = key(20, "steps", low=1)
    save_every: int = key(500, "steps; also after every evaluation", low=1)
    eval_every: int = key(1, "epochs", low=1)


@dataclass
class EvalConfig:
    """Segmentation of whole images."""

    mode: str = key("original", "of segmenting; center_crop is of the size `train.crop`",
                    choices=("original", "center_crop", "sliding"))  # fmt: skip
    window: int = key(801, "side of a sliding window, pixels", low=33)
    stride: int = key(534, "of the sliding window, pixels", low=1)
    panels: int = key(4, "validation images shown in TensorBoard and on the page of `corrmatch compare`", low=0)
    pseudo_labels: bool = key(False, "measure pseudo-labels against masks of unlabelled images, where there are some")


@dataclass
class Config:
    """The configuration of a run. `parse` adds a section for each method, with the name of the method."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: str = key("corrmatch", "the training method")
    propagation: PropagationConfig = field(default_factory=PropagationConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    work_dir: str = key("runs/corrmatch", "gets checkpoints and logs")

    @property
    def options(self) -> Any:
        """The section of the method that is used."""
        return getattr(self, self.method)


RENAMED = {"data.pictures": "data.images"}  # keys of version 0.1 that belong to no method


class HasOptions(Protocol):
    """The parts of a method that configurations depend on."""

    Options: ClassVar[type]  # a dataclass of `key`s
    renamed: ClassVar[Mapping[str, str]]  # names of keys in earlier versions, and their present names


Methods = Mapping[str, type[HasOptions]]


def load_config(source: str, overrides: Sequence[str] = (), methods: Methods | None = None) -> Config:
    """Reads a YAML file, or a shipped configuration by name, and applies overrides `a.b=c`.

    A file that names a `base` has only the differences from it.
    """
    return parse([*_read(source, ()), from_arguments(overrides, methods)], methods)


def _read(source: str, above: tuple[str, ...]) -> list[Any]:
    """The content of a file, after the content of its `base`: a file in the same folder, or a shipped configuration."""
    if source in above:
        raise ConfigError(f"base: {' -> '.join((*above, source))} never ends")
    path = expand(source)
    try:
        text = read_text(path) if path.is_file() else _shipped(source)
        file = OmegaConf.create(text)
    except YAMLError as error:
        raise ConfigError(f"{source}: not YAML: {error}") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not isinstance(file, DictConfig):
        raise ConfigError(f"{source}: expected keys and values")
    base = file.pop("base", None)
    if base is None:
        return [file]
    beside = path.parent / str(base)
    return [*_read(str(beside) if beside.is_file() else str(base), (*above, source)), file]


def _shipped(source: str) -> str:
    shipped = importlib.resources.files("corrmatch.configs")
    names = sorted(entry.name.removesuffix(".yaml") for entry in shipped.iterdir() if entry.name.endswith(".yaml"))
    if source not in names:
        raise ConfigError(f"{source}: no such file; shipped configurations are {', '.join(names)}")
    return (shipped / f"{source}.yaml").read_text()


def from_arguments(arguments: Sequence[str], methods: Methods | None = None) -> dict[str, Any]:
    """Overrides `a.b=c` as keys and values. Values of keys of text are taken as typed; all others are YAML."""
    schema = _schema(_shipped_methods() if methods is None else methods)
    part: dict[str, Any] = {}
    for argument in arguments:
        path, found, text = argument.partition("=")
        if not found:
            raise ConfigError(f"{argument}: expected key=value, such as data.root=FOLDER")
        *sections, last = path.split(".")
        section = part
        for name in sections:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{path}: {name} has a value already")
        section[last] = _value(text, _kind(schema, path))
    return part


def _value(text: str, kind: Any) -> Any:
    if kind is str or (kind == str | None and text != "null"):
        return text
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[call-overload,index]
    except YAMLError:
        return text
    return text if kind is Any and isinstance(value, int | float) and not isinstance(value, bool) else value


def _kind(schema: Any, path: str) -> Any:
    """The annotated type of a key; None if the key does not exist."""
    for name in path.split("."):
        schema = get_type_hints(schema).get(name) if is_dataclass(schema) else None
    return schema


def parse(parts: Sequence[Any], methods: Methods | None = None) -> Config:
    """Merges the parts over the defaults. Unknown keys and wrong values raise ConfigError."""
    methods = _shipped_methods() if methods is None else methods
    schema = _schema(methods)
    merged = OmegaConf.structured(schema)
    known = keys(schema)
    try:
        for part in parts:
            plain = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(part)))
            content: Any = _with_new_names(plain, methods)
            refuse_unknown(content, known)
            refuse_numbers_for_text(content, schema)
            merged = OmegaConf.merge(merged, content)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{missing[0]}: expected a value; add {missing[0]}=...")
        config = cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error.msg or error).splitlines()[0]}") from error
    check_values(config)
    if config.eval.mode == "sliding" and config.eval.stride > config.eval.window:
        raise ConfigError(
            f"eval.stride: expected at most eval.window ({config.eval.window}), or windows leave gaps, "
            f"got {config.eval.stride}"
        )
    if config.method not in methods:
        raise ConfigError(f"method: expected one of {', '.join(methods)}, got {config.method}")
    return config


def keys(kind: Any, prefix: str = "") -> list[str]:
    """All keys of a configuration (a class or an instance), dotted."""
    found = []
    for entry in fields(kind):
        section = entry.default_factory
        found += keys(section, f"{prefix}{entry.name}.") if is_dataclass(section) else [f"{prefix}{entry.name}"]
    return found


def to_yaml(config: Config) -> str:
    """The configuration with all defaults, and with the section of the method that is used."""
    own = [entry.name for entry in fields(Config)] + [config.method]
    return OmegaConf.to_yaml(OmegaConf.masked_copy(OmegaConf.structured(config), own))


def _shipped_methods() -> Methods:
    from corrmatch.methods import METHODS  # imported here, because these modules import this file

    return METHODS


def _schema(methods: Methods) -> type[Config]:
    """`Config` with a section for every method, so that one file serves many methods."""
    return _with_sections(tuple((name, kind.Options) for name, kind in methods.items()))


@functools.cache
def _with_sections(sections: tuple[tuple[str, type], ...]) -> type[Config]:
    added = [(name, options, field(default_factory=options)) for name, options in sections]
    return make_dataclass("Config", added, bases=(Config,))


def _with_new_names(part: dict[str, Any], methods: Methods) -> dict[str, Any]:
    renamed = RENAMED | {old: new for kind in methods.values() for old, new in kind.renamed.items()}
    for old, new in renamed.items():
        (section, name), (new_section, new_name) = old.split("."), new.split(".")
        if isinstance(part.get(section), dict) and name in part[section]:
            rest = dict(part[section])
            value = rest.pop(name)
            part = {k: v for k, v in part.items() if k != section} | ({section: rest} if rest else {})
            part[new_section] = {new_name: value} | part.get(new_section, {})
    return part
