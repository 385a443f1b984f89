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
        query: Tensor | None,
        key: Tensor | None,
        value: Tensor | None,
        gate: Tensor | None,
        threshold: Tensor | None,
        scale: float,
        out: Tensor | None,
        normalizer: Tensor | None,
        threads: int,
    ) -> None: ...
    @staticmethod
    def pixel_propagate_backward(
        grad_out: Tensor | None,
        query: Tensor | None,
        key: Tensor | None,
        value: Tensor | None,
        normalizer: Tensor | None,
        scale: float,
        dquery: Tensor | None,
        dkey: Tensor | None,
        dvalue: Tensor | None,
        threads: int,
    ) -> None: ...
    @staticmethod
    def region_masks(
        query: Tensor | None,
        key: Tensor | None,
        index: Tensor | None,
        height: int,
        width: int,
        scale: float,
        threshold: float,
        connected: int,
        connectivity: int,
        packed: Tensor | None,
        threads: int,
    ) -> None: ...
    @staticmethod
    def region_propagate(
        labels: Tensor | None,
        reliable: Tensor | None,
        packed: Tensor | None,
        threshold: Tensor | None,
        valid: Tensor | None,
        num_classes: int,
        out_labels: Tensor | None,
        out_reliable: Tensor | None,
        threads: int,
    ) -> None: ...
    @staticmethod
    def connected_components(
        image: Tensor | None, connectivity: int, background: int, out: Tensor | None, threads: int
    ) -> None: ...
    @staticmethod
    def pseudo_label(
        logits: Tensor | None,
        ignore: Tensor | None,
        labels: Tensor | None,
        confidence: Tensor | None,
        class_peak: Tensor | None,
        threads: int,
    ) -> None: ...
    @staticmethod
    def pixel_loss(
        logits: Tensor | None,
        labels: Tensor | None,
        target: Tensor | None,
        weight: Tensor | None,
        pixels: Tensor | None,
        loss: Tensor | None,
        grad: Tensor | None,
        threads: int,
    ) -> None: ...

class cuda:  # absent where CUDA was not built; scratch functions return bytes
    @staticmethod
    def connected_components_scratch(image: Tensor | None) -> int: ...
    @staticmethod
    def connected_components(
        image: Tensor | None,
        connectivity: int,
        background: int,
        out: Tensor | None,
        scratch: Tensor | None,
        stream: int,
    ) -> None: ...
    @staticmethod
    def region_masks_scratch(
        query: Tensor | None, key: Tensor | None, index: Tensor | None, height: int, width: int, connected: int
    ) -> int: ...
    @staticmethod
    def region_masks(
        query: Tensor | None,
        key: Tensor | None,
        index: Tensor | None,
        height: int,
        width: int,
        scale: float,
        threshold: float,
        connected: int,
        connectivity: int,
        packed: Tensor | None,
        scratch: Tensor | None,
        stream: int,
    ) -> None: ...
    @staticmethod
    def region_propagate_scratch(labels: Tensor | None, packed: Tensor | None, num_classes: int) -> int: ...
    @staticmethod
    def region_propagate(
        labels: Tensor | None,
        reliable: Tensor | None,
        packed: Tensor | None,
        threshold: Tensor | None,
        valid: Tensor | None,
        num_classes: int,
        out_labels: Tensor | None,
        out_reliable: Tensor | None,
        scratch: Tensor | None,
        stream: int,
    ) -> None: ...
