"""Batch normalization in CuPy: the operations of `backends.Backend` on a GPU, by the kernels in kernels/.

Each operation is one launch on the current stream, without waiting for the host. Tensors that are not
contiguous in memory order are copied first. Vectors of the length of the channels are float64.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import cupy

from cupy_syncbn.backends.cuda import kernels
from cupy_syncbn.backends.cuda.launch import THREADS, Launch, launch_for
from cupy_syncbn.backends.interface import Running
from cupy_syncbn.backends.layout import Layout

Array: TypeAlias = Any  # cupy.ndarray, of which there are no types

NULL = 0
"""The null pointer, for an array that is not there."""

# Bits of the kernels' float_types, see FloatTypes in common.cuh.
_WEIGHT, _BIAS, _MEAN, _VAR = 1, 2, 4, 8


def empty(layout: Layout, dtype: Any) -> Array:
    """Allocate a batch of a layout, contiguous in its memory order."""
    return layout.as_batch(cupy.empty(layout.shape_3d, dtype))


def overlaps(a: Array, b: Array) -> bool:
    """Tell whether two arrays share memory."""
    (a_start, a_end), (b_start, b_end) = _bounds(a), _bounds(b)
    if max(a_start, b_start) >= min(a_end, b_end):
        return False
    if a_end - a_start == a.nbytes and b_end - b_start == b.nbytes:  # neither has gaps
        return True
    return bool(cupy.shares_memory(a, b))  # sorts all addresses


def _bounds(array: Array) -> tuple[int, int]:
    """Return the addresses of an array's first byte and behind its last one."""
    start = end = array.data.ptr
    if array.size == 0:
        return start, end
    for length, step in zip(array.shape, array.strides, strict=True):
        start += min(0, (length - 1) * step)
        end += max(0, (length - 1) * step)
    return start, end + array.itemsize


def as_kernel_input(x: Array) -> Array:
    """Return `x`, or a contiguous copy of it if it is not contiguous."""
    return x if x.flags.c_contiguous else cupy.ascontiguousarray(x)


def check_device(x: Array) -> None:
    """Check that an array is on the current device.

    Raises
    ------
    ValueError
        If it is on another.
    """
    current = cupy.cuda.runtime.getDevice()
    if x.device.id != current:
        raise ValueError(
            f"expected an array on the current device, {current} (got one on {x.device.id}): call "
            "bind_device() at the start, or work under `with cupy.cuda.Device(...)`"
        )


@functools.cache
def _multiprocessors(device: int) -> int:
    count: int = cupy.cuda.Device(device).attributes["MultiProcessorCount"]
    return count


@functools.cache
def _instance(kernel: Callable[..., tuple[str, str]], dtype: Any, *arguments: Any) -> tuple[str, str]:
    """Return ``kernel(dtype.name, *arguments)``, of kernels/, which takes longer than to look it up."""
    return kernel(dtype.name, *arguments)


@functools.cache
def _kernel(file: str, name: str) -> Any:
    """Return a kernel: compiled at its first launch on a device; CuPy's cache on disk has it from 14.2 on."""
    module = cupy.RawModule(code=kernels.source(file), options=kernels.OPTIONS, name_expressions=(name,))
    return module.get_function(name)


class _Workspace:
    """What the blocks of a launch exchange their sums through: one a stream, whose launches take turns."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream  # destroyed, it would leave its address to another while its work is under way
        self.counters = cupy.empty(0, "uint32")  # zero between launches
        self.partials = cupy.empty(0, "float64")

    def reserve(self, launch: Launch, channels: int) -> tuple[Array, Array]:
        """Return partial sums and counters for a launch."""
        if self.counters.size < launch.groups:
            self.counters = cupy.zeros(launch.groups, "uint32")
        size = launch.splits * channels * 2
        if self.partials.size < size:
            self.partials = cupy.empty(size, "float64")
        return self.partials, self.counters


class _Workspaces(threading.local):
    """The workspaces of a thread: the per-thread default stream is another in each."""

    def __init__(self) -> None:
        self._of: dict[tuple[int, int], _Workspace] = {}

    def current(self) -> _Workspace:
        """Return the workspace of the current stream, or of the graph that is being captured from it."""
        stream = cupy.cuda.get_current_stream()
        # A graph is replayed on any stream, so that it must share no memory with launches on this one.
        if stream.ptr and cupy.cuda.runtime.streamIsCapturing(stream.ptr):
            return _Workspace(stream)
        key = cupy.cuda.runtime.getDevice(), stream.ptr
        workspace = self._of.get(key)
        if workspace is None:
            workspace = self._of[key] = _Workspace(stream)
        return workspace


_workspaces = _Workspaces()


def _launch_for(*tensors: Array) -> Launch:
    x = tensors[0]
    aligned = all(tensor.data.ptr % 16 == 0 for tensor in tensors)
    return launch_for(_shape(x), x.dtype.itemsize, aligned, _multiprocessors(x.device.id))


def _shape(x: Array) -> tuple[int, int, int]:
    """Return (N, C, S), which is (0, C, 1) for all tensors without elements."""
    N, C, S = x.shape
    return (N, C, S) if S else (0, C, 1)


def _geometry(x: Array, launch: Launch) -> tuple[int, ...]:
    """Return the arguments GEOMETRY of common.cuh."""
    return *_shape(x), launch.lanes, launch.group, launch.per_split


def _is_float(x_type: Any, bit: int, dtype: Any) -> int:
    return bit if x_type.itemsize == 2 and dtype is not None and dtype.itemsize == 4 else 0


def _or_null(array: Array | None) -> Any:
    return NULL if array is None else array


class _Local(NamedTuple):
    """What `centered_squares` needs of a rank's statistics; for float64 data only."""

    sums: Array
    """(3, C): pivot, Σ(x - pivot), Σ(x - pivot)²."""
    n: float
    """Values a channel."""


def statistics(x: Array, trailer: tuple[float, ...]) -> tuple[Array, _Local | None]:
    """Reduce `x` to the exchange vector of the forward, in one pass."""
    N, C, S = x.shape
    launch = _launch_for(x)
    vector = cupy.empty(4 * C + 1 + len(trailer), "float64")
    local = _Local(cupy.empty((3, C), "float64"), float(N * S)) if x.dtype.itemsize == 8 else None
    partials, counters = _workspaces.current().reserve(launch, C)
    kernel = _kernel(*_instance(kernels.statistics, x.dtype, launch.width, launch.columns))
    sums = NULL if local is None else local.sums
    kernel(
        (launch.blocks,),
        (THREADS,),
        (x, *_geometry(x, launch), sums, vector, *map(float, trailer), partials, counters),
    )
    return vector, local


def centered_squares(local: _Local, vector: Array, trailer: tuple[float, ...]) -> Array:
    """Return the vector [Σ(x - mean)² (C) | trailer] about the mean over all ranks, for float64 data."""
    C = local.sums.shape[1]
    squares = cupy.empty(C + len(trailer), "float64")
    _kernel(*kernels.centered_squares())(
        (-(-C // THREADS),), (THREADS,), (local.sums, vector, local.n, C, squares, *map(float, trailer))
    )
    return squares


@dataclass(slots=True)
class _Normalization:
    """What a forward did to each element: ``activation((x - shift) * scale + offset + residual)``."""

    launch: Launch
    saved: Array
    """(4C + 1,): mean, invstd, scale, offset, and the count over all ranks."""
    mask: Array | None
    """A byte a vector: which of the activation's inputs were at most 0. None if x and `saved` tell."""
    residual: bool
    slope: float | None
    """Slope of the activation below zero; None for no activation."""


def normalize(
    x: Array,
    y: Array,
    vector: Array | None,
    squares: Array | None,
    weight: Array | None,
    bias: Array | None,
    running: Running | None,
    ranks: int,
    eps: float,
    residual: Array | None,
    slope: float | None,
) -> _Normalization:
    """Write y by the statistics in the exchanged vectors, and update the running statistics."""
    mean, var, tracked, momentum = (None, None, None, 0.0) if running is None else running
    return _normalize(
        x, y, vector, squares, weight, bias, mean, var, tracked, momentum,
        0 if running is None else ranks, eps, residual, slope,
    )  # fmt: skip


def normalize_fixed(
    x: Array,
    y: Array,
    mean: Array,
    var: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    residual: Array | None,
    slope: float | None,
) -> _Normalization:
    """Write y by given statistics."""
    return _normalize(
        x, y, None, None, weight, bias, mean, var, None, 0.0, 0, eps, residual, slope
    )  # fmt: skip


def _normalize(
    x: Array,
    y: Array,
    vector: Array | None,
    squares: Array | None,
    weight: Array | None,
    bias: Array | None,
    mean: Array | None,
    var: Array | None,
    tracked: Array | None,
    momentum: float | None,
    ranks: int,
    eps: float,
    residual: Array | None,
    slope: float | None,
) -> _Normalization:
    C = x.shape[1]
    launch = _launch_for(x, y) if residual is None else _launch_for(x, y, residual)
    mask = None
    if residual is not None and slope is not None:
        mask = cupy.empty(_mask_size(x, launch), "uint8")
    saved = cupy.empty(4 * C + 1, "float64")
    types = 0
    for bit, values in ((_WEIGHT, weight), (_BIAS, bias), (_MEAN, mean), (_VAR, var)):
        types |= _is_float(x.dtype, bit, None if values is None else values.dtype)
    weight, bias, means, variances = (
        None if values is None else as_kernel_input(values) for values in (weight, bias, mean, var)
    )
    flags = launch.columns, residual is not None, slope is not None
    instance = _instance(kernels.normalize, x.dtype, launch.width, *flags)
    _, counters = _workspaces.current().reserve(launch, 0)
    _kernel(*instance)(
        (launch.blocks,),
        (THREADS,),
        (
            x,
            y,
            _or_null(residual),
            _or_null(mask),
            *_geometry(x, launch),
            _or_null(vector),
            _or_null(squares),
            _or_null(weight),
            _or_null(bias),
            _or_null(means),
            _or_null(variances),
            _or_null(tracked),
            types,
            -1.0 if momentum is None else float(momentum),
            ranks,
            float(eps),
            slope or 0.0,
            saved,
            counters,
        ),
    )
    for view, values in ((mean, means), (var, variances)):
        if ranks and view is not None and view is not values:  # it has gaps
            view[...] = values
    return _Normalization(launch, saved, mask, residual is not None, slope)


def _mask_size(x: Array, launch: Launch) -> int:
    """Return the bytes of the activation's mask: see Cursor::place in common.cuh."""
    N, C, S = _shape(x)
    width = launch.width
    if launch.columns:
        return N * C * S // width
    return N * C * (max(S // width, 1) + (2 * width if S % width else 0))


def reduce_gradients(
    dy: Array,
    x: Array,
    normalization: _Normalization,
    dresidual: Array | None,
    trailer: tuple[float, ...],
) -> tuple[Array, Array, Array]:
    """Reduce `dy` and `x` to the backward's exchange vector, in one pass that also writes dresidual."""
    C = x.shape[1]
    launch = normalization.launch
    if launch.width > 1 and dy.data.ptr % 16:
        dy = dy.copy()  # x is aligned, and the mask is of vectors
    vector = cupy.empty(2 * C + len(trailer), "float64")
    own = cupy.empty(2 * C, "float64")
    partials, counters = _workspaces.current().reserve(launch, C)
    flags = launch.columns, dresidual is not None, normalization.slope is not None
    instance = _instance(kernels.reduce_gradients, x.dtype, launch.width, *flags)
    _kernel(*instance)(
        (launch.blocks,),
        (THREADS,),
        (
            dy,
            x,
            _or_null(dresidual),
            _or_null(normalization.mask),
            *_geometry(x, launch),
            normalization.saved,
            normalization.slope or 0.0,
            vector,
            own,
            *map(float, trailer),
            partials,
            counters,
        ),
    )
    return vector, own, dy


def input_gradient(
    gradient: Array,
    x: Array,
    normalization: _Normalization,
    dx: Array,
    sums: Array | None,
    parameter_sums: Array,
    parameter_scale: float,
    weight_type: Any,
    bias_type: Any,
) -> tuple[Array | None, Array | None]:
    """Write dx, and return the gradients of weight and bias."""
    C = x.shape[1]
    launch = normalization.launch
    dweight = None if weight_type is None else cupy.empty(C, weight_type)
    dbias = None if bias_type is None else cupy.empty(C, bias_type)
    types = _is_float(x.dtype, _WEIGHT, weight_type) | _is_float(x.dtype, _BIAS, bias_type)
    flags = launch.columns, normalization.residual, normalization.slope is not None
    instance = _instance(kernels.input_gradient, x.dtype, launch.width, *flags)
    _kernel(*instance)(
        (launch.blocks,),
        (THREADS,),
        (
            gradient,
            x,
            dx,
            _or_null(normalization.mask),
            *_geometry(x, launch),
            normalization.saved,
            normalization.slope or 0.0,
            _or_null(sums),
            parameter_sums,
            float(parameter_scale),
            _or_null(dweight),
            _or_null(dbias),
            types,
        ),
    )
    return dweight, dbias
