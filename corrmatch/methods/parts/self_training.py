"""What weak-to-strong methods share: who labels, how logits are corrected, and which labels count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from corrmatch.config import Config, ConfigError, key
from corrmatch.methods.base import Method, Progress, Step
from corrmatch.methods.parts.alignment import Alignment
from corrmatch.methods.parts.pseudo_labels import PseudoLabels
from corrmatch.methods.parts.teacher import MODES, Teacher
from corrmatch.methods.parts.threshold import ClassThreshold
from corrmatch.models.factory import NetworkFactory


class SelfTraining(Method):
    """Base of methods that train on pseudo-labels of weak views, made by the trained network or an average of it.

    Attributes:
        teacher: The averaged network that labels; None where the trained network does.
        alignment: What `align` asks for.
        class_thresholds: What `class_share` asks for.
    """

    @dataclass
    class Options:
        """Who labels, how labels are corrected, and which of them count."""

        threshold: float = key(0.95, "confidence from which a pseudo-label counts", low=0, high=1)
        teacher: str | None = key(None, "label with an averaged network in this mode; it is then evaluated",
                                  choices=(None, *MODES))  # fmt: skip
        decay: float = key(0.996, "of the averaged network", low=0, high=1)
        align: float | None = key(None, "align the class frequencies of pseudo-labels with those of labels, to this "
                                  "power: 1 as labelled, 0 all equal", low=0, high=1)  # fmt: skip
        class_share: float | None = key(None, "a threshold for each class instead: the confidence that this share of "
                                        "the pixels labelled with it reach", low=0, high=1)  # fmt: skip

    labels_first = True
    bar: ClassVar[Sequence[str]] = ("reliable",)

    def __init__(self, build: NetworkFactory, config: Config):
        super().__init__(build, config)
        o, part = self.options, self.propagation.config
        self.teacher: Teacher | None = None
        if o.teacher is not None:
            self.teacher = Teacher(self.model, o.decay, ramp=True, mode=o.teacher, buffers="average")
        self.alignment = None if o.align is None else Alignment(build.num_classes, o.align)
        self.class_thresholds: ClassThreshold | None = None
        if o.class_share is not None:
            if part.regions and part.region_threshold is None:
                raise ConfigError(
                    "propagation.region_threshold: expected a value, for pixels have a threshold for each class"
                )
            self.class_thresholds = ClassThreshold(build.num_classes, o.threshold, o.class_share)

    @property
    def threshold(self) -> float | Tensor:
        """The key of that name, or where the thresholds of the classes stand."""
        return self.options.threshold if self.class_thresholds is None else self.class_thresholds.threshold

    def corrected(self, logits: Tensor) -> Tensor:
        """Aligned with the frequencies of the labels, where `align` is set; without gradient."""
        return logits.detach() if self.alignment is None else self.alignment(logits)

    def learn_labels(self, labeled: Mapping[str, Tensor]) -> Step:
        """As in all methods; the labels are counted."""
        if self.alignment is not None:
            self.alignment.see_labels(labeled["label"])
        return super().learn_labels(labeled)

    def label(self, logits: Tensor, ignore: Tensor, truth: Tensor) -> tuple[PseudoLabels, float | Tensor]:
        """Pseudo-labels of weak views, and the threshold that they have to reach.

        The frequencies of classes and the thresholds of classes count this batch; they move at the end of the step.

        Args:
            logits: (B, C, h, w), of the weak views.
            ignore: bool (B, H, W), padding of the views.
            truth: (B', H, W), the labels of the batch.
        """
        pseudo = PseudoLabels.of(self.corrected(logits), ignore)
        self.count(logits, pseudo, truth)
        return pseudo, self.threshold

    def count(self, logits: Tensor, pseudo: PseudoLabels, truth: Tensor) -> None:
        """Counts a batch for the frequencies and the thresholds of the classes."""
        if self.alignment is not None:
            self.alignment.see_labels(truth)
            self.alignment.see(logits, pseudo.ignore)
        if self.class_thresholds is not None:
            self.class_thresholds.see(pseudo)

    def after_step(self, progress: Progress) -> None:
        """Frequencies and thresholds of the classes move, and the averaged network follows."""
        for part in (self.alignment, self.class_thresholds):
            if part is not None:
                part.finish_step()
        if self.teacher is not None:
            self.teacher.follow(self.model, progress.step)

    @property
    def evaluated(self) -> dict[str, nn.Module]:
        """The averaged network before the trained one."""
        if self.teacher is None:
            return {"model": self.model}
        return {"teacher": self.teacher.network, "student": self.model}
