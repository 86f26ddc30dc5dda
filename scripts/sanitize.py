"""Run every instance of every CUDA kernel once, on small tensors, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck --error-exitcode 1 python scripts/sanitize.py

Results are compared with NumPy's in float64. Every array has its own allocation, so that a step over its end
is a step out of bounds. Kernels that have been compiled before are taken from CuPy's cache on disk:

    python scripts/sanitize.py --compile    # compiles all, in parallel; prints registers and local memory

Needs a GPU; `tests/cuda_emulator` makes similar checks without one.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from cupy_syncbn import SingleProcessGroup, sync_batch_norm, sync_batch_norm_backward
from cupy_syncbn.arrays import array_module
from cupy_syncbn.backends.cuda import kernels
from cupy_syncbn.checks import data_type

TOLERANCE = {"float64": 1e-11, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Relative to the largest magnitude of an array."""

# How the tensor is walked, in which vectors; see common.cuh. Each has work for several blocks.
WALKS = {
    "matrix, vectors": ((1500, 24), 0),  # a channel a column
    "small maps, vectors": ((60, 16, 7, 7), 0),
    "small maps, elements": ((90, 3, 5, 5), 0),
    "matrix, elements": ((1500, 24), 1),
    "rows, vectors": ((3, 3, 96, 96), 0),
    "rows, vectors with edges": ((3, 3, 71, 73), 0),
    "rows, elements": ((3, 3, 71, 73), 1),
}
"""By name: shape, and how many elements off a multiple of 16 bytes the tensors begin."""


class Run(NamedTuple):
    """A forward and backward."""

    walk: str
    dtype: str
    residual: bool
    activation: Any
    inplace: bool = False

    def __str__(self) -> str:
        how = ", in place" * self.inplace
        return f"{self.dtype}, {self.walk}, residual {self.residual}, activation {self.activation}{how}"


def runs(dtypes: Sequence[str]) -> Iterator[Run]:
    """Return all runs: every instance is in one, and all that a run has are in every fifth."""
    activations = None, "relu", ("leaky_relu", 0.1)
    variants = [*itertools.product((False, True), activations, [False]), (False, activations[-1], True)]
    for dtype, walk, variant in itertools.product(dtypes, WALKS, variants):
        yield Run(walk, dtype, *variant)


def check(cupy: Any, run: Run) -> None:
    """Run kernels, and compare what they give.

    Raises
    ------
    ArithmeticError
        If a result is wrong.
    """
    shape, offset = WALKS[run.walk]
    rng = np.random.default_rng(0)
    dtype = data_type(run.dtype)
    parameter = np.dtype("float32" if dtype.itemsize == 2 else dtype)
    x, dy, residual = (rng.normal(0.5, 2, shape).astype(dtype) for _ in range(3))
    weight, bias = (rng.normal(size=shape[1]).astype(parameter) for _ in range(2))
    weight += np.copysign(parameter.type(0.5), weight)  # errors in place grow with bias / weight

    def on_gpu(array: np.ndarray) -> Any:
        made = cupy.empty(array.size + offset, array.dtype)[offset:]
        made.set(array.ravel())
        return made.reshape(array.shape)

    outcomes = []
    for convert in (on_gpu, lambda array: array.astype("float64")):
        xp = cupy if convert is on_gpu else np
        mean, var = (convert(values.astype(parameter)) for values in (np.zeros(shape[1]), np.ones(shape[1])))
        arguments = {
            "num_batches_tracked": xp.zeros((), "int64"),
            "process_group": SingleProcessGroup(),
            "activation": run.activation,
            "residual": convert(residual) if run.residual else None,
            "inplace": run.inplace,
        }
        others = convert(weight), convert(bias), mean, var
        y, saved = sync_batch_norm(convert(x), *others, **arguments)
        gradients = sync_batch_norm_backward(convert(dy), saved)
        outcome = {"y": y, "running mean": mean.copy(), "running var": var.copy()}
        outcome |= {f"gradient of {name}": value for name, value in gradients._asdict().items()}
        y, saved = sync_batch_norm(convert(x), *others, **arguments, training=False)
        outcome |= {"y, evaluated": y, "its gradient": sync_batch_norm_backward(convert(dy), saved).x}
        outcomes.append(outcome)
    ours, expected = outcomes
    for name, value in expected.items():
        if value is None:
            continue
        found = ours[name].get().astype("float64")
        error = np.max(np.abs(found - value)) / np.max(np.abs(value))
        if not error <= TOLERANCE[run.dtype] * (4 if run.inplace else 1):
            raise ArithmeticError(f"{run}: {name} is off by {error:.1e} of its largest value")


def compile_instance(instance: tuple[str, str]) -> tuple[str, dict[str, int]]:
    """Compile a kernel, of a file and a name, and return its name and attributes."""
    from cupy_syncbn.backends.cuda import operations as cuda_operations

    return instance[1], cuda_operations._kernel(*instance).attributes


def compile_all(dtypes: Sequence[str]) -> None:
    """Compile all instances in as many processes as there are cores, and print what they take."""
    instances = [(f, name) for f in kernels.FILES for t in dtypes for name in kernels.instances(f, t)]
    # New processes, not forks: those of a process that has used CUDA cannot.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=context) as pool:
        found = dict(pool.map(compile_instance, instances))
    for name, attributes in found.items():
        print(f"{attributes['num_regs']:4} registers {attributes['local_size_bytes']:6} bytes local  {name}")
    spilled = sum(attributes["local_size_bytes"] > 0 for attributes in found.values())
    print(f"{len(found)} instances, {spilled} of them with local memory")


def main(argv: Sequence[str] | None = None) -> int:
    """Run or compile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="compile all instances, and run none")
    parser.add_argument("--dtypes", nargs="+", default=list(TOLERANCE), choices=list(TOLERANCE))
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only the first of N runs each")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        cupy = array_module("cuda")
    except (ImportError, RuntimeError) as error:
        print(f"this needs a GPU: {error}", file=sys.stderr)
        return 2
    if options.compile:
        compile_all(options.dtypes)
    else:
        cupy.cuda.set_allocator(None)  # no pool, whose blocks are larger than the arrays in them
        found = list(runs(options.dtypes))[:: options.every]
        for run in found:
            check(cupy, run)
        print(f"{len(found)} runs, all right")
    print(f"{time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
