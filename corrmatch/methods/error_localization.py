r"""Error localization network (ELN, CVPR 2022, arXiv 2204.02078): a second network predicts where labels are right.

.. math::
    L = L_x + L_{aux} + L_b + \sum_{u, \tilde u} L_p + L_c, \qquad
    L_p = \frac{\sum v\,\mathrm{CE}(f, \hat y)}{\sum v}, \quad v = [b(u, z') > 0]

There are three stages. First the network learns labelled images. Then b is added, and auxiliary decoders that are
kept worse on purpose, so that b sees errors. Then unlabelled images are added. Their labels are those of an averaged
teacher. They count where b calls them right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.dropout import _DropoutNd

from corrmatch.config import Config, key
from corrmatch.data.datasets import IGNORE
from corrmatch.data.streams import LABELED, UNLABELED, Stream
from corrmatch.data.views import Colour, View
from corrmatch.methods.base import Batch, Method, Progress, Run, Step
from corrmatch.methods.parts import losses
from corrmatch.methods.parts.pseudo_labels import PseudoLabels, nearest
from corrmatch.methods.parts.teacher import Teacher
from corrmatch.models.factory import NetworkFactory
from corrmatch.models.network import Network, Prediction, enlarge, evaluating, without_dropout

JITTERED = View(strong=1, colour=Colour((0.4, 0.4, 0.4, 0.1), chance=1, gray=0.2, blur=0))
DROPOUT = [0.5, 0.5, 0.1]  # of the error network
WINDOWS, SIDE, TEMPERATURE, TINY = 8, 32, 0.5, 1e-8
ROWS = 1024  # pixels that are compared with all others at a time
REGION = 0.85  # share of a region that has to be called right, and of these of one class, unless the keys say another


class ErrorLocalization(Method):
    """ELN. The student is evaluated; in the third stage its teacher is scored, too."""

    @dataclass
    class Options:
        """Stages, the error network, the teacher."""

        pretraining: int = key(70, "epochs on labelled images alone, before those of train.epochs", low=1)
        localization: int = key(50, "epochs after these, which also train the error network", low=1)
        levels: list[float] = key([20.0, 50.0], "of each auxiliary decoder: it learns while it is so much worse", low=1)
        network: str = key("resnet34", "backbone of the error network, of timm")
        network_pretrained: str | None = key(None, "file with its weights; null: as model.pretrained, from timm's hub")
        void: bool = key(True, "pixels without a label count as errors, as in the published code")
        decay: float = key(0.995, "of the teacher", low=0, high=1)
        overwrite: bool = key(True, "with each epoch of the third stage the student starts as its teacher")
        dimensions: int = key(128, "of the embeddings that are compared", low=1)

    score_all = True
    bar = ("valid",)
    carries_on = True

    def __init__(self, build: NetworkFactory, config: Config):
        super().__init__(build, config)
        self.classes, width = build.num_classes, self.model.classifier.in_channels
        self.projection = nn.Sequential(
            nn.Conv2d(width, width, 1), nn.ReLU(inplace=True), nn.Conv2d(width, self.options.dimensions, 1)
        )
        self.decoders: Any = nn.ModuleList(build.decoder() for _ in self.options.levels)
        self.localizer = self._error_network(build)
        self.teacher, self.teacher_projection = (
            Teacher(module, self.options.decay, mode="train", buffers="own") for module in (self.model, self.projection)
        )
        for module in self.teacher.modules():
            if isinstance(module, _DropoutNd):
                module.p = 0.0

    def _error_network(self, build: NetworkFactory) -> Network:
        """A network from image, entropy and logits to one logit for each pixel."""
        weights = self.options.network_pretrained
        model = dataclasses.replace(
            build.model, backbone=self.options.network, decoder="deeplabv3plus", output_stride=16, multi_grid=[],
            dropout=DROPOUT, frozen=False, checkpointing=False,
            pretrained=bool(build.model.pretrained) if weights is None else weights,
        )  # fmt: skip
        channels = 4 + self.classes
        return dataclasses.replace(
            build, model=model, num_classes=1, in_channels=channels, correlation=False, init=None
        )()

    def streams(self) -> Mapping[str, Stream]:
        """Labelled images; in the third stage also unlabelled ones, unchanged and in other colours."""
        unlabeled = {"unlabeled": replace(UNLABELED, view=JITTERED)} if self.phase == 2 else {}
        return {"labeled": LABELED} | unlabeled

    def phases(self, epochs: int) -> Sequence[int]:
        """The three stages."""
        return (self.options.pretraining, self.options.localization, epochs)

    def trains(self, phase: int) -> list[nn.Parameter]:
        """The student; then the error network and the auxiliary decoders; then also the embeddings."""
        stages = (self.model, nn.ModuleList([self.decoders, self.localizer]), self.projection)
        due = {id(p) for module in stages[: phase + 1] for p in module.parameters()}
        return [p for p in super().trains(phase) if id(p) in due]

    def begin(self, phase: int, run: Run) -> None:
        """The teacher starts with the third stage."""
        if phase == 2:
            self.teacher.copy_from(self.model)
            self.teacher_projection.copy_from(self.projection)

    def before_step(self, progress: Progress) -> None:
        """Copies the teacher into the student, with batch-norm statistics, at the start of an epoch."""
        if self.phase == 2 and self.options.overwrite and progress.step % progress.epoch_steps == 0:
            self.model.load_state_dict(self.teacher.network.state_dict())
            self.projection.load_state_dict(self.teacher_projection.network.state_dict())

    def after_step(self, progress: Progress) -> None:
        """Updates the teacher."""
        if self.phase == 2:
            self.teacher.follow(self.model, progress.step)
            self.teacher_projection.follow(self.projection, progress.step)

    @property
    def evaluated(self) -> dict[str, nn.Module]:
        """The student, then in the third stage the teacher."""
        return {"student": self.model} | ({"teacher": self.teacher.network} if self.phase == 2 else {})

    @property
    def labeller(self) -> nn.Module:
        """The teacher; before the third stage the student."""
        return self.teacher.network if self.phase == 2 else self.model

    def panels(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """The prediction and, from the second stage on, the pixels that the error network finds right."""
        logits = model(images).logits
        shown = {"prediction": enlarge(logits, images.shape[2:]).argmax(1)}
        if self.phase > 0:
            with evaluating(self.localizer):
                right = enlarge(self.localizer(question(images, logits)).logits, images.shape[2:]) > 0
            shown["called right"] = right[:, 0]
        return shown

    def forward(self, batch: Batch, progress: Progress) -> Step:
        """The terms of the stage, and those of the propagated logits if there is a correlation head."""
        images, truth = batch["labeled"]["image"], batch["labeled"]["label"]
        features = self.model.features(images)
        known = self.decoded(features)
        scalars = {"x": self.supervised(known.logits, truth)}
        if self.propagation.head:
            scalars["x_corr"] = self.propagation.weight * self.supervised(self.propagation.logits(known), truth)
        if self.phase > 0:
            scalars |= self.localize(images, truth, [x.detach() for x in features], scalars["x"])
        shown: dict[str, Tensor] = {}
        if self.phase == 2:
            terms, shown = self.unlabeled(batch["unlabeled"], progress)
            scalars |= terms
        return Step.of(torch.stack(list(scalars.values())).sum(), scalars | shown)

    def decoded(self, found: Sequence[Tensor]) -> Prediction:
        """The logits of the student for features of its backbone."""
        features, head = self.model.decode[:-1](self.model.fused(*found)), self.model.correlation
        query, key = (None, None) if head is None else head.query_key(found[-1])
        return Prediction(self.model.classifier(features), query=query, key=key, features=features)

    def localize(self, images: Tensor, truth: Tensor, features: Sequence[Tensor], main: Tensor) -> dict[str, Tensor]:
        """The terms of the auxiliary decoders and of the error network. Neither has a gradient for the features."""
        own = [self.supervised(decoder.segment(*features), truth) for decoder in self.decoders]
        with torch.no_grad():  # anew, with other features dropped
            said = [decoder.segment(*features) for decoder in (*self.decoders, self.model)]
        found = []
        for logits in said:
            asked = question(images, logits)
            right = asked[:, -self.classes :].argmax(1) == truth
            counted = torch.ones_like(right) if self.options.void else truth != IGNORE
            found.append(localization(self.localizer(asked).logits, right, counted))
        return {"aux": kept_bad(own, main, self.options.levels), "errors": torch.stack(found).sum()}

    def unlabeled(
        self, unlabeled: Mapping[str, Tensor], progress: Progress
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The terms of both views, and further scalars."""
        part, weak, strong = self.propagation, unlabeled["weak"], unlabeled["strong"][:, 0]
        views = [self.decoded(self.model.features(images)) for images in (weak, strong)]
        taught = self.teacher(weak, features=True, correlate=part.regions)
        anchors = self.teacher_projection(taught.features)
        with torch.no_grad(), without_dropout(self.localizer):
            right = self.localizer(question(weak, taught.logits)).logits
            if right.shape[2:] != taught.logits.shape[2:]:  # of a network of another stride
                right = enlarge(right, taught.logits.shape[2:])
        labels, valid = self.targets(taught, right, unlabeled["ignore"], progress)
        scalars = {
            "u": losses.summed(losses.pseudo_supervised(view.logits, labels, valid, valid) for view in views),
            "contrast": losses.summed(
                self.contrast(anchors, view, labels, valid, progress.generator) for view in views
            ),
        }
        if part.head:
            corr = losses.summed(losses.pseudo_supervised(part.logits(view), labels, valid, valid) for view in views)
            scalars["u_corr"] = part.weight * part.from_start(corr, progress)
        return scalars, {"valid": valid.float().mean()}

    def targets(self, taught: Prediction, right: Tensor, ignore: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
        """The teacher's labels (B, h, w) at stride 4, and where the error network or a region confirms them."""
        size = (taught.logits.shape[2], taught.logits.shape[3])
        small = nearest(ignore, size)
        called = (right[:, 0] > 0) & ~small
        pseudo = PseudoLabels(taught.logits.argmax(1), called.float(), small)
        masks = self.propagation.masks(taught, size, progress)
        return self.propagation.targets(pseudo, REGION, masks, ~small, self.classes)

    def contrast(
        self, anchors: Tensor, view: Prediction, labels: Tensor, valid: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The contrast within windows at random places."""
        height, width = (min(SIDE, side) for side in labels.shape[1:])
        ends = (labels.shape[1] - height, labels.shape[2] - width)
        offsets = torch.stack(
            [torch.randint(end + 1, (WINDOWS,), generator=generator, device=labels.device) for end in ends], 1
        )
        target = self.projection(view.features)
        return windowed_contrast(anchors, target, labels, valid, self.classes, offsets, (height, width))


def question(images: Tensor, logits: Tensor) -> Tensor:
    """The input of the error network: image, entropy and logits (B, 3 + 1 + C, H, W), without gradient."""
    z = enlarge(logits.detach(), images.shape[2:])
    entropy = torch.special.entr(z.softmax(1)).sum(1, keepdim=True)
    return torch.cat([images.float(), entropy, z], 1)


def localization(logits: Tensor, right: Tensor, counted: Tensor) -> Tensor:
    """Binary cross-entropy of logits (B, 1, h, w) with where a prediction is right (B, H, W); mean of what counts.

    All errors together have the weight of all right pixels.
    """
    hits, errors = (right & counted).sum(), (~right & counted).sum().clamp(min=1)
    weight = torch.where(right, 1.0, hits / errors) * counted / counted.sum().clamp(min=1)
    said = enlarge(logits, right.shape[1:])[:, 0]
    return F.binary_cross_entropy_with_logits(said, right.to(said.dtype), weight, reduction="sum")


def kept_bad(own: Sequence[Tensor], main: Tensor, levels: Sequence[float]) -> Tensor:
    """Losses of the auxiliary decoders, 0 for those below the given multiple of the main loss."""
    learns = [loss.detach() >= level * main.detach() for loss, level in zip(own, levels, strict=True)]
    return losses.summed(loss * learning for loss, learning in zip(own, learns, strict=True))


def windowed_contrast(
    anchors: Tensor, target: Tensor, labels: Tensor, valid: Tensor, classes: int, offsets: Tensor, size: tuple[int, int]
) -> Tensor:
    """The mean of `contrast` over windows of that size.

    Args:
        anchors: (B, D, h, w), without gradient.
        target: (B, D, h, w).
        labels: (B, h, w).
        valid: Bool (B, h, w), which labels count.
        classes: C.
        offsets: (n, 2), top and left of the windows, the same in all images.
        size: Of a window.
    """
    with torch.autocast(target.device.type, enabled=False):
        rows, columns = (
            offsets[:, axis, None] + torch.arange(side, device=offsets.device) for axis, side in enumerate(size)
        )
        own = F.one_hot(torch.where(valid, labels, classes), classes + 1)[..., :classes].movedim(-1, 1)
        maps = [own.float(), *(F.normalize(x.float(), dim=1, eps=TINY) for x in (anchors, target))]
        found = []
        for down, right in zip(rows, columns, strict=True):
            y, a, b = (x[:, :, down[:, None], right].movedim(1, -1).flatten(0, 2) for x in maps)
            found.append(contrast(a, b, y))
        return torch.stack(found).mean()


def contrast(anchors: Tensor, target: Tensor, own: Tensor) -> Tensor:
    r"""Pixels of a class are to be nearer to one another than to those of other classes.

    .. math:: \frac{1}{|C|} \sum_c \frac{1}{|S_c|} \Bigl(-\log \frac{P_c}{P_c + Q_c}\Bigr), \qquad
        P_c = \sum_{i, j \in S_c} e^{g'_i \cdot g_j / \tau}, \quad Q_c = \sum_{i \in S_c, j \in R_c} e^{g'_i \cdot g_j / \tau}

    R_c are the pixels of other classes.

    Args:
        anchors: g' (P, D), unit length, without gradient.
        target: g (P, D), unit length.
        own: (P, C), 1 at the class of a pixel; 0 in all of them where it does not count.
    """  # noqa: E501
    pairs = ClassPairs.apply(anchors, target, own)
    others = pairs.masked_fill(torch.eye(len(pairs), dtype=torch.bool, device=pairs.device), 0).sum(1)
    near, far = (x.clamp(min=TINY) for x in (pairs.diagonal(), others))
    pixels = own.sum(0)
    terms = torch.where(pixels > 0, (far / near).log1p() / pixels.clamp(min=1), 0)
    return terms.sum() / (pixels > 0).sum().clamp(min=1)


class ClassPairs(torch.autograd.Function):
    """(C, C): sums of exp(g' g / tau) over pairs of pixels, by the classes of both; arguments as of `contrast`.

    Similarities are made a block of rows at a time, and again in the backward, in one buffer: blocks of their own leave
    holes in the memory of a process that add up to all of them. Gradients flow to the target alone.
    """

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, target: Tensor, own: Tensor) -> Tensor:
        """The sums (C, C). The backward recomputes what it needs."""
        ctx.save_for_backward(anchors, target, own)
        pairs = own.new_zeros(own.shape[1], own.shape[1])
        for rows, near in _blocks(anchors, target):
            pairs += own[rows].mT @ (near @ own)
        return pairs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        """The gradient of the target."""
        anchors, target, own = ctx.saved_tensors
        found, weight = torch.zeros_like(target), anchors.new_empty(min(ROWS, len(anchors)), len(target))
        for rows, near in _blocks(anchors, target):
            near *= torch.mm(own[rows] @ grads[0], own.mT, out=weight[: len(near)])
            found += near.mT @ anchors[rows]
        return None, found / TEMPERATURE, None


def _blocks(anchors: Tensor, target: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows, and exp of their similarities with the target, valid until the next block."""
    buffer = anchors.new_empty(min(ROWS, len(anchors)), len(target))
    for start in range(0, len(anchors), ROWS):
        rows = slice(start, min(start + ROWS, len(anchors)))
        near = torch.mm(anchors[rows], target.mT, out=buffer[: rows.stop - start])
        yield rows, near.div_(TEMPERATURE).exp_()
