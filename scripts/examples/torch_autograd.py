"""Synchronized batch normalization within PyTorch, on CPU tensors, by a torch.autograd.Function.

    mpirun -n 4 python -m mpi4py scripts/examples/torch_autograd.py

A torch optimizer trains it for a few steps. Rank 0 does the same by torch.nn.BatchNorm2d on the whole batch.
"""

import sys

import numpy as np
import torch
from mpi4py import MPI

from cupy_syncbn import sync_batch_norm, sync_batch_norm_backward


class SyncBatchNormFunction(torch.autograd.Function):
    """What autograd calls. The NumPy arrays are the memory of the tensors: nothing is copied."""

    @staticmethod
    def forward(ctx, x, weight, bias, layer):
        """Normalize, and update the running statistics in place."""
        tensors = x, weight, bias, layer.running_mean, layer.running_var
        y, ctx.saved = sync_batch_norm(
            *(tensor.detach().numpy() for tensor in tensors),
            num_batches_tracked=layer.num_batches_tracked.numpy(),
            training=layer.training, momentum=layer.momentum, eps=layer.eps,
        )  # fmt: skip
        return torch.from_numpy(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        """Return the gradients: of weight and bias the sum over the ranks, at no further message."""
        gradients = sync_batch_norm_backward(dy.numpy(), ctx.saved, grad_reduction="sum")
        return *map(torch.from_numpy, gradients[:3]), None


class SyncBatchNorm2d(torch.nn.BatchNorm2d):
    """Has the parameters, buffers and state dict of its base."""

    def forward(self, x):
        """Return a tensor of the shape of x."""
        return SyncBatchNormFunction.apply(x, self.weight, self.bias, self)


def train(layer, x, target):
    """Return y and dx of the last step, and all that training changes in the layer."""
    x, target = torch.from_numpy(x).requires_grad_(), torch.from_numpy(target)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    for _ in range(5):
        x.grad = None
        optimizer.zero_grad()
        y = layer(x)
        ((y - target) ** 2).sum().backward()  # a sum: the ranks' losses add up to that of the whole batch
        optimizer.step()
    gradients = {f"{name}.grad": parameter.grad for name, parameter in layer.named_parameters()}
    results = {"y": y.detach(), "dx": x.grad} | gradients | layer.state_dict()
    return {name: tensor.numpy() for name, tensor in results.items()}


torch.set_num_threads(1)  # ranks that share cores slow each other down with more
world = MPI.COMM_WORLD
rng = np.random.default_rng(0)  # draws the same on all ranks
offset = np.arange(world.size).reshape(-1, 1, 1, 1, 1)  # the ranks' batches differ
x, target = (np.float32(rng.normal(offset, 2, (world.size, 3, 4, 5, 5))) for _ in range(2))

ours = train(SyncBatchNorm2d(4), x[world.rank], target[world.rank])
parts = world.gather((ours["y"], ours["dx"]))
if world.rank == 0:
    ours["y"], ours["dx"] = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    theirs = train(torch.nn.BatchNorm2d(4), np.concatenate(x), np.concatenate(target))
    print(f"{world.size} rank(s), from torch.nn.BatchNorm2d on the whole batch, tolerance 1e-05:")
    agree = True
    for name, expected in theirs.items():
        deviation = float(abs(ours[name] - expected).max() / abs(expected).max())
        agree &= deviation <= 1e-5
        print(f"  {name}: {deviation:.1e}")
    sys.exit(not agree)
