"""A training loop written by hand: a two-layer perceptron whose batches are spread over the ranks.

    mpirun -n 4 python -m mpi4py scripts/examples/training_loop.py
    mpirun -n 4 python -m mpi4py scripts/examples/training_loop.py --checkpoint FILE

With a checkpoint it saves its state every 50 steps. Started again, it goes on from there, on any number of
ranks: so a job that a batch system ends and requeues loses little. Rank 0 repeats the training alone, on the
whole batches: its losses must be the same but for rounding.
"""

import argparse
import contextlib
import os
import sys

import numpy as np

import cupy_syncbn as syncbn

SAMPLES, FEATURES, HIDDEN, CLASSES = 50, 8, 32, 3
STEPS_BETWEEN_SAVES = 50


class Perceptron(syncbn.Module):
    """(N, 8) to logits (N, 3). The first product needs no bias: the normalization has one."""

    def __init__(self, group):
        self.bn = syncbn.SyncBatchNorm(HIDDEN, activation="relu", process_group=group, dtype="float64")
        rng = np.random.default_rng(0)
        here = self.bn.weight.data  # a CuPy array where CuPy sees a GPU, else of NumPy
        self.w1 = syncbn.Parameter(np.asarray(rng.normal(0, 0.5, (FEATURES, HIDDEN)), like=here))
        self.w2 = syncbn.Parameter(np.asarray(rng.normal(0, 0.2, (HIDDEN, CLASSES)), like=here))

    def forward(self, x):
        """Return the logits, and keep what the backward needs."""
        self.x, self.hidden = x, self.bn(x @ self.w1.data)
        return self.hidden @ self.w2.data

    def backward(self, dy):
        """Add to the gradients of all parameters."""
        self.w2.accumulate(self.hidden.T @ dy)
        self.w1.accumulate(self.x.T @ self.bn.backward(dy @ self.w2.data.T))


def save(path, network, losses):
    """Write a checkpoint, or leave the old one as it is."""
    state = network.state_dict()
    state = {name: array.get() if hasattr(array, "get") else array for name, array in state.items()}
    with open(f"{path}.new", "wb") as file:
        np.savez(file, losses=losses, **state)
    os.replace(f"{path}.new", path)


def load(path, network):
    """Take the state of a checkpoint, if there is one, and return its losses."""
    if not path or not os.path.exists(path):
        return []
    with np.load(path) as saved:
        network.load_state_dict({name: saved[name] for name in saved.files if name != "losses"})
        return saved["losses"].tolist()


def train(group, steps=200, learning_rate=0.3, checkpoint=None):
    """Return the loss of each batch."""
    network = Perceptron(group)
    losses = load(checkpoint, network)
    if losses and group.rank == 0:
        print(f"goes on from step {len(losses)} of {steps}", flush=True)
    parallel = syncbn.DistributedDataParallel(network, group)
    rng = np.random.default_rng(1)  # draws the same on all ranks
    for step in range(steps):
        x = rng.normal(size=(SAMPLES, FEATURES))
        if step < len(losses):
            continue  # the checkpoint has it
        target = np.eye(CLASSES)[np.argmax(x[:, :CLASSES] ** 2, axis=1)]
        mine = slice(group.rank, None, group.size)  # shares may be unequal, or empty
        x, target = (np.asarray(array[mine], like=network.w1.data) for array in (x, target))

        logits = parallel(x)
        logits -= logits.max(axis=1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        losses.append(group.allreduce(-(log_p * target).sum(keepdims=True) / SAMPLES).item())

        # Divided by the whole batch, the ranks' gradients add up to that of the mean loss, whatever their
        # shares. reduce_gradients takes their mean: times the number of ranks, that is the sum.
        network.zero_grad()
        parallel.backward((np.exp(log_p) - target) * (group.size / SAMPLES))
        parallel.reduce_gradients()
        for parameter in network.parameters():
            parameter.data -= learning_rate * parameter.grad
        if checkpoint and group.rank == 0 and (step + 1) % STEPS_BETWEEN_SAVES == 0:
            save(checkpoint, network, losses)
    return losses


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--steps", type=int, default=200, help="batches (%(default)s)")
parser.add_argument("--checkpoint", metavar="FILE", help="on a file system that all nodes see")
args = parser.parse_args()


with contextlib.suppress(ModuleNotFoundError, RuntimeError):  # there is no CuPy, or no GPU
    syncbn.bind_device()
group = syncbn.default_group()
losses = train(group, args.steps, checkpoint=args.checkpoint)
if group.rank == 0:
    deviation = np.abs(np.subtract(losses, train(syncbn.SingleProcessGroup(), args.steps))).max()
    print(f"{group.size} rank(s): loss {losses[0]:.3f} at first, {np.mean(losses[-10:]):.3f} at last")
    print(f"losses within {deviation:.1e} of one process's, tolerance 1e-09")
    sys.exit(not (deviation <= 1e-9 and np.mean(losses[-10:]) < losses[0] / 2))
