"""Training methods, one file each. The training loop (`corrmatch.training.trainer`) does not depend on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from corrmatch.config import Config, ConfigError
from corrmatch.methods.base import Method
from corrmatch.methods.color_augmentation import ColorAugmentation
from corrmatch.methods.corrmatch import CorrMatch
from corrmatch.methods.cross_teacher import CrossTeacher
from corrmatch.methods.dual_teacher import DualTeacher
from corrmatch.methods.error_localization import ErrorLocalization
from corrmatch.methods.fixmatch import FixMatch
from corrmatch.methods.forgetting import Forgetting
from corrmatch.methods.fuzzy_positive import FuzzyPositive
from corrmatch.methods.mutual_distillation import MutualDistillation
from corrmatch.methods.parts.propagation import resolve
from corrmatch.methods.parts.teacher import Teacher
from corrmatch.methods.prcl import PRCL
from corrmatch.methods.self_training import SelfTraining
from corrmatch.methods.subclass import Subclass
from corrmatch.methods.supervised import Supervised
from corrmatch.methods.unimatch import UniMatch
from corrmatch.methods.unimatch_v2 import UniMatchV2
from corrmatch.models.factory import NetworkFactory

METHODS: dict[str, type[Method]] = {
    "supervised": Supervised,
    "corrmatch": CorrMatch,
    "self_training": SelfTraining,
    "fixmatch": FixMatch,
    "unimatch": UniMatch,
    "unimatch_v2": UniMatchV2,
    "color_augmentation": ColorAugmentation,
    "fuzzy_positive": FuzzyPositive,
    "dual_teacher": DualTeacher,
    "mutual_distillation": MutualDistillation,
    "prcl": PRCL,
    "cross_teacher": CrossTeacher,
    "subclass": Subclass,
    "error_localization": ErrorLocalization,
    "forgetting": Forgetting,
}


def build_method(
    config: Config, num_classes: int, *, pretrained: bool = True, init: Mapping[str, Tensor] | None = None
) -> Method:
    """The method that a configuration names, with its networks.

    Without `pretrained` they start at random, for weights from a checkpoint; with `init` from these weights.
    """
    kind = METHODS[config.method]
    propagation = resolve(config.propagation, kind.correlation, kind.pseudo_labels)
    if config.propagation.label_temperature is not None and not kind.spreads_labels:
        raise ConfigError(f"propagation.label_temperature: method {config.method} does not support it; leave it null")
    if config.train.labels_first and not kind.labels_first:
        raise ConfigError(f"train.labels_first: method {config.method} has no such steps; see model.init")
    build = NetworkFactory(config.model, num_classes, bool(propagation.head), pretrained, init)
    method = kind(build, dataclasses.replace(config, propagation=propagation))
    if config.train.ema is not None:
        method.average = Teacher(next(iter(method.evaluated.values())), config.train.ema)
    return method
