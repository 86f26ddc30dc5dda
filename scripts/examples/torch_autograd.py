"""Synchronized batch normalization within PyTorch, on CPU tensors, by a torch.autograd.Function.

    mpirun -n 4 python -m mpi4py scripts/examples/torch_autograd.py

A torch optimizer trains a small network for a few steps, in the two ways in which ranks share a loss:

    sum     the loss of the whole batch is the sum of the ranks' losses, and nobody else adds up gradients:
            the layer adds up those of its weight and bias, grad_reduction="sum"
    mean    it is the mean of the ranks' losses, within torch's DistributedDataParallel, which averages all
            gradients: the layer leaves its own to that, grad_reduction="none"

The wrong choice raises no error, and its gradients are off by the number of ranks. Rank 0 does the same with
torch.nn.BatchNorm2d on the whole batch.
"""

import functools
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
        tracked = layer.num_batches_tracked
        y, ctx.saved = sync_batch_norm(
            *(None if tensor is None else tensor.detach().numpy() for tensor in tensors),
            num_batches_tracked=None if tracked is None else tracked.numpy(),
            training=layer.training, momentum=layer.momentum, eps=layer.eps,
        )  # fmt: skip
        ctx.grad_reduction = layer.grad_reduction
        return torch.from_numpy(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        """Return the gradients, those of weight and bias as the layer's grad_reduction says."""
        gradients = sync_batch_norm_backward(dy.numpy(), ctx.saved, grad_reduction=ctx.grad_reduction)
        return *(None if each is None else torch.from_numpy(each) for each in gradients[:3]), None


class SyncBatchNorm2d(torch.nn.BatchNorm2d):
    """Has the parameters, buffers and state dict of its base."""

    def __init__(self, *arguments, grad_reduction, **settings):
        """Take the arguments of the base, and "sum", "mean" or "none"."""
        super().__init__(*arguments, **settings)
        self.grad_reduction = grad_reduction

    def forward(self, x):
        """Return a tensor of the shape of x."""
        return SyncBatchNormFunction.apply(x, self.weight, self.bias, self)


def make_network(norm):
    """Return a network with the same weights on all ranks."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 4, 3, bias=False)
    return torch.nn.Sequential(conv, norm(4), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3)).double()


def train(network, x, target, reduction, outer=None, added=()):
    """Return all that five steps leave: dx of the last one, gradients, parameters and buffers.

    `outer` is called in place of the network; gradients of the modules `added` are summed over the ranks.
    """
    x, target = torch.from_numpy(x).requires_grad_(), torch.from_numpy(target)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3 if reduction == "sum" else 0.1)
    for _ in range(5):
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


def start_torch_distributed():
    """Let torch's ranks be those of MPI: they meet at a port of rank 0."""
    meet = functools.partial(torch.distributed.TCPStore, world_size=world.size, wait_for_workers=False)
    host = world.bcast(MPI.Get_processor_name())
    store = meet(host, 0, is_master=True) if world.rank == 0 else None
    port = world.bcast(store and store.port)
    store = store or meet(host, port, is_master=False)
    torch.distributed.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)


torch.set_num_threads(1)  # ranks that share cores slow each other down with more
world = MPI.COMM_WORLD
start_torch_distributed()
rng = np.random.default_rng(0)  # draws the same on all ranks
offset = np.arange(world.size).reshape(-1, 1, 1, 1, 1)  # the ranks' batches differ
x = rng.normal(offset, 2, (world.size, 3, 3, 7, 7))
target = rng.normal(offset, 2, (world.size, 3, 2, 3, 3))

agree = True
for reduction, grad_reduction in ("sum", "sum"), ("mean", "none"):
    network = make_network(functools.partial(SyncBatchNorm2d, grad_reduction=grad_reduction))
    if reduction == "sum":
        sharing = {"added": [network[0], network[3]]}  # the convolutions, which have no such option
    else:
        sharing = {"outer": torch.nn.parallel.DistributedDataParallel(network)}
    ours = train(network, x[world.rank], target[world.rank], reduction, **sharing)
    parts = world.gather(ours["dx"])
    if world.rank == 0:
        # Of the mean over all samples a rank's own mean is its share times the number of ranks.
        ours["dx"] = np.concatenate(parts) / (world.size if reduction == "mean" else 1)
        whole = make_network(torch.nn.BatchNorm2d)
        theirs = train(whole, np.concatenate(x), np.concatenate(target), reduction)
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
