"""Arrays: which library they are of, on which device, and how those of other libraries come in."""

from __future__ import annotations

import functools
import os
import sys
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = "np.ndarray[Any, Any]"  # or a cupy.ndarray: it has the same methods

_CUDA = 2
"""The type of device that DLPack calls kDLCUDA."""


def is_cupy(array: object) -> bool:
    """Tell whether an object is an array of CuPy, without importing CuPy."""
    return isinstance(array, getattr(sys.modules.get("cupy"), "ndarray", ()))


def _is_torch(array: object) -> bool:
    return isinstance(array, getattr(sys.modules.get("torch"), "Tensor", ()))


def as_array(array: Any, *, host: bool = True) -> Any:
    """Return another library's array as one of CuPy or NumPy, without a copy if there is a way.

    Parameters
    ----------
    array : object
        A torch tensor, which may require gradients, an array with DLPack, ``__array__`` or
        ``__cuda_array_interface__``, or of a subclass of NumPy's. What is none of these comes back as it is.
    host : bool
        Whether to take arrays in memory of the host too: it might be by a copy, of no use to write to.

    Raises
    ------
    TypeError
        If there is no way to the array's memory, or it has a mask.
    ModuleNotFoundError
        If it is on a GPU and CuPy is not installed, or of bfloat16 and ml_dtypes is not.
    """
    if type(array) is np.ndarray or array is None or isinstance(array, np.generic) or is_cupy(array):
        return array
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"expected an array without a mask (got {type_name(array)}): use x.filled(value)")
    if isinstance(array, np.ndarray):  # a matrix has its own arithmetic, as others may
        return array.view(np.ndarray)
    if _is_torch(array):
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
    return _on_host(array, device) if host else array


def _on_host(array: Any, device: int | None) -> Any:
    """Return another library's array in memory of the host as a NumPy array."""
    if _is_torch(array):
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
    """Return the full name of an object's type."""
    return f"{type(array).__module__}.{type(array).__qualname__}"


def import_cupy() -> ModuleType:
    """Import CuPy.

    Raises
    ------
    ModuleNotFoundError
        If it is not installed.
    """
    try:
        import cupy
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "CuPy is not installed: pip install 'cupy-cuda13x[ctk]' nvidia-nccl-cu13, or with 12 for 13, by "
            "the CUDA version that nvidia-smi shows"
        ) from error
    module: ModuleType = cupy
    return module


@functools.cache
def why_no_gpu() -> str:
    """Tell why CuPy cannot compute, or nothing if it can."""
    cupy = import_cupy()
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy finds no CUDA driver that it can use ({error}): see what nvidia-smi says"
    return "" if count else "CuPy sees no GPU: see what nvidia-smi and CUDA_VISIBLE_DEVICES say"


def array_module(device: str | None) -> ModuleType:
    """Return the array library of a device.

    Parameters
    ----------
    device : {"cpu", "cuda", None}
        None is what CUPY_SYNCBN_DEVICE says, or "cuda" where CuPy sees a GPU, else "cpu".

    Returns
    -------
    module
        numpy or cupy.

    Raises
    ------
    ValueError
        If there is no such device.
    ModuleNotFoundError
        If `device` is "cuda", and CuPy is not installed.
    RuntimeError
        If `device` is "cuda", and CuPy has no driver or no GPU.
    """
    if device is None:
        device = os.environ.get("CUPY_SYNCBN_DEVICE") or _best_device()
    if device == "cpu":
        return np
    if device != "cuda":
        raise ValueError(f"expected device 'cpu', 'cuda' or None (got {device!r})")
    if why_no_gpu():
        raise RuntimeError(f"device 'cuda': {why_no_gpu()}")
    return import_cupy()


def _best_device() -> str:
    try:
        return "cpu" if why_no_gpu() else "cuda"
    except ModuleNotFoundError:
        return "cpu"


def module_of(array: object) -> ModuleType:
    """Return the library of an array: cupy, or numpy for all else."""
    return sys.modules["cupy"] if is_cupy(array) else np


def current_device() -> int:
    """Return the number of the GPU that CuPy works on."""
    number: int = sys.modules["cupy"].cuda.runtime.getDevice()
    return number


def check_writeable(name: str, array: object) -> None:
    """Check that an array can be written to.

    Raises
    ------
    ValueError
        If NumPy has it read-only.
    """
    if isinstance(array, np.ndarray) and not array.flags.writeable:
        raise ValueError(f"expected a writeable array as {name} (got a read-only one)")


def move(array: Any, module: ModuleType) -> Array:
    """Return an array, or what NumPy makes one of, as an array of `module`: numpy or cupy."""
    array = as_array(array)
    if module is np and is_cupy(array):
        array = array.get()
    result: Array = array if is_cupy(array) else module.asarray(np.asarray(array))
    return result
