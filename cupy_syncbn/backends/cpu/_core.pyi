from typing import Any

from cupy_syncbn.arrays import Array
from cupy_syncbn.backends.interface import Affine, BatchSums, Epilogue, ParameterSums, Reduced, Running

SOURCES: str
VERSION: str

def levels() -> dict[str, bool]: ...
def use(level: str, /) -> None: ...
def as_kernel_input(x: Array, /) -> Array: ...
def statistics(x: Array, trailer: tuple[float, ...], /) -> tuple[Array, Any]: ...
def centered_squares(
    local_sums: Any, vector: Array, trailer: tuple[float, ...], mailbox: int, /
) -> Array: ...
def normalize(
    x: Array,
    y: Array,
    batch: BatchSums | None,
    running: Running | None,
    affine: Affine,
    epilogue: Epilogue,
    /,
) -> tuple[Any, list[Any]]: ...
def reduce_gradients(
    dy: Array, x: Array, normalization: Any, dresidual: Array | None, trailer: tuple[float, ...], /
) -> Reduced: ...
def input_gradient(
    gradient: Any,
    x: Array,
    normalization: Any,
    dx: Array,
    sums: Array | None,
    parameters: ParameterSums,
    mailbox: int,
    /,
) -> tuple[Array | None, Array | None]: ...
