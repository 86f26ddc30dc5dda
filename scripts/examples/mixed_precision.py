"""float16 and bfloat16 activations, a float32 layer, and loss scaling.

    mpirun -n 4 python -m mpi4py scripts/examples/mixed_precision.py

The sum of the activations is beyond float16, which ends at 65504, and many gradients are below its smallest
number, 6e-8: so the loss is scaled. bfloat16 has the range of float32, but not the digits for such a sum.
Rank 0 compares statistics and gradients with float64 arithmetic on the whole batch.
"""

import contextlib
import sys

import numpy as np
from mpi4py import MPI

from cupy_syncbn import DistributedDataParallel, SyncBatchNorm, bind_device

dtypes = [np.dtype("float16")]
with contextlib.suppress(ModuleNotFoundError):  # ml_dtypes brings bfloat16 to NumPy
    import ml_dtypes

    dtypes.append(np.dtype(ml_dtypes.bfloat16))
with contextlib.suppress(ModuleNotFoundError, RuntimeError):  # there is no CuPy, or no GPU
    bind_device()
world = MPI.COMM_WORLD


def train_step(x, scale):
    """Return the layer after a step with the loss mean(y⁴) / 40000, and the scale that it took."""
    bn = SyncBatchNorm(x.shape[1], momentum=1.0)  # the running statistics are those of the last batch
    model, x = DistributedDataParallel(bn), np.asarray(x, like=bn.weight.data)
    while True:
        dloss = 1e-4 * model(x).astype("float32") ** 3 / x.size
        bn.zero_grad()
        with np.errstate(over="ignore"):
            model.backward((scale * dloss).astype(x.dtype))
        model.reduce_gradients()
        # An infinity of one rank is in the mean of all: either all ranks repeat the step, or none does.
        if all(np.isfinite(parameter.grad).all() for parameter in bn.parameters()):
            for parameter in bn.parameters():
                parameter.grad /= scale
            return bn, scale
        scale /= 2


def relative(actual, expected):
    """Return the largest deviation, relative to the largest number expected."""
    return float(abs(actual - np.asarray(expected, like=actual)).max() / abs(expected).max())


agree = True
for dtype in dtypes:
    mine = np.random.default_rng(world.rank).normal(300 + world.rank, 10, (8, 4, 32, 32)).astype(dtype)
    bn, scale = train_step(mine, scale=2.0**48)
    unscaled, _ = train_step(mine, scale=1.0)
    parts = world.gather(mine)
    if world.rank == 0:
        x = np.concatenate(parts).astype("float64").swapaxes(0, 1).reshape(4, -1)  # (C, samples)
        mean, var = x.mean(1), x.var(1, ddof=1)
        xhat = (x - mean[:, None]) / np.sqrt(x.var(1) + bn.eps)[:, None]
        dweight = 1e-4 * (xhat**4).mean(1) / len(x)
        statistics = relative(bn.running_mean, mean), relative(bn.running_var, var)
        gradients = [relative(layer.weight.grad, dweight) for layer in (bn, unscaled)]
        with np.errstate(over="ignore"):
            naive = np.cumsum(mine[:, 0], dtype=dtype)[-1].astype(float) / mine[:, 0].size
        agree &= all(value <= 1e-6 for value in statistics) and gradients[0] <= 1e-2
        print(f"{dtype.name}, {world.size} rank(s): mean {mean[0]:.2f}, by a {dtype.name} sum {naive:.2f}")
        print(f"  mean within {statistics[0]:.1e}, variance within {statistics[1]:.1e}, tolerance 1e-06")
        print(f"  gradient within {gradients[0]:.1e}, tolerance 1e-02, scaled by {scale:.0e};", end=" ")
        print(f"not scaled: {gradients[1]:.1e}")
sys.exit(not agree)
