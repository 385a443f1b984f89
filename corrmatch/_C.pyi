from collections.abc import Callable, Sequence

cuda_status: str

class Tensor:
    def __init__(self, address: int, dtype: str, shape: Sequence[int], stride: Sequence[int]) -> None: ...

class _Operators:  # by name; their parameters are in csrc/cpu/ops.def and csrc/cuda/ops.def
    def __getattr__(self, name: str) -> Callable[..., None]: ...

class _Cpu(_Operators):
    def isa(self) -> str: ...
    def isas(self) -> list[str]: ...
    def select_isa(self, name: str) -> None: ...

cpu: _Cpu
cuda: _Operators  # absent where CUDA was not built
