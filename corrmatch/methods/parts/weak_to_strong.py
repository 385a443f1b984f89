"""The common part of weak-to-strong methods: teacher and thresholds of pseudo-labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from corrmatch.config import Config, key
from corrmatch.methods.base import Method, Progress
from corrmatch.methods.parts.pseudo_labels import PseudoLabels
from corrmatch.methods.parts.teacher import MODES, Teacher
from corrmatch.methods.parts.threshold import ClassThreshold
from corrmatch.models.factory import NetworkFactory
from corrmatch.models.network import Prediction


class WeakToStrong(Method):
    """Base of methods that train on pseudo-labels of weak views, from the trained network or its moving average.

    Attributes:
        teacher: The moving average that makes pseudo-labels; None if the trained network makes them.
        class_thresholds: One threshold for each class; None without the key `class_share`.
    """

    @dataclass
    class Options:
        """Teacher and thresholds of pseudo-labels."""

        threshold: float = key(0.95, "confidence from which a pseudo-label counts", low=0, high=1)
        teacher: str | None = key(None, "label with an averaged network in this mode; it is then evaluated",
                                  choices=(None, *MODES))  # fmt: skip
        decay: float = key(0.996, "of the averaged network", low=0, high=1)
        class_share: float | None = key(None, "a threshold for each class instead: the confidence that this share of "
                                        "the pixels labelled with it reach", low=0, high=1)  # fmt: skip

    labels_first = True
    spreads_labels = True
    bar: ClassVar[Sequence[str]] = ("reliable",)

    def __init__(self, build: NetworkFactory, config: Config):
        super().__init__(build, config)
        o = self.options
        self.teacher: Teacher | None = None
        if o.teacher is not None:
            self.teacher = Teacher(self.model, o.decay, ramp=True, mode=o.teacher, buffers="average")
        self.class_thresholds: ClassThreshold | None = None
        if o.class_share is not None:
            self.class_thresholds = ClassThreshold(build.num_classes, o.threshold, o.class_share)
            self.propagation.check(self.class_thresholds.threshold)

    @property
    def threshold(self) -> float | Tensor:
        """The key of this name, or the current thresholds of the classes (C,)."""
        return self.options.threshold if self.class_thresholds is None else self.class_thresholds.threshold

    def label(self, out: Prediction, ignore: Tensor) -> tuple[PseudoLabels, float | Tensor]:
        """Pseudo-labels of weak views, and their threshold.

        The batch counts for the thresholds of the classes, which are updated at the end of the step.

        Args:
            out: The prediction on the weak views.
            ignore: bool (B, H, W), padding of the views.
        """
        pseudo = PseudoLabels.of(self.propagation.spread(out), ignore)
        if self.class_thresholds is not None:
            self.class_thresholds.see(pseudo)
        return pseudo, self.threshold

    def after_step(self, progress: Progress) -> None:
        """Updates the thresholds of the classes, and the teacher."""
        if self.class_thresholds is not None:
            self.class_thresholds.finish_step()
        if self.teacher is not None:
            self.teacher.follow(self.model, progress.step)

    @property
    def evaluated(self) -> dict[str, nn.Module]:
        """The teacher, if there is one, before the trained network."""
        if self.teacher is None:
            return {"model": self.model}
        return {"teacher": self.teacher.network, "student": self.model}
