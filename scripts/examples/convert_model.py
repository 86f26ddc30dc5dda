"""Convert a model that was written for one process: a plain class, with layers in a dataclass, list and dict.

    mpirun -n 4 python -m mpi4py scripts/examples/convert_model.py

Rank 0 compares the converted model, whose batch is spread over the ranks, with the model as it was.
"""

import contextlib
import sys
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from cupy_syncbn import BatchNorm2d, SyncBatchNorm, bind_device, convert_sync_batchnorm


@dataclass
class Block:
    """Adds a share of the normalized input to the input."""

    share: float
    bn: BatchNorm2d


class Model:
    """Knows nothing of ranks, nor of this package's Module."""

    def __init__(self):
        self.stem = BatchNorm2d(4, activation="relu")
        self.blocks = [Block(0.5, BatchNorm2d(4)), Block(0.25, BatchNorm2d(4))]
        self.heads = {"mask": BatchNorm2d(4)}

    def forward(self, x):
        """Return an array of the shape of x."""
        x = self.stem(x)
        for block in self.blocks:
            x = x + block.share * block.bn(x)
        return self.heads["mask"](x)

    def backward(self, dy):
        """Return dx."""
        dy = self.heads["mask"].backward(dy)
        for block in reversed(self.blocks):
            dy = dy + block.bn.backward(block.share * dy)
        return self.stem.backward(dy)


with contextlib.suppress(ModuleNotFoundError, RuntimeError):  # there is no CuPy, or no GPU
    bind_device()
world, model = MPI.COMM_WORLD, Model()
weight = model.stem.weight
convert_sync_batchnorm(model)  # in place

rng, shape = np.random.default_rng(world.rank), (3, 4, 5, 5)  # each rank draws its own part of the batch
x, dy = (np.asarray(rng.normal(world.rank, 2, shape), "float32", like=weight.data) for _ in range(2))
y = model.forward(x)
dx = model.backward(dy)

parts = world.gather((x, dy, y, dx))
if world.rank == 0:
    x, dy, y, dx = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    alone = Model()  # is not converted
    deviations = abs(y - alone.forward(x)).max(), abs(dx - alone.backward(dy)).max()
    layers = [model.stem, *(block.bn for block in model.blocks), model.heads["mask"]]
    converted = sum(isinstance(layer, SyncBatchNorm) for layer in layers)
    kept = model.stem.weight is weight  # so an optimizer that holds the parameters need not know
    print(f"{converted} of {len(layers)} layers converted, parameters kept: {kept}")
    print(f"{world.size} rank(s), from one process:", end=" ")
    print(f"y {deviations[0]:.1e}, dx {deviations[1]:.1e}, tolerance 1e-05")
    sys.exit(not (converted == len(layers) and kept and all(value <= 1e-5 for value in deviations)))
