"""Synchronized batch normalization within JAX, on the CPU, by jax.custom_vjp: under jax.jit and jax.grad.

    mpirun -n 4 python -m mpi4py scripts/examples/jax_custom_vjp.py

Rank 0 compares with jax.grad through a batch normalization in jax.numpy, on the whole batch.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from mpi4py import MPI

from cupy_syncbn import sync_batch_norm, sync_batch_norm_backward

# A second device brings JAX a second thread. With one alone, as where the launcher binds a rank to a core,
# a callback that runs in it would wait for ever for its arguments, which are copied in it too.
jax.config.update("jax_num_cpu_devices", 2)


def on_host(function, results, *arrays):
    """Call a function of NumPy arrays from compiled code, in the order of the program.

    The function exchanges messages, which must meet those of the other ranks. jax.pure_callback would not
    do, although the functions below are pure: XLA may leave out, repeat or reorder its calls, such as those
    of two layers that do not depend on each other, and need not do so alike on all ranks.
    """
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in results]
    # The callback uses NumPy alone: JAX's own functions could wait for the thread that it runs in.
    return io_callback(lambda *args: function(*map(np.asarray, args)), shapes, *arrays, ordered=True)


def forward(x, weight, bias):
    """Return [y]. Without running statistics there is no state to update."""
    return [sync_batch_norm(x, weight, bias)[0]]


def backward(x, weight, bias, dy):
    """Return the gradients, of weight and bias the sum over the ranks.

    What a forward saves is no array that could travel through compiled code, so it is computed once more.
    """
    _, saved = sync_batch_norm(x, weight, bias)
    return list(sync_batch_norm_backward(dy, saved, grad_reduction="sum")[:3])


@jax.custom_vjp
def sync_bn(x, weight, bias):
    """Normalize x by the statistics over all ranks."""
    return on_host(forward, [x], x, weight, bias)[0]


sync_bn.defvjp(
    lambda *arrays: (sync_bn(*arrays), arrays),
    lambda arrays, dy: tuple(on_host(backward, arrays, *arrays, dy)),
)


def plain_bn(x, weight, bias):
    """Do the same in one process, by what JAX differentiates itself."""
    mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    return (x - mean) / jnp.sqrt(var + 1e-5) * weight[:, None, None] + bias[:, None, None]


def train_step(bn, x, target, weight, bias):
    """Return y and the gradients of the sum of squares behind two layers."""

    def loss(x, weight, bias):
        y = bn(jax.nn.relu(bn(x, weight, bias)), weight, bias)
        return ((y - target) ** 2).sum(), y  # a sum: the ranks' losses add up to that of the whole batch

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(x, weight, bias)
    return [np.asarray(array) for array in (y, *gradients)]


world = MPI.COMM_WORLD
rng = np.random.default_rng(0)  # draws the same on all ranks
offset = np.arange(world.size).reshape(-1, 1, 1, 1, 1)  # the ranks' batches differ
x, target = (np.float32(rng.normal(offset, 2, (world.size, 3, 4, 5, 5))) for _ in range(2))
weight, bias = (np.float32(rng.uniform(0.5, 1.5, 4)) for _ in range(2))

y, dx, *gradients = train_step(sync_bn, x[world.rank], target[world.rank], weight, bias)
parts = world.gather((y, dx))
if world.rank == 0:
    ours = [*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)), *gradients]
    theirs = train_step(plain_bn, np.concatenate(x), np.concatenate(target), weight, bias)
    print(f"{world.size} rank(s), from jax.numpy on the whole batch, tolerance 1e-05:")
    agree = True
    for name, array, expected in zip(("y", "dx", "dweight", "dbias"), ours, theirs, strict=True):
        deviation = float(abs(array - expected).max() / abs(expected).max())
        agree &= deviation <= 1e-5
        print(f"  {name}: {deviation:.1e}")
    sys.exit(not agree)
