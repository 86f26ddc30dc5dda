"""Synchronized batch normalization in a PyTorch program on CPUs, within torch's DistributedDataParallel.

    mpirun -n 4 python -m mpi4py scripts/examples/torch_ddp.py

A torch optimizer trains a small network for ten steps, in the two ways in which ranks share a loss:

    mean    the loss of the whole batch is the mean of the ranks' losses, and DistributedDataParallel averages
            all gradients: the layers leave theirs to it
    sum     it is the sum of the ranks' losses, and nobody else adds up gradients: a layer adds up those of
            its weight and bias, grad_reduction="sum"

The wrong choice raises no error, and its gradients are off by the number of ranks. Rank 0 does the same with
torch.nn.BatchNorm2d on the whole batch.
"""

import sys

import numpy as np
import torch
from mpi4py import MPI

from cupy_syncbn.interop.torch import convert_sync_batchnorm, init_process_group


def make_network():
    """Return a network with the same weights on all ranks."""
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4), torch.nn.ReLU()
    return torch.nn.Sequential(*layers, torch.nn.Conv2d(4, 2, 3)).double()


def train(network, x, target, reduction, outer=None, added=()):
    """Return all that ten steps leave: dx of the last one, gradients, parameters and buffers.

    `outer` is called in place of the network; gradients of the modules `added` are summed over the ranks.
    """
    x, target = torch.from_numpy(x).requires_grad_(), torch.from_numpy(target)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3 if reduction == "sum" else 0.1)
    for _ in range(10):
        x.grad = None
        optimizer.zero_grad()
        y = (outer or network)(x)
        torch.nn.functional.mse_loss(y, target, reduction=reduction).backward()
        for module in added:
            for parameter in module.parameters():
                world.Allreduce(MPI.IN_PLACE, parameter.grad.numpy())
        optimizer.step()
    gradients = {f"{name}.grad": parameter.grad for name, parameter in network.named_parameters()}
    results = {"dx": x.grad} | gradients | network.state_dict()
    return {name: tensor.numpy() for name, tensor in results.items()}


torch.set_num_threads(1)  # ranks that share cores slow each other down with more
world = MPI.COMM_WORLD
init_process_group()
rng = np.random.default_rng(0)  # draws the same on all ranks
offset = np.arange(world.size).reshape(-1, 1, 1, 1, 1)  # the ranks' batches differ
x = rng.normal(offset, 2, (world.size, 3, 3, 7, 7))
target = rng.normal(offset, 2, (world.size, 3, 2, 3, 3))

agree = True
for reduction in "mean", "sum":
    network = convert_sync_batchnorm(make_network())
    if reduction == "mean":
        sharing = {"outer": torch.nn.parallel.DistributedDataParallel(network)}
    else:
        network[1].grad_reduction = "sum"
        sharing = {"added": [network[0], network[3]]}  # the convolutions, which have no such option
    ours = train(network, x[world.rank], target[world.rank], reduction, **sharing)
    parts = world.gather(ours["dx"])
    if world.rank == 0:
        # Of the mean over all samples a rank's own mean is its share times the number of ranks.
        ours["dx"] = np.concatenate(parts) / (world.size if reduction == "mean" else 1)
        theirs = train(make_network(), np.concatenate(x), np.concatenate(target), reduction)
        print(
            f"{reduction}, {world.size} rank(s), from torch.nn.BatchNorm2d on the whole batch (1e-9 allowed):"
        )
        for name, expected in theirs.items():
            deviation = float(abs(ours[name] - expected).max() / abs(expected).max())
            agree &= deviation <= 1e-9
            print(f"  {name}: {deviation:.1e}")
torch.distributed.destroy_process_group()
if world.rank == 0:
    sys.exit(not agree)
