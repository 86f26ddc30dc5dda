"""Padded sequences: only the valid positions are normalized, `bn(x[mask])`, however many a rank has.

    mpirun -n 4 python -m mpi4py scripts/examples/masked_batch.py

Sequences of unequal lengths are padded to one length. A mask tells which positions are valid; it makes
(sequences, length, C) an array of (valid positions, C), and brings the result back. Ranks have unequal
numbers of valid positions, and of three or more the last has none. Rank 0 compares with one process.
"""

import contextlib
import sys

import numpy as np
from mpi4py import MPI

import cupy_syncbn as syncbn

SEQUENCES, LENGTH, C = 3, 10, 5  # of a rank


def draw(rank, size):
    """Return a rank's padded sequences, its mask and dy; the padding is 99, which must not matter."""
    rng = np.random.default_rng(rank)
    lengths = rng.integers(1, LENGTH + 1, SEQUENCES) * (size < 3 or rank < size - 1)
    mask = np.arange(LENGTH) < lengths[:, None]  # (SEQUENCES, LENGTH)
    x, dy = rng.normal(rank, 1 + rank, (2, SEQUENCES, LENGTH, C))
    x[~mask] = 99
    return x, mask, dy


def step(bn, x, mask, dy):
    """Return y and dx, zero where the mask is; the gradients of weight and bias are those of the loss."""
    y, dx = np.zeros_like(x), np.zeros_like(x)
    y[mask] = bn(x[mask])  # (valid positions, C)
    dx[mask] = bn.backward(dy[mask])
    return y, dx


with contextlib.suppress(ModuleNotFoundError, RuntimeError):  # there is no CuPy, or no GPU
    syncbn.bind_device()
world = MPI.COMM_WORLD
bn = syncbn.SyncBatchNorm(C, dtype="float64", grad_reduction="sum")
parts = [np.asarray(part, like=bn.weight.data) for part in draw(world.rank, world.size)]
y, dx = step(bn, *parts)

results = [*parts, y, dx, bn.weight.grad, bn.bias.grad, bn.running_mean, bn.running_var]
ranks = world.gather([each if isinstance(each, np.ndarray) else each.get() for each in results])
if world.rank == 0:
    x, mask, dy, y, dx = (np.concatenate(parts) for parts in list(zip(*ranks, strict=True))[:5])
    whole = syncbn.BatchNorm1d(C, dtype="float64", device="cpu")
    expected = {}
    expected["y"], expected["dx"] = step(whole, x, mask, dy)
    expected |= {"dweight": whole.weight.grad, "dbias": whole.bias.grad}
    expected |= {"running_mean": whole.running_mean, "running_var": whole.running_var}
    counts = [int(part[1].sum()) for part in ranks]
    print(f"{world.size} rank(s) with {counts} valid positions, from one process, tolerance 1e-12:")
    agree = True
    for (name, right), ours in zip(expected.items(), [y, dx, *ranks[0][5:]], strict=True):
        deviation = float(abs(ours - right).max() / abs(right).max())
        agree &= deviation <= 1e-12
        print(f"  {name}: {deviation:.1e}")
    sys.exit(not agree)
