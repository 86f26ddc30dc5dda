"""Batch normalization in CuPy: the operations of `backends.Backend` on a GPU, by the kernels in kernels/.

Each operation is one launch on the current stream, without waiting for the host. Tensors that are not
contiguous in memory order are copied first. Vectors of the length of the channels are float64.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import cupy
import numpy as np

from cupy_syncbn.backends.cuda import kernels, symbols
from cupy_syncbn.backends.cuda.launch import THREADS, Launch, launch_for
from cupy_syncbn.backends.interface import Affine, BatchSums, Epilogue, ParameterSums, Reduced, Running

Array: TypeAlias = Any  # cupy.ndarray, of which there are no types

NULL = 0
"""The null pointer, for an array that is not there."""

_BLOCK = (THREADS,)


def empty(shape: tuple[int, int, int], dtype: Any) -> Array:
    """Allocate a tensor, contiguous."""
    return cupy.empty(shape, dtype)


def overlaps(a: Array, b: Array) -> bool:
    """Tell whether two arrays share memory."""
    (a_start, a_end), (b_start, b_end) = _bounds(a), _bounds(b)
    if max(a_start, b_start) >= min(a_end, b_end):
        return False
    if a_end - a_start == a.nbytes and b_end - b_start == b.nbytes:  # neither has gaps
        return True
    return bool(cupy.shares_memory(a, b))  # sorts all addresses


def _bounds(array: Array) -> tuple[int, int]:
    """Return the address of an array's first byte, and that after its last byte."""
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
def _multiprocessors(device: int) -> tuple[int, int]:
    """Return how many there are, and the bytes of shared memory that each has."""
    attributes = cupy.cuda.Device(device).attributes
    return attributes["MultiProcessorCount"], attributes["MaxSharedMemoryPerMultiprocessor"]


@functools.cache
def _kernel(file: str, name: str) -> Any:
    """Return a kernel, compiled at its first launch on a device unless CuPy has it on disk."""
    code = kernels.source(file)
    if _keeps_expressions():
        module = cupy.RawModule(code=code, options=kernels.OPTIONS, name_expressions=(name,))
        return module.get_function(name)
    module = cupy.RawModule(code=code + symbols.instantiation(name), options=kernels.OPTIONS)
    return module.get_function(symbols.symbol(name))


def _keeps_expressions() -> bool:
    """Tell whether this CuPy keeps on disk what was compiled for name_expressions."""
    major, minor, *_ = cupy.__version__.split(".")
    return (int(major), int(minor)) >= (14, 2)


class _Workspace:
    """The memory in which blocks pass their sums on: one per stream, whose launches take turns."""

    def __init__(self, stream: Any, keeps_all: bool = False) -> None:
        self.stream = stream  # kept alive: a new stream could get its address while its work is pending
        self.counters = cupy.empty(0, "uint32")  # zero between launches
        self.partials = cupy.empty(0, "float64")
        self._outgrown: list[Array] | None = [] if keeps_all else None
        """What the earlier launches of a graph go on writing to."""

    def reserve(self, launch: Launch, channels: int) -> tuple[Array, Array]:
        """Return partial sums and counters for a launch."""
        if self.counters.size < launch.groups:
            self._outgrow(self.counters)
            self.counters = cupy.zeros(launch.groups, "uint32")
        size = launch.splits * channels * 2
        if self.partials.size < size:
            self._outgrow(self.partials)
            self.partials = cupy.empty(size, "float64")
        return self.partials, self.counters

    def _outgrow(self, array: Array) -> None:
        if self._outgrown is not None:
            self._outgrown.append(array)


Workspaces: TypeAlias = dict[tuple[int, int], _Workspace]
"""By device and stream."""

_of_graphs: list[_Workspace] = []
"""Those of graphs that were captured without `workspaces_in`: no one tells when they are replayed no more."""


class _Workspaces(threading.local):
    """The workspaces of a thread: the per-thread default stream is another in each."""

    def __init__(self) -> None:
        self._of: Workspaces = {}
        self.of_graph: Workspaces | None = None

    def clear(self) -> None:
        """Forget this thread's."""
        self._of.clear()

    def current(self) -> _Workspace:
        """Return the workspace of the current stream, or of the graph that is being captured from it."""
        stream = cupy.cuda.get_current_stream()
        found = self._of if self.of_graph is None else self.of_graph
        # A graph is replayed on any stream, so that it must share no memory with launches on this one.
        if found is self._of and stream.ptr and cupy.cuda.runtime.streamIsCapturing(stream.ptr):
            workspace = _Workspace(stream)
            _of_graphs.append(workspace)
            return workspace
        key = cupy.cuda.runtime.getDevice(), stream.ptr
        if key not in found:
            found[key] = _Workspace(stream, keeps_all=found is self.of_graph)
        return found[key]


_workspaces = _Workspaces()


@contextlib.contextmanager
def workspaces_in(found: Workspaces) -> Iterator[None]:
    """Let the launches inside take their workspaces from here, and put them here.

    A graph that is captured inside writes to them: they must live as long. Launched once before that, a step
    finds them large enough, and the graph need not clear any.
    """
    before, _workspaces.of_graph = _workspaces.of_graph, found
    try:
        yield
    finally:
        _workspaces.of_graph = before


class _Passes:
    """The launches over a kind of tensor: all that stays the same from call to call."""

    __slots__ = ("as_slope", "blocks", "geometry", "launch", "mask_size", "type_name")

    def __init__(self, shape: tuple[int, int, int], dtype: Any, aligned: bool, device: int) -> None:
        N, C, S = shape if shape[2] else (0, shape[1], 1)  # of tensors without elements
        self.launch = launch_for((N, C, S), dtype.itemsize, aligned, *_multiprocessors(device))
        self.type_name: str = dtype.name
        self.as_slope: Callable[[float], Any] = float if dtype.itemsize == 8 else np.float32
        """Makes an argument of the type Accumulator of common.cuh."""
        self.blocks = (self.launch.groups, self.launch.splits)
        self.geometry = (N, C, S, *self.launch[2:])
        """The arguments GEOMETRY of common.cuh."""
        width = self.launch.width
        self.mask_size = N * C * (max(S // width, 1) + (2 * width if S % width else 0))
        """The bytes of the activation's mask: see Cursor::place in common.cuh."""
        if self.launch.columns:
            self.mask_size = N * C * S // width


# All three are asked for the same kinds of tensors again and again, and answer without a call in Python.
_passes = functools.lru_cache(maxsize=1024)(_Passes)


@functools.lru_cache(maxsize=1024)
def _kernel_of(kernel: Callable[..., tuple[str, str]], passes: _Passes, *rest: bool | str) -> Any:
    """Return the instance of a kernel of `kernels` for the launches over a kind of tensor."""
    return _kernel(*kernel(passes.type_name, passes.launch.width, passes.launch.columns, *rest))


@functools.lru_cache(maxsize=256)
def _flags(x_type: Any, *types: Any) -> int:
    """Return the bits of Flags in common.cuh that tell which of weight, bias, mean and var are float32."""
    return sum(
        1 << bit
        for bit, dtype in enumerate(types)
        if x_type.itemsize == 2 and dtype is not None and dtype.itemsize == 4
    )


_LAUNCHES: tuple[Any, ...] = (launch_for, _passes, _kernel_of)
_CACHES: tuple[Any, ...] = (*_LAUNCHES, _kernel, _multiprocessors)


def forget_launches() -> None:
    """Shape all launches anew, as after a constant of launch.py has changed."""
    for cache in _LAUNCHES:
        cache.cache_clear()


def forget_kernels() -> None:
    """Compile all kernels anew, as after `kernels.OPTIONS` has changed."""
    _kernel_of.cache_clear()
    _kernel.cache_clear()


def forget() -> None:
    """Forget all launches and workspaces, as after CuPy has been replaced."""
    for cache in _CACHES:
        cache.cache_clear()
    _workspaces.clear()


class _Local(NamedTuple):
    """A rank's statistics, for `centered_squares`; of float64 data only."""

    sums: Array
    """(3, C): pivot, Σ(x - pivot), Σ(x - pivot)²."""
    n: float
    """Values per channel."""


def statistics(x: Array, trailer: tuple[float, ...]) -> tuple[Array, _Local | None]:
    """Reduce `x` to the vector of the forward, in one pass."""
    N, C, S = x.shape
    passes = _passes(x.shape, x.dtype, x.data.ptr % 16 == 0, x.device.id)
    vector = cupy.empty(4 * C + 1 + len(trailer), "float64")
    local, sums = None, NULL
    if x.dtype.itemsize == 8:
        sums = cupy.empty((3, C), "float64")
        local = _Local(sums, float(N * S))
    partials, counters = _workspaces.current().reserve(passes.launch, C)
    kernel = _kernel_of(kernels.statistics, passes)
    kernel(
        passes.blocks, _BLOCK, (x, *passes.geometry, sums, vector, *map(float, trailer), partials, counters)
    )
    return vector, local


def centered_squares(local: _Local, vector: Array, trailer: tuple[float, ...], mailbox: int) -> Array:
    """Return the vector [Σ(x - mean)² (C) | trailer] about the mean over all ranks, for float64 data."""
    C = local.sums.shape[1]
    squares = cupy.empty(C + len(trailer), "float64")
    _kernel(*kernels.centered_squares())(
        (-(-C // THREADS),), _BLOCK, (local.sums, vector, local.n, C, squares, *map(float, trailer), mailbox)
    )
    return squares


@dataclass(slots=True)
class _Normalization:
    """The step of a forward at each element: ``activation((x - shift) * scale + offset + residual)``."""

    passes: _Passes
    saved: Array
    """(4C + 1,): mean, invstd, scale, offset, and the count over all ranks."""
    mask: Array | None
    """A byte per vector: which of the activation's inputs were at most 0. None if x and `saved` tell."""
    residual: bool
    slope: float | None
    """Slope of the activation below zero; None for no activation."""
    activation: str
    """The one of the backward's kernels."""


def _contiguous(values: Array | None) -> Any:
    """Return the values of a (C,) array in one piece, or the null pointer for None."""
    if values is None:
        return NULL
    return values if values.flags.c_contiguous else cupy.ascontiguousarray(values)


def normalize(
    x: Array, y: Array, batch: BatchSums | None, running: Running | None, affine: Affine, epilogue: Epilogue
) -> tuple[_Normalization, list[Callable[[], object]]]:
    """Write y by the statistics of the batch, which update the running ones, or without one by these."""
    vector, squares, ranks, mailbox = batch or (None, None, 0, NULL)
    mean, var, tracked, momentum = running or (None, None, None, 0.0)
    weight, bias, eps = affine
    residual: Any = epilogue.residual
    slope, C = epilogue.slope, x.shape[1]
    types = [None if values is None else values.dtype for values in (weight, bias, mean, var)]
    aligned = (x.data.ptr | y.data.ptr | (0 if residual is None else residual.data.ptr)) % 16 == 0
    passes = _passes(x.shape, x.dtype, aligned, x.device.id)
    mask = None
    if residual is not None and slope is not None:
        mask = cupy.empty(passes.mask_size, "uint8")
    saved = cupy.empty(4 * C + 1, "float64")
    counters: Any = NULL
    if batch and tracked is not None:
        _, counters = _workspaces.current().reserve(passes.launch, 0)
    means, variances = _contiguous(mean), _contiguous(var)
    _kernel_of(kernels.normalize, passes, residual is not None, kernels.activation_of(slope))(
        passes.blocks,
        _BLOCK,
        (
            x,
            y,
            NULL if residual is None else residual,
            NULL if mask is None else mask,
            *passes.geometry,
            NULL if vector is None else vector,
            NULL if squares is None else squares,
            _contiguous(weight),
            _contiguous(bias),
            means,
            variances,
            NULL if tracked is None else tracked,
            _flags(x.dtype, *types) | (kernels.IN_PLACE if epilogue.in_place else 0),
            -1.0 if momentum is None else float(momentum),
            ranks if running else 0,
            float(eps),
            passes.as_slope(slope or 0.0),
            saved,
            counters,
            mailbox,
        ),
    )
    activation = kernels.activation_of(slope, inverted=epilogue.in_place)
    normalization = _Normalization(passes, saved, mask, residual is not None, slope, activation)
    if not batch or not running:
        return normalization, []
    pairs = (running.mean, means), (running.var, variances)
    # Where a view has gaps, the kernel has written to a copy.
    return normalization, [partial(view.__setitem__, ..., new) for view, new in pairs if view is not new]


def reduce_gradients(
    dy: Array, x: Array, normalization: _Normalization, dresidual: Array | None, trailer: tuple[float, ...]
) -> Reduced:
    """Reduce `dy` and `x` to the vector of the backward, in one pass that also writes dresidual."""
    C = x.shape[1]
    passes, slope, mask = normalization.passes, normalization.slope, normalization.mask
    if passes.launch.width > 1 and dy.data.ptr % 16:
        dy = dy.copy()  # x is aligned, and the mask is of vectors
    global_sums = cupy.empty(2 * C + len(trailer), "float64")
    local_sums = cupy.empty(2 * C, "float64")
    partials, counters = _workspaces.current().reserve(passes.launch, C)
    _kernel_of(kernels.reduce_gradients, passes, dresidual is not None, normalization.activation)(
        passes.blocks,
        _BLOCK,
        (
            dy,
            x,
            NULL if dresidual is None else dresidual,
            NULL if mask is None else mask,
            *passes.geometry,
            normalization.saved,
            passes.as_slope(slope or 0.0),
            global_sums,
            local_sums,
            *map(float, trailer),
            partials,
            counters,
        ),
    )
    behind_relu = dresidual is not None and slope == 0
    return Reduced(global_sums, local_sums, dresidual if behind_relu else dy)


def input_gradient(
    gradient: Array,
    x: Array,
    normalization: _Normalization,
    dx: Array,
    sums: Array | None,
    parameters: ParameterSums,
    mailbox: int,
) -> tuple[Array | None, Array | None]:
    """Write dx, and return the gradients of weight and bias."""
    C = x.shape[1]
    passes, slope, mask = normalization.passes, normalization.slope, normalization.mask
    vector, scale, weight_type, bias_type = parameters
    dweight = None if weight_type is None else cupy.empty(C, weight_type)
    dbias = None if bias_type is None else cupy.empty(C, bias_type)
    _kernel_of(kernels.input_gradient, passes, normalization.residual, normalization.activation)(
        passes.blocks,
        _BLOCK,
        (
            gradient,
            x,
            dx,
            NULL if mask is None else mask,
            *passes.geometry,
            normalization.saved,
            passes.as_slope(slope or 0.0),
            NULL if sums is None else sums,
            vector,
            float(scale),
            NULL if dweight is None else dweight,
            NULL if dbias is None else dbias,
            _flags(x.dtype, weight_type, bias_type),
            mailbox,
        ),
    )
    return dweight, dbias
