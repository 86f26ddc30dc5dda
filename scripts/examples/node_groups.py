"""Statistics within each node, gradients over all ranks.

    mpirun -n 4 python -m mpi4py scripts/examples/node_groups.py
    mpirun -n 4 python -m mpi4py scripts/examples/node_groups.py --ranks-per-group 2

A node's ranks together may have samples enough for good statistics, which then never cross the network. The
option divides a node further, so that a single machine has several groups. Rank 0 compares with one process
that normalizes the batch of each group.
"""

import argparse
import contextlib
import sys

import numpy as np
from mpi4py import MPI

from cupy_syncbn import BatchNorm2d, DistributedDataParallel, SyncBatchNorm, bind_device

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--ranks-per-group", type=int, help="default: all ranks of the node")
args = parser.parse_args()

with contextlib.suppress(ModuleNotFoundError, RuntimeError):  # there is no CuPy, or no GPU
    bind_device()
world = MPI.COMM_WORLD
nodes = world.allgather(MPI.Get_processor_name())  # Split_type(COMM_TYPE_SHARED) does not suit every launcher
comm = world.Split(nodes.index(nodes[world.rank]))
if args.ranks_per_group:  # split_group(n, comm=comm) does the same where n divides the node's ranks
    comm = comm.Split(comm.rank // args.ranks_per_group)

bn = SyncBatchNorm(4, process_group=comm)
model = DistributedDataParallel(bn)  # over the world: parameters are the same everywhere
rng, shape = np.random.default_rng(world.rank), (3, 4, 5, 5)  # each rank draws its own part of the batch
x, dy = (np.asarray(rng.normal(world.rank, 1, shape), "float32", like=bn.weight.data) for _ in range(2))
y = model(x)
model.backward(dy)
model.reduce_gradients()
# Running statistics are the group's: to evaluate by the same ones everywhere, broadcast those of rank 0.

parts = world.gather((comm.bcast(world.rank), x, dy, y))  # a group goes by the rank of its first
if world.rank == 0:
    names, *arrays = zip(*parts, strict=True)
    x, dy, y = map(np.concatenate, arrays)
    groups, names = set(names), np.repeat(names, len(parts[0][1]))  # of each sample
    whole, alone, expected = BatchNorm2d(4)(x), BatchNorm2d(4), np.empty_like(y)
    for name in groups:
        expected[names == name] = alone(x[names == name])
        alone.backward(dy[names == name])  # adds to the gradients of the other groups
    deviation, distance = abs(y - expected).max(), abs(y - whole).max()
    pairs = (bn.weight.grad, alone.weight.grad), (bn.bias.grad, alone.bias.grad)
    gradients = [abs(mean - total / world.size).max() for mean, total in pairs]
    print(f"{world.size} rank(s) in {len(groups)} group(s), {distance:.1e} from one group of all")
    print(f"from one process: y {deviation:.1e}, tolerance 1e-05", end="; ")
    print(f"weight.grad {gradients[0]:.1e}, bias.grad {gradients[1]:.1e}, tolerance 1e-04")
    sys.exit(not (deviation <= 1e-5 and all(value <= 1e-4 for value in gradients)))
