"""The CUDA C++ sources, and which instances of their templates there are."""

from __future__ import annotations

import functools
import itertools
import re
from pathlib import Path

OPTIONS = ("--std=c++17",)
"""Options of NVRTC beside the architecture."""

REGISTERS = 80
"""Per thread: those that MIN_BLOCKS of common.cuh leaves."""

TYPES = {"float16": "__half", "bfloat16": "__nv_bfloat16", "float32": "float", "float64": "double"}
"""C++ names of the types of data."""

ACTIVATIONS = ("IDENTITY", "RELU", "LEAKY_RELU")
"""Those of the enumeration Activation of formulas.h that a forward has."""
INVERTED = "INVERTED_LEAKY_RELU"
"""The one that only a backward has."""

IN_PLACE = 16
"""That of the enumeration Flags of common.cuh."""

_FOLDER = Path(__file__).parent


def vector_width(itemsize: int) -> int:
    """Return the elements of `itemsize` bytes that an access of 16 bytes has."""
    return 16 // itemsize


@functools.cache
def source(file: str) -> str:
    """Return a .cu file with its headers written out: CuPy's cache knows no more."""
    included: set[str] = set()

    def expand(name: str) -> str:
        lines = [f'#line 1 "{name}"']
        for number, line in enumerate((_FOLDER / name).read_text(encoding="utf-8").splitlines(), 1):
            include = re.fullmatch(r'#include "([\w./]+)"', line)
            if include and include[1] not in included:
                included.add(include[1])
                lines += [expand(include[1]), f'#line {number + 1} "{name}"']
            elif not include and line != "#pragma once":
                lines.append(line)
            else:
                lines.append("")
        return "\n".join(lines)

    return expand(file)


def _instance(name: str, *arguments: object) -> str:
    words = (str(argument).lower() if isinstance(argument, bool) else str(argument) for argument in arguments)
    return f"{name}<{', '.join(words)}>"


def statistics(dtype: str, width: int, columns: bool) -> tuple[str, str]:
    """Return the file and the name of an instance for data of `dtype` in vectors of `width` elements."""
    return "statistics.cu", _instance("statistics", TYPES[dtype], width, columns)


def centered_squares() -> tuple[str, str]:
    """Return the file and the name of the kernel."""
    return "statistics.cu", "centered_squares"


def activation_of(slope: float | None, inverted: bool = False) -> str:
    """Return the activation that has a slope below zero; None is that of none.

    `inverted` is for the backward of a normalization in place.
    """
    if slope and inverted:
        return INVERTED
    return "IDENTITY" if slope is None else "LEAKY_RELU" if slope else "RELU"


def normalize(dtype: str, width: int, columns: bool, residual: bool, activation: str) -> tuple[str, str]:
    """Return the file and the name of an instance."""
    return "normalize.cu", _instance("normalize", TYPES[dtype], width, columns, residual, activation)


def reduce_gradients(
    dtype: str, width: int, columns: bool, residual: bool, activation: str
) -> tuple[str, str]:
    """Return the file and the name of an instance."""
    return "gradients.cu", _instance("reduce_gradients", TYPES[dtype], width, columns, residual, activation)


def input_gradient(dtype: str, width: int, columns: bool, residual: bool, activation: str) -> tuple[str, str]:
    """Return the file and the name of an instance.

    A residual matters to the mask of the activation only; and of a ReLU, its gradient is the one behind it.
    """
    if residual and activation == "RELU":
        activation = "IDENTITY"
    residual = residual and activation != "IDENTITY"
    return "gradients.cu", _instance("input_gradient", TYPES[dtype], width, columns, residual, activation)


@functools.cache
def instances(file: str, dtype: str) -> tuple[str, ...]:
    """Return the names of all instances of a file for a type of data."""
    itemsize = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}[dtype]
    widths, both = (vector_width(itemsize), 1), (False, True)
    found = [centered_squares()] if dtype == "float64" else []
    for width, columns in itertools.product(widths, both):
        found.append(statistics(dtype, width, columns))
        for residual, activation in itertools.product(both, ACTIVATIONS):
            for kernel in (normalize, reduce_gradients, input_gradient):
                found.append(kernel(dtype, width, columns, residual, activation))
        for kernel in (reduce_gradients, input_gradient):
            found.append(kernel(dtype, width, columns, False, INVERTED))
    return tuple(dict.fromkeys(name for where, name in found if where == file))


FILES = ("statistics.cu", "normalize.cu", "gradients.cu")
