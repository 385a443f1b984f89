from collections.abc import Sequence

cuda_status: str

class Tensor:
    def __init__(self, address: int, dtype: str, shape: Sequence[int], stride: Sequence[int]) -> None: ...

class cpu:
    @staticmethod
    def isa() -> str: ...
    @staticmethod
    def isas() -> list[str]: ...
    @staticmethod
    def select_isa(name: str) -> None: ...
    @staticmethod
    def pixel_propagate_forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gate: Tensor | None,
        threshold: Tensor | None,
        scale: float,
        out: Tensor,
        normalizer: Tensor,
        threads: int,
    ) -> None: ...
    @staticmethod
    def pixel_propagate_backward(
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        normalizer: Tensor,
        scale: float,
        dquery: Tensor | None,
        dkey: Tensor | None,
        dvalue: Tensor | None,
        threads: int,
    ) -> None: ...
    @staticmethod
    def region_masks(
        query: Tensor,
        key: Tensor,
        index: Tensor,
        height: int,
        width: int,
        scale: float,
        threshold: float,
        connected: int,
        connectivity: int,
        packed: Tensor,
        threads: int,
    ) -> None: ...
    @staticmethod
    def region_propagate(
        labels: Tensor,
        reliable: Tensor,
        packed: Tensor,
        threshold: Tensor,
        valid: Tensor | None,
        num_classes: int,
        out_labels: Tensor,
        out_reliable: Tensor,
        threads: int,
    ) -> None: ...
    @staticmethod
    def connected_components(image: Tensor, connectivity: int, background: int, out: Tensor, threads: int) -> None: ...
    @staticmethod
    def pseudo_label(
        logits: Tensor,
        ignore: Tensor | None,
        labels: Tensor,
        confidence: Tensor,
        class_peak: Tensor,
        threads: int,
    ) -> None: ...
    @staticmethod
    def pixel_loss(
        logits: Tensor,
        labels: Tensor | None,
        target: Tensor | None,
        weight: Tensor,
        pixels: Tensor,
        loss: Tensor,
        grad: Tensor | None,
        threads: int,
    ) -> None: ...

class cuda:  # absent where CUDA was not built; scratch functions return bytes
    @staticmethod
    def connected_components_scratch(image: Tensor) -> int: ...
    @staticmethod
    def connected_components(
        image: Tensor,
        connectivity: int,
        background: int,
        out: Tensor,
        scratch: Tensor,
        stream: int,
    ) -> None: ...
    @staticmethod
    def region_masks_scratch(
        query: Tensor, key: Tensor, index: Tensor, height: int, width: int, connected: int
    ) -> int: ...
    @staticmethod
    def region_masks(
        query: Tensor,
        key: Tensor,
        index: Tensor,
        height: int,
        width: int,
        scale: float,
        threshold: float,
        connected: int,
        connectivity: int,
        packed: Tensor,
        scratch: Tensor,
        stream: int,
    ) -> None: ...
    @staticmethod
    def region_propagate_scratch(labels: Tensor, packed: Tensor, num_classes: int) -> int: ...
    @staticmethod
    def region_propagate(
        labels: Tensor,
        reliable: Tensor,
        packed: Tensor,
        threshold: Tensor,
        valid: Tensor | None,
        num_classes: int,
        out_labels: Tensor,
        out_reliable: Tensor,
        scratch: Tensor,
        stream: int,
    ) -> None: ...
