"""Synchronized batch normalization in a JAX program on CPUs, under jax.jit and jax.grad.

    mpirun -n 4 python -m mpi4py scripts/examples/jax_jit.py

The running statistics go in and come out, as flax and equinox keep them. Rank 0 compares with jax.grad
through a batch normalization in jax.numpy, on the whole batch.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from mpi4py import MPI

from cupy_syncbn.interop.jax import init_state, sync_batch_norm


def plain_bn(x, weight, bias, state):
    """Do the same in one process, by what JAX differentiates itself."""
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    y = (x - mean[:, None, None]) / jnp.sqrt(var[:, None, None] + 1e-5)
    unbiased = var * x.size / (x.size - x.shape[1])
    new = [0.9 * old + 0.1 * value for old, value in zip(state[:2], (mean, unbiased), strict=True)]
    return y * weight[:, None, None] + bias[:, None, None], state._replace(mean=new[0], var=new[1])


def train_step(bn, x, target, weight, bias):
    """Return what a step of two layers leaves: y, the gradients of the sum of squares, running statistics."""

    def loss(x, weight, bias, states):
        h, first = bn(x, weight, bias, states[0])
        y, second = bn(jax.nn.relu(h), weight, bias, states[1])
        # A sum: the ranks' losses add up to that of the whole batch.
        return ((y - target) ** 2).sum(), (y, first, second)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, (y, _, state)), gradients = step(x, weight, bias, [init_state(4), init_state(4)])
    return [np.asarray(array) for array in (y, *gradients, state.mean, state.var)]


def synchronized(*arrays):
    """Add up the gradients of weight and bias too, as nobody else does here."""
    return sync_batch_norm(*arrays, grad_reduction="sum")


world = MPI.COMM_WORLD
rng = np.random.default_rng(0)  # draws the same on all ranks
offset = np.arange(world.size).reshape(-1, 1, 1, 1, 1)  # the ranks' batches differ
x, target = (np.float32(rng.normal(offset, 2, (world.size, 3, 4, 5, 5))) for _ in range(2))
weight, bias = (np.float32(rng.uniform(0.5, 1.5, 4)) for _ in range(2))

y, dx, *others = train_step(synchronized, x[world.rank], target[world.rank], weight, bias)
parts = world.gather((y, dx))
if world.rank == 0:
    ours = [*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)), *others]
    theirs = train_step(plain_bn, np.concatenate(x), np.concatenate(target), weight, bias)
    print(f"{world.size} rank(s), from jax.numpy on the whole batch, tolerance 1e-05:")
    agree = True
    names = "y", "dx", "dweight", "dbias", "running_mean", "running_var"
    for name, array, expected in zip(names, ours, theirs, strict=True):
        deviation = float(abs(array - expected).max() / abs(expected).max())
        agree &= deviation <= 1e-5
        print(f"  {name}: {deviation:.1e}")
    sys.exit(not agree)
