"""Arrays: their library, their device, and the conversion of those of other libraries."""

from __future__ import annotations

import functools
import os
import sys
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = "np.ndarray[Any, Any]"  # or a cupy.ndarray: it has the same methods

_CUDA = 2
"""DLPack's device type kDLCUDA."""
_HOST = (None, 1, 3, 11, 13)
"""Those of memory that NumPy reads: none, kDLCPU, kDLCUDAHost, kDLROCMHost, and kDLCUDAManaged."""
_NOT_SERVED = {8: "an Apple GPU", 10: "an AMD GPU", 14: "an Intel GPU"}
"""Names of others: there are no kernels for these."""


def is_cupy(array: object) -> bool:
    """Tell whether an object is a CuPy array, without importing CuPy."""
    return isinstance(array, getattr(sys.modules.get("cupy"), "ndarray", ()))


def is_torch(array: object) -> bool:
    """Tell whether an object is a torch tensor, without importing torch."""
    return isinstance(array, getattr(sys.modules.get("torch"), "Tensor", ()))


def as_array(array: Any, name: str = "", *, host: bool = True) -> Any:
    """Return another library's array as a CuPy or NumPy array, by DLPack without a copy if possible.

    Other objects come back unchanged. So do arrays in memory of the host unless `host`: a copy of one would
    be of no use to write to. An argument with a name must not belong to a graph of torch's, which would end
    here without a word.
    """
    if type(array) is np.ndarray or array is None or isinstance(array, np.generic) or is_cupy(array):
        return array
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"expected an array without a mask (got {type_name(array)}): use x.filled(value)")
    if isinstance(array, np.ndarray):  # a matrix has its own arithmetic, as others may
        return array.view(np.ndarray)
    if is_torch(array):
        if name and array.requires_grad and sys.modules["torch"].is_grad_enabled():
            raise TypeError(
                f"expected {name} without a graph (got a torch tensor that requires grad, and torch takes no "
                f"gradient through this call): use {name}.detach(), or the layer for torch, "
                "cupy_syncbn.interop.torch.SyncBatchNorm"
            )
        array = array.detach()  # torch exports none that require gradients
    try:
        device = array.__dlpack_device__()[0]
    except (AttributeError, BufferError):  # JAX raises the latter for arrays of several devices
        device = None
    if device == _CUDA or hasattr(array, "__cuda_array_interface__"):
        try:
            cupy = import_cupy()
        except ModuleNotFoundError as error:
            error.add_note(
                f"The {type_name(array)} is on a GPU. Or move it to the CPU, as .cpu() does of torch."
            )
            raise
        return cupy.from_dlpack(array) if device == _CUDA else cupy.asarray(array)
    if device not in _HOST:  # by `__array__` it would be copied through the host, without a word
        where = _NOT_SERVED.get(device, "another device")
        raise TypeError(
            f"expected {name or 'an array'} in memory of the host or on an NVIDIA GPU (got "
            f"{type_name(array)} on {where}, DLPack's type {device}): move it to the CPU"
        )
    return _on_host(array, device) if host else array


def _on_host(array: Any, device: int | None) -> Any:
    """Return another library's array in memory of the host as a NumPy array."""
    if is_torch(array):
        torch = sys.modules["torch"]
        array = array.resolve_neg()  # NumPy has no such lazy sign, of the imaginary part of a conjugate
        if array.dtype != torch.bfloat16:
            return array.numpy()
        import ml_dtypes

        return array.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    reason: Exception | None = None
    if device is not None:
        try:
            return np.from_dlpack(array)
        except (BufferError, RuntimeError, TypeError) as error:  # of bfloat16, or on another device
            reason = error
    if hasattr(array, "__array__"):  # JAX's is without a copy, and knows bfloat16
        return np.asarray(array)
    if reason is not None:
        raise TypeError(
            f"expected an array that NumPy takes by DLPack (got {type_name(array)}: {reason}): convert it, "
            "bfloat16 by a view as int16, numpy.from_dlpack, and a view as ml_dtypes.bfloat16"
        ) from reason
    return array


def type_name(array: object) -> str:
    """Return the full name of an object's type; of Python's own types the bare name."""
    return f"{type(array).__module__}.{type(array).__qualname__}".removeprefix("builtins.")


def import_cupy() -> ModuleType:
    """Import CuPy; the ModuleNotFoundError says how to install it."""
    try:
        import cupy
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "CuPy is not installed: pip install 'cupy-cuda13x[ctk]' nvidia-nccl-cu13, or with 12 in place of "
            "13, if nvidia-smi shows CUDA 12"
        ) from error
    module: ModuleType = cupy
    return module


def is_for_amd(cupy: ModuleType) -> bool:
    """Tell whether CuPy was built for ROCm, whose compiler does not know the kernels' headers."""
    return bool(getattr(cupy.cuda.runtime, "is_hip", False))


@functools.cache
def why_no_gpu() -> str:
    """Tell why CuPy cannot compute, or nothing if it can."""
    cupy = import_cupy()
    if is_for_amd(cupy):
        return "this CuPy is for AMD GPUs (ROCm), and there are kernels for NVIDIA's only: use the CPU"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy finds no CUDA driver that it can use ({error}): see what nvidia-smi says"
    return "" if count else "CuPy sees no GPU: see what nvidia-smi and CUDA_VISIBLE_DEVICES say"


def array_module(device: str | None) -> ModuleType:
    """Return the library of arrays on "cpu" or "cuda".

    None means CUPY_SYNCBN_DEVICE, or by default "cuda" where CuPy sees a GPU, else "cpu".
    """
    asked = os.environ.get("CUPY_SYNCBN_DEVICE") if device is None else None
    if device is None:
        device = asked or _best_device()
    if device == "cpu":
        return np
    if device != "cuda":
        wanted = "CUPY_SYNCBN_DEVICE to be 'cpu' or 'cuda'" if asked else "device 'cpu', 'cuda' or None"
        raise ValueError(
            f"expected {wanted} (got {device!r}): 'cuda' is CuPy's current GPU, which bind_device() chooses"
        )
    if why_no_gpu():
        by = "CUPY_SYNCBN_DEVICE=cuda" if asked else "device 'cuda'"
        raise RuntimeError(f"{by}: {why_no_gpu()}")
    return import_cupy()


def _best_device() -> str:
    try:
        return "cpu" if why_no_gpu() else "cuda"
    except ModuleNotFoundError:
        return "cpu"


def module_of(array: object) -> ModuleType:
    """Return cupy for a CuPy array, numpy for all else."""
    return sys.modules["cupy"] if is_cupy(array) else np


def current_device() -> int:
    """Return the number of CuPy's current GPU."""
    number: int = sys.modules["cupy"].cuda.runtime.getDevice()
    return number


def check_writeable(name: str, array: object) -> None:
    """Raise ValueError if NumPy has an array read-only."""
    if isinstance(array, np.ndarray) and not array.flags.writeable:
        raise ValueError(f"expected a writeable array as {name} (got a read-only one)")


def move(array: Any, module: ModuleType) -> Array:
    """Convert an array, or a list or number, to an array of `module`: numpy or cupy."""
    array = as_array(array)
    if module is np and is_cupy(array):
        array = array.get()
    result: Array = array if is_cupy(array) else module.asarray(np.asarray(array))
    return result
