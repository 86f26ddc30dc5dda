"""Many healthy calls, of all lengths, and no error; the memory of the ranks at several times.

    soak.py CALLS

Rank 0 prints for each tenth of the calls the greatest resident memory of a rank in MiB.
"""

import os
import sys
from pathlib import Path

import numpy as np
from mpi4py import MPI

from cupy_syncbn import SyncBatchNorm, sync_batch_norm
from support.nodes import pretend

SIZES = [1, 2, 3, 5, 8, 13, 64, 100, 256, 1000, 1024, 4096, 33_000]


def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main(calls):
    world = MPI.COMM_WORLD
    common, own = np.random.default_rng(0), np.random.default_rng((1, world.rank))
    layers = [SyncBatchNorm(size, name=f"layer {size}") for size in SIZES]
    done = tenths = 0
    while done < calls:
        layer = layers[common.integers(len(layers))]
        n = int(own.integers(0, 4))
        x = own.normal(5, 2, size=(n, layer.num_features)).astype("f4")
        if common.random() < 0.8:
            layer.backward(layer(x))
            layer.zero_grad()
            done += 2
        else:
            sync_batch_norm(x.astype("f8"), call=None)
            done += 2
        if done * 10 // calls > tenths:
            tenths = done * 10 // calls
            most = world.allreduce(resident(), MPI.MAX)
            if world.rank == 0:
                print(f"memory {most:.2f}", flush=True)


if __name__ == "__main__":
    pretend()
    main(int(sys.argv[1]))
