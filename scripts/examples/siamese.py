"""Two views of each sample through one network: several forwards, whose backwards come later, in any order.

    mpirun -n 4 python -m mpi4py scripts/examples/siamese.py

The loss pulls the two outputs of a sample together, so no backward can start before both forwards have ended.
The record of each forward is kept until then. A validation pass between them is within `no_backward`. Rank 0
compares the gradients with those of one process on the whole batch.
"""

import contextlib
import sys

import numpy as np

import cupy_syncbn as syncbn

SAMPLES, FEATURES, HIDDEN, OUTPUTS = 23, 8, 16, 4


class Linear(syncbn.Module):
    """(N, inputs) to (N, outputs). It keeps its input in an attribute, which a record remembers."""

    def __init__(self, weight):
        self.weight = syncbn.Parameter(weight)

    def forward(self, x):
        """Return x @ weight."""
        self.x = x
        return x @ self.weight.data

    def backward(self, dy):
        """Return dx, and add to the gradient of the weight."""
        self.weight.accumulate(self.x.T @ dy)
        return dy @ self.weight.data.T


def make_network(group):
    """Return a network with the same weights on all ranks."""
    rng = np.random.default_rng(0)
    settings = {"process_group": group, "dtype": "float64"}
    norms = [
        syncbn.SyncBatchNorm(HIDDEN, activation="relu", **settings),
        syncbn.SyncBatchNorm(HIDDEN, activation="relu", **settings),
        syncbn.SyncBatchNorm(OUTPUTS, affine=False, **settings),
    ]
    here = norms[0].weight.data  # a CuPy array where CuPy sees a GPU, else of NumPy
    shapes = [(FEATURES, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, OUTPUTS)]
    linears = [Linear(np.asarray(rng.normal(0, 0.4, shape), like=here)) for shape in shapes]
    pairs = zip(linears, norms, strict=True)
    return syncbn.DistributedDataParallel(
        syncbn.Sequential(*(layer for pair in pairs for layer in pair)), group
    )


def step(group):
    """Return the gradients of the whole batch's loss, by name, and the loss itself, as NumPy arrays."""
    network = make_network(group)
    rng = np.random.default_rng(1)  # draws the same on all ranks
    x = rng.normal(size=(SAMPLES, FEATURES))
    mine = slice(group.rank, None, group.size)  # shares may be unequal, or empty
    here = next(network.parameters()).data
    views = [np.asarray((x + rng.normal(0, 0.1, x.shape))[mine], like=here) for _ in "12"]

    outputs, records = [], []
    for view in views:
        outputs.append(network(view))
        records.append(network.take_record())
        with syncbn.no_backward(network):  # a validation pass, which a backward must not take for its forward
            network.eval()(-view)
            network.train()

    # The mean over all samples of |a - b|² / 2: its gradients are a - b and b - a. reduce_gradients takes the
    # mean over the ranks: times the number of ranks, that is the sum.
    difference = (outputs[0] - outputs[1]) / SAMPLES
    for record, dy in zip(records, (difference, -difference), strict=True):
        record.backward(dy * group.size)
    network.reduce_gradients()
    loss = group.allreduce((difference**2).sum(keepdims=True) * SAMPLES / 2)
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    results = gradients | {"loss": loss}
    return {name: array if isinstance(array, np.ndarray) else array.get() for name, array in results.items()}


with contextlib.suppress(ModuleNotFoundError, RuntimeError):  # there is no CuPy, or no GPU
    syncbn.bind_device()
group = syncbn.default_group()
ours = step(group)
if group.rank == 0:
    print(f"{group.size} rank(s), from one process on the whole batch, tolerance 1e-09:")
    agree = True
    for name, expected in step(syncbn.SingleProcessGroup()).items():
        deviation = float(abs(ours[name] - expected).max() / abs(expected).max())
        agree &= deviation <= 1e-9
        print(f"  {name}: {deviation:.1e}")
    sys.exit(not agree)
