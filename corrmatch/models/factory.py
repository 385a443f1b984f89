"""Networks as a configuration describes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from corrmatch.config import ConfigError, ModelConfig
from corrmatch.models.deeplab import DeepLabV3Plus
from corrmatch.models.dpt import DPT
from corrmatch.models.network import Network
from corrmatch.paths import expand


@dataclass(frozen=True)
class NetworkFactory:
    """Makes networks. Each call draws new random weights for all that a file or a hub does not contain.

    Attributes:
        model: The keys of the networks.
        num_classes: Channels of their logits.
        correlation: Whether they have a correlation head.
        pretrained: False leaves `model.pretrained` aside: the weights come from a checkpoint.
        in_channels: Of the images.
        init: Weights that every network starts from; a correlation head that they lack starts at random.
    """

    model: ModelConfig
    num_classes: int
    correlation: bool = False
    pretrained: bool = True
    init: Mapping[str, Tensor] | None = None
    in_channels: int = 3

    def __call__(self, *, drop_path: float = 0.0) -> Network:
        """A network in training mode, with stochastic depth where it is asked for."""
        try:
            network = self._build(drop_path)
        except ValueError as error:  # it names one of these keys
            raise ConfigError(f"model.{error}") from error
        if self.init is not None:
            self._start_from(network, self.init)
        if self.model.frozen:
            network.frozen = True
            network.backbone.requires_grad_(False)
        return network.train()

    def _build(self, drop_path: float) -> Network:
        model = self.model
        given: dict[str, Any] = {} if model.channels is None else {"channels": model.channels}
        if model.decoder == "dpt":
            return DPT(
                model.backbone, self.num_classes, correlation=self.correlation, drop_path=drop_path,
                correlation_channels=model.correlation_channels, checkpointing=model.checkpointing,
                pretrained=self._weights(), **given,
            )  # fmt: skip
        if model.checkpointing:
            raise ValueError("checkpointing: of vision transformers alone; batch norm would count each batch twice")
        return DeepLabV3Plus(
            model.backbone, self.num_classes, output_stride=model.output_stride, atrous_rates=model.atrous_rates,
            multi_grid=model.multi_grid, dropout=self._dropout(), correlation=self.correlation, drop_path=drop_path,
            correlation_channels=model.correlation_channels, pretrained=self._weights(), in_channels=self.in_channels,
            **given,
        )  # fmt: skip

    def _dropout(self) -> list[float]:
        if len(self.model.dropout) != 3:
            raise ValueError(f"dropout: expected three chances, got {len(self.model.dropout)}")
        return self.model.dropout

    def decoder(self) -> Network:
        """A network with random weights and without a backbone. Its `segment` takes the features of another network."""
        network = replace(self, correlation=False, pretrained=False, init=None)()
        network.backbone = nn.Identity()
        return network

    @staticmethod
    def _start_from(network: Network, weights: Mapping[str, Tensor]) -> None:
        try:
            missing, unknown = network.load_state_dict(weights, strict=False)
        except RuntimeError as error:
            raise ConfigError(f"model.init: the run had a network of another shape: {error}") from error
        other = [name for name in (*missing, *unknown) if not name.startswith("correlation.")]
        if other:
            raise ConfigError(f"model.init: the run had another network, without or with {other[0]}")

    def _weights(self) -> bool | str:
        if not self.pretrained or self.init is not None:
            return False
        return str(expand(self.model.pretrained)) if isinstance(self.model.pretrained, str) else self.model.pretrained
