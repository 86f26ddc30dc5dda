"""Values that come in by name: from state dicts, and by assignment to parameters and buffers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from cupy_syncbn.arrays import Array, as_array, check_writeable, is_cupy, module_of, move, type_name
from cupy_syncbn.checks import is_data_type


def is_array(value: object) -> bool:
    """Tell whether a value is an array of NumPy, one of its scalars, or an array of CuPy."""
    return isinstance(value, np.ndarray | np.generic) or is_cupy(value)


@np.errstate(all="ignore")  # values that exceed a type become infinite, as in a forward
def fitted(name: str, values: Array, target: Array) -> Array:
    """Return values on the host in the type of a target, which must be writeable and of their shape."""
    check_writeable(name, target)
    if target.shape == () and values.size == 1:  # torch had counters of shape (1,) before 0.4
        values = values.reshape(())
    if values.shape != target.shape:
        raise ValueError(f"expected {name} of shape {target.shape} (got {values.shape})")
    if values.dtype == "V2" and target.dtype.name == "bfloat16":
        return values.view(target.dtype)  # npz files keep its bits, not its name
    if not _can_cast(values, target.dtype):
        raise TypeError(f"expected {name} to be {target.dtype} (got {values.dtype})")
    return values.astype(target.dtype)


def assign(name: str, target: Array, values: Array) -> None:
    """Copy an array into another, which must be on its device and of its shape; round it to the type."""
    if module_of(values) is not module_of(target):
        remedy = ".get()" if is_cupy(values) else "cupy.asarray(...)"
        raise TypeError(
            f"expected {name} to be a {type_name(target)} (got {type_name(values)}): use {remedy}, "
            "or move the module by .to(device)"
        )
    if not is_cupy(target):
        target[...] = fitted(name, np.asarray(values), target)
        return
    if values.dtype == target.dtype and values.shape == target.shape:
        target[...] = values.copy()  # CuPy does not look whether they overlap
    else:
        target[...] = module_of(target).asarray(fitted(name, move(values, np), target))


def as_buffer(name: str, value: Any) -> Any:
    """Return an array as a buffer keeps it; TypeError for all else."""
    array = as_array(value)
    if not is_array(array):
        raise TypeError(
            f"expected the buffer {name} to be an array or None (got {type_name(value)}): "
            "use numpy.asarray(...)"
        )
    return np.asarray(array) if isinstance(array, np.generic) else array  # a scalar cannot be written to


def _can_cast(values: Array, target: np.dtype[Any]) -> bool:
    """Tell whether values may be converted to a type."""
    if np.can_cast(values.dtype, target, "same_kind"):
        return True
    if not is_data_type(values.dtype):
        return False
    # NumPy counts bfloat16 to float16 as no cast of one kind, nor averages of counters, which torch cuts off.
    exact = values.astype(np.float64)
    return is_data_type(target) or (
        target.kind == "i" and bool((exact.astype(target).astype(np.float64) == np.trunc(exact)).all())
    )


def check_mapping(state: object) -> None:
    """Raise TypeError unless an object can be a state dict."""
    if isinstance(state, Mapping):
        return
    if isinstance(state, str | os.PathLike):
        remedy = "use numpy.load(path), or the loader of the file's format"
    elif isinstance(state, list | tuple):
        remedy = "use dict(...) on pairs of name and array, or zip(module.state_dict(), arrays)"
    else:
        remedy = "use what state_dict() returned"
    raise TypeError(f"expected a mapping of names to arrays (got {type_name(state)}): {remedy}")


_SHOWN = 8
"""Names that an error lists."""
_PREFIX = "module."
"""The start of the names within a DistributedDataParallel."""


def names_differ(missing: list[str], unexpected: list[str]) -> KeyError:
    """Return the error that tells of names in a state dict, with their likely cause."""
    message = f"state_dict has missing keys {_listed(missing)} and unexpected keys {_listed(unexpected)}"
    if unexpected and {name.removeprefix(_PREFIX) for name in unexpected} & set(missing):
        message += (
            f": it is likely of a DistributedDataParallel. Load it into one, or without the prefix "
            f"{_PREFIX!r}: {{name.removeprefix({_PREFIX!r}): array for name, array in state.items()}}"
        )
    elif missing and {name.removeprefix(_PREFIX) for name in missing} & set(unexpected):
        message += ": it is likely of a module without DistributedDataParallel. Load it into .module"
    return KeyError(message)


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return f"{names[:_SHOWN]} and {more} more" if more > 0 else f"{names}"
