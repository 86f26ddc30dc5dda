"""The stand-in for CuPy: the names that the package uses, on emulated device memory."""

import contextlib
import importlib.machinery
import sys
import types

import numpy as np

from . import cuda
from .device_array import ndarray
from .device_memory import MemoryPool, using_allocator
from .launch import RawKernel, RawModule

_VERSION = "14.2.0"  # whose behaviour the stand-in follows

_NUMPY_NAMES = (
    "bool_ dtype float16 float32 float64 inf int8 int16 int32 int64 nan newaxis uint8 uint16 uint32 uint64"
)
_CUDA_NAMES = (
    "Device Event ExternalStream Graph Stream alloc_pinned_memory get_current_stream get_elapsed_time "
    "is_available"
)


class _StandInModule(types.ModuleType):
    def __getattr__(self, name):
        raise AttributeError(f"the stand-in for CuPy has no {self.__name__}.{name}: add it if CuPy has it")


def make_cupy(mode="checked"):
    """Return a module to put into sys.modules as cupy, whose kernels are "checked" or "fast"."""
    cupy = _module("cupy", _functions(), {name: getattr(np, name) for name in _NUMPY_NAMES.split()})
    cupy.__version__ = _VERSION
    cupy.RawModule = type("RawModule", (RawModule,), {"mode": mode, "prebuild": None})
    cupy.RawKernel = RawKernel
    cupy.cuda = _module("cupy.cuda", {name: getattr(cuda, name) for name in _CUDA_NAMES.split()})
    cupy.cuda.MemoryPool, cupy.cuda.using_allocator = MemoryPool, using_allocator
    cupy.cuda.runtime = _module("cupy.cuda.runtime", vars(cuda.runtime))
    return cupy


@contextlib.contextmanager
def installed(mode="checked"):
    """Let `import cupy` give the stand-in, inside; yield it."""
    cupy = make_cupy(mode)
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "cupy"}
    for name in before:
        del sys.modules[name]
    modules = {"cupy": cupy, "cupy.cuda": cupy.cuda, "cupy.cuda.runtime": cupy.cuda.runtime}
    sys.modules.update(modules)
    try:
        yield cupy
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(before)


def _module(name, *contents):
    module = _StandInModule(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    for names in contents:
        vars(module).update(names)
    return module


def _functions():
    functions = (
        empty, zeros, ones, full, empty_like, zeros_like, ones_like, full_like, arange, array, asarray,
        ascontiguousarray, asnumpy, copyto, from_dlpack, get_array_module, shares_memory, may_share_memory,
    )  # fmt: skip
    return {"ndarray": ndarray, **{function.__name__: function for function in functions}}


# ---- Creation ----
def empty(shape, dtype=float, order="C"):
    return ndarray(shape, dtype, order=order)


def full(shape, fill_value, dtype=None, order="C"):
    array = ndarray(shape, np.asarray(fill_value).dtype if dtype is None else dtype, order=order)
    array.fill(fill_value)
    return array


def zeros(shape, dtype=float, order="C"):
    return full(shape, 0, dtype, order)


def ones(shape, dtype=float, order="C"):
    return full(shape, 1, dtype, order)


def empty_like(prototype, dtype=None, order="K", subok=None, shape=None):
    dtype = prototype.dtype if dtype is None else dtype
    if shape is not None:
        return ndarray(shape, dtype, order="F" if order == "F" else "C")
    return ndarray._empty_like(prototype._array, dtype, order)


def full_like(prototype, fill_value, dtype=None, order="K", subok=None, shape=None):
    array = empty_like(prototype, dtype, order, subok, shape)
    array.fill(fill_value)
    return array


def zeros_like(prototype, dtype=None, order="K", subok=None, shape=None):
    return full_like(prototype, 0, dtype, order, subok, shape)


def ones_like(prototype, dtype=None, order="K", subok=None, shape=None):
    return full_like(prototype, 1, dtype, order, subok, shape)


def arange(start, stop=None, step=1, dtype=None):
    return array(np.arange(start, stop, step, dtype) if stop is not None else np.arange(start, dtype=dtype))


def array(obj, dtype=None, copy=True, order="K", subok=False, ndmin=0, *, blocking=False):
    """Take a stand-in array, a NumPy array, numbers, or what has a __cuda_array_interface__."""
    if not isinstance(obj, ndarray) and hasattr(obj, "__cuda_array_interface__"):
        obj = ndarray._from_cuda_array_interface(obj)
        if not copy and dtype in (None, obj.dtype) and order in (None, "K", "A"):
            return obj
    if isinstance(obj, ndarray):
        if not copy and dtype in (None, obj.dtype) and _has_order(obj, order):
            return obj
        if dtype in (None, obj.dtype):
            return ndarray._copy_of(obj._values, order, obj._written_map())
        return obj.astype(dtype, order=order)
    values = np.array(obj, dtype=dtype, ndmin=ndmin)
    # What comes from the host keeps no other order than F.
    return ndarray._copy_of(values, "A" if order in (None, "K") else order)


def asarray(a, dtype=None, order=None, *, copy=None, blocking=False):
    return array(a, dtype, copy=bool(copy), order=order)


def ascontiguousarray(a, dtype=None):
    contiguous = asarray(a, dtype, order="C")
    return contiguous if contiguous.ndim else contiguous.reshape(1)


def _has_order(array, order):
    flags = array.flags
    return {"C": flags.c_contiguous, "F": flags.f_contiguous}.get(order, True)


def from_dlpack(array, *, device=None, copy=None):
    if not isinstance(array, ndarray):
        device_type = array.__dlpack_device__()[0]
        if device_type != 2:  # kDLCUDA
            raise TypeError(f"Unsupported array type on device {device_type}")
        return ndarray._from_cuda_array_interface(array)
    return array[...]


# ---- The rest ----
def asnumpy(a, stream=None, order="C", out=None, *, blocking=True):
    if isinstance(a, ndarray):
        return a.get(stream=stream, order=order, out=out, blocking=blocking)
    if out is not None:
        out[...] = a
        return out
    return np.asarray(a, order=order)


def copyto(dst, src, casting="same_kind", where=None):
    if where is not None:
        raise NotImplementedError("the stand-in's copyto has no `where`")
    if isinstance(src, ndarray) and not np.can_cast(src.dtype, dst.dtype, casting):
        raise TypeError(f"Cannot cast {src.dtype} to {dst.dtype} in {casting} casting mode")
    dst[...] = src


def get_array_module(*args):
    return sys.modules["cupy"] if any(isinstance(value, ndarray) for value in args) else np


def shares_memory(a, b, max_work=None):
    return np.shares_memory(a._array, b._array)


def may_share_memory(a, b, max_work=None):
    return np.may_share_memory(a._array, b._array)
