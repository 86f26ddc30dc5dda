"""One sample spread over the ranks: a 3-D field in slabs, and a convolutional network that predicts it.

    mpirun -n 4 python -m mpi4py scripts/examples/domain_decomposition.py
    mpirun -n 4 python -m mpi4py scripts/examples/domain_decomposition.py --device cuda

A block of matter has a hot layer at a random depth. Heat diffuses, and every point radiates to surroundings
of temperature 1: du/dt = div grad u + 1 - u⁴. The network learns how much each point warms or cools. Each
rank holds a slab of adjacent planes. Convolutions get the planes next to it from its neighbours, by mpi4py.
The normalization needs the mean and variance of the whole field: a slab with the hot layer has others than a
cold one. Three ways to train start from the same weights and see the same fields:

* local BatchNorm: the statistics of the rank's own slab;
* SyncBatchNorm: those of the field, over all ranks;
* one process: rank 0 computes whole fields alone. This is what SyncBatchNorm has to reproduce.

Validation is in evaluation mode, on new fields; each rank uses its own running statistics. The exit status is
1 if SyncBatchNorm does not agree with one process, or if the validation error of local BatchNorm is not at
least twice as large (on a single rank all three are the same).
"""

import argparse
import sys

import numpy as np
from mpi4py import MPI

import cupy_syncbn as syncbn

PLANES, WIDTH = 24, 6  # a field: its depth, which is split, and its extent in both other directions
CHANNELS = 6
TRAINED, VALIDATED = 120, 8  # fields
TOLERANCE = 1e-10  # relative to the largest number of an array
FACTOR = 2  # between the validation errors of local BatchNorm and of one process, at least


# ---- The fields ----
def draw_field(rng):
    """Return temperatures, (PLANES, WIDTH, WIDTH): about 0.5, up to 1.3 in the hot layer, and noise."""
    noise = rng.normal(size=(PLANES, WIDTH, WIDTH))
    for axis in range(3):
        noise = (np.roll(noise, -1, axis) + 2 * noise + np.roll(noise, 1, axis)) / 4
    depth = np.arange(0.5, PLANES)[:, None, None] / PLANES
    return 0.5 + 0.8 * np.exp(-((4 * (depth - rng.uniform(0.1, 0.9))) ** 2)) + 0.05 * noise / noise.std()


def evolve(u, steps=10, dt=0.02):
    """Return the field after some time, by explicit steps; top and bottom insulate, the sides wrap around."""
    for _ in range(steps):
        change = 1 - u**4
        for axis in range(3):
            flow = np.roll(u, -1, axis) - u
            if axis == 0:
                flow[-1] = 0
            change += flow - np.roll(flow, 1, axis)
        u = u + dt * change
    return u


def draw_samples(seed, count):
    """Return pairs of a field and five times its change, each (PLANES, WIDTH, WIDTH)."""
    rng = np.random.default_rng(seed)  # draws the same on all ranks
    fields = [draw_field(rng) for _ in range(count)]
    return [(field, 5 * (evolve(field) - field)) for field in fields]


# ---- The network ----
class Slab:
    """A rank's part of the planes, and the ranks that hold those above and below."""

    def __init__(self, comm, xp):
        self.comm, self.xp = comm, xp
        self.above = comm.rank - 1 if comm.rank > 0 else MPI.PROC_NULL
        self.below = comm.rank + 1 if comm.rank < comm.size - 1 else MPI.PROC_NULL
        self.planes = slice(PLANES * comm.rank // comm.size, PLANES * (comm.rank + 1) // comm.size)

    def swap(self, top, bottom):
        """Give the neighbours a plane each, and return theirs: zeros where the field ends.

        The messages pass through the memory of the host, so that MPI need not know of GPUs.
        """
        to_above, to_below = (
            np.ascontiguousarray(plane if self.xp is np else plane.get()) for plane in (top, bottom)
        )
        from_above, from_below = np.zeros_like(to_above), np.zeros_like(to_below)
        self.comm.Sendrecv(to_above, self.above, recvbuf=from_below, source=self.below)
        self.comm.Sendrecv(to_below, self.below, recvbuf=from_above, source=self.above)
        return self.xp.asarray(from_above), self.xp.asarray(from_below)


class Conv3d(syncbn.Module):
    """3 × 3 × 3 convolution of (1, C, D, H, W): D is split over the ranks, H and W wrap around."""

    def __init__(self, slab, weight):
        self.slab, self.weight = slab, syncbn.Parameter(weight)  # (C_out, 27 C_in)

    def forward(self, x):
        """Gather the 27 values that each output depends on; one matrix product does the rest (im2col)."""
        C, D, H, W = x.shape[1:]
        padded = self.slab.xp.zeros((C, D + 2, H + 2, W + 2), x.dtype)
        padded[:, 1:-1, 1:-1, 1:-1] = x[0]
        above, below = self.slab.swap(x[0, :, :1], x[0, :, -1:])
        padded[:, :1, 1:-1, 1:-1], padded[:, -1:, 1:-1, 1:-1] = above, below
        padded[:, :, 0], padded[:, :, -1] = padded[:, :, -2], padded[:, :, 1]
        padded[..., 0], padded[..., -1] = padded[..., -2], padded[..., 1]
        self.padded_shape = padded.shape
        self.columns = self.slab.xp.zeros((27, C, D, H, W), x.dtype)
        for k, tap in enumerate(self.taps(padded)):
            self.columns[k] = tap
        return (self.weight.data @ self.columns.reshape(27 * C, -1)).reshape(1, -1, D, H, W)

    def backward(self, dy):
        """Return dx: each of the 27 gradients goes back where its value was taken from."""
        dy, columns = dy.reshape(dy.shape[1], -1), self.columns
        self.weight.accumulate(dy @ columns.reshape(-1, dy.shape[1]).T)
        dcolumns = (self.weight.data.T @ dy).reshape(columns.shape)
        dpadded = self.slab.xp.zeros(self.padded_shape, dy.dtype)
        for k, tap in enumerate(self.taps(dpadded)):
            tap += dcolumns[k]
        dpadded[..., 1] += dpadded[..., -1]
        dpadded[..., -2] += dpadded[..., 0]
        dpadded[:, :, 1] += dpadded[:, :, -1]
        dpadded[:, :, -2] += dpadded[:, :, 0]
        dpadded = dpadded[:, :, 1:-1, 1:-1]
        # The gradients of the neighbours' planes belong there, and those of this rank's come back.
        from_above, from_below = self.slab.swap(dpadded[:, :1], dpadded[:, -1:])
        dx = dpadded[:, 1:-1]
        dx[:, :1] += from_above
        dx[:, -1:] += from_below
        return dx[None]

    @staticmethod
    def taps(padded):
        """Return 27 shifted views of the padded slab: what each of the 27 weights is multiplied by."""
        D, H, W = (size - 2 for size in padded.shape[1:])
        return [padded[:, i : i + D, j : j + H, k : k + W] for i, j, k in np.ndindex(3, 3, 3)]


def make_network(slab, seed):
    """Return a network with local batch normalization; its weights are the same at every call."""
    rng, device = np.random.default_rng(seed), "cpu" if slab.xp is np else "cuda"
    layers = []
    for C_in, C_out in ((1, CHANNELS), (CHANNELS, CHANNELS), (CHANNELS, 1)):
        norm = syncbn.BatchNorm3d(C_out, dtype="float64", device=device, activation="relu")
        weight = rng.normal(0, (2 / (27 * C_in)) ** 0.5, (C_out, 27 * C_in))
        layers += [Conv3d(slab, slab.xp.asarray(weight)), norm]
    return syncbn.Sequential(*layers[:-1])  # the prediction comes from the last convolution


# ---- Training ----
class Way:
    """One way of training: a network, the ranks that share a field, and what was measured."""

    def __init__(self, name, network, slab, group):
        self.name, self.network, self.slab, self.group = name, network, slab, group
        self.parallel = syncbn.DistributedDataParallel(network, group)
        self.parameters = list(network.parameters())
        self.velocity = [slab.xp.zeros_like(p.data) for p in self.parameters]

    def deviation(self, sample):
        """Return what the network predicts for this rank's slab, less what is right."""
        field, change = (self.slab.xp.asarray(part[self.slab.planes]) for part in sample)
        return self.network(field[None, None]) - change

    def mean_square(self, deviation):
        """Return the mean square over the whole field."""
        total = self.group.allreduce((deviation**2).sum().reshape(1))
        return total.item() / (PLANES * WIDTH * WIDTH)

    def train(self, samples, learning_rate=0.02, momentum=0.9):
        """Take a step for each field."""
        self.network.train()
        self.losses = []
        for step, sample in enumerate(samples):
            deviation = self.deviation(sample)
            self.losses.append(self.mean_square(deviation))
            # The loss is a mean over the whole field: divided by all its points, the gradients of the ranks
            # add up. reduce_gradients takes their mean: times the number of ranks, that is the sum.
            self.network.zero_grad()
            self.network.backward(deviation * (2 * self.group.size / (PLANES * WIDTH * WIDTH)))
            self.parallel.reduce_gradients()
            for p, velocity in zip(self.parameters, self.velocity, strict=True):
                velocity *= momentum
                velocity += p.grad
                p.data -= learning_rate * (1 - step / len(samples)) * velocity

    def validate(self, samples):
        """Measure the error, relative to that of predicting no change: the root of the mean squares."""
        self.network.eval()
        found = sum(self.mean_square(self.deviation(sample)) for sample in samples)
        self.error = (found / sum((change**2).mean() for _, change in samples)) ** 0.5


def largest_difference(way, single):
    """Return how far losses, parameters and running statistics are from those of the single process."""
    pairs = [(np.array(way.losses), np.array(single.losses))]
    state, expected = way.network.state_dict(), single.network.state_dict()
    pairs += [(state[name], array) for name, array in expected.items()]
    return max(float(abs(mine - theirs).max() / abs(theirs).max()) for mine, theirs in pairs)


def compare(seed, xp):
    """Train in the three ways; print a table on rank 0, and return whether it shows what it should."""
    group, slab = syncbn.default_group(), Slab(MPI.COMM_WORLD, xp)
    samples, new = draw_samples([seed, 0], TRAINED), draw_samples([seed, 1], VALIDATED)
    sync = syncbn.convert_sync_batchnorm(make_network(slab, seed))
    ways = [
        Way("local BatchNorm", make_network(slab, seed), slab, group),
        Way("SyncBatchNorm", sync, slab, group),
    ]
    if group.rank == 0:  # the others go on, and wait for it in their next exchange
        whole = Slab(MPI.COMM_SELF, xp)
        ways.append(Way("one process", make_network(whole, seed), whole, syncbn.SingleProcessGroup()))
    for way in ways:
        way.train(samples)
        way.validate(new)
    if group.rank != 0:
        return True

    local, sync, single = ways
    print(f"\nseed {seed:<10}  training loss  validation error  difference")
    for way in ways:
        way.difference = largest_difference(way, single)
        print(f"{way.name:15}  {np.mean(way.losses[-10:]):13.4f}  {way.error:16.1%}  {way.difference:10.1e}")
    agree = sync.difference <= TOLERANCE
    return agree and (group.size == 1 or local.error >= FACTOR * single.error)


def main():
    """Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (%(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many trainings of each way (%(default)s)")
    args = parser.parse_args()
    world = MPI.COMM_WORLD
    if world.size > PLANES:
        parser.error(f"{PLANES} planes cannot be split over {world.size} ranks")
    xp = np
    if args.device == "cuda":
        import cupy as xp

        syncbn.bind_device()  # the GPU of this rank
    if world.rank == 0:
        print(f"{world.size} rank(s), {PLANES} planes of {WIDTH} x {WIDTH} points, {args.device}")
    good = [compare(seed, xp) for seed in range(args.seeds)]
    if world.rank == 0:
        print("(training loss: mean of the last ten; validation error: relative to predicting no change;")
        print(
            "difference: of losses, parameters and running statistics from one process, relative, at most)\n"
        )
        print(f"SyncBatchNorm is within {TOLERANCE:.0e} of one process", end="")
        if world.size > 1:
            print(f", local BatchNorm's validation error at least {FACTOR} times as large", end="")
        print(": yes" if all(good) else ": NO")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
