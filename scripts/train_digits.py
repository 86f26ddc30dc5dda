"""Train a small convolutional network on handwritten digits, data-parallel, in three ways side by side.

    mpirun -n 4 python -m mpi4py scripts/train_digits.py
    python scripts/train_digits.py

Every batch is split over the ranks, a few images each: by default, one for each of 4 ranks. The three ways
start from the same weights and see the same images in the same order. They differ in whose mean and variance
normalize an image (on a single rank they do not differ):

* local BatchNorm: those of the few images of its own rank;
* SyncBatchNorm: those of the whole batch, which the ranks exchange;
* one process: rank 0 computes the whole batch alone. This is what SyncBatchNorm has to reproduce.

Rank 0 prints test accuracy and loss of each way, and how far its training losses are from those of the
single process. For SyncBatchNorm that must be rounding and nothing else: if not, the exit status is 1.

Training amplifies rounding, most where it decides on which side of zero the input of a ReLU is. In float64
that is too rare to matter: in the default run the losses stay within about 1e-12, and must agree within 1e-9
for 2000 steps. In float32 it happens every few hundred steps, and the runs part: the losses stay within about
1e-6 until then, and must agree within 1e-3 for 20 steps, in which local BatchNorm is off by 1e-1.
"""

import os

# One BLAS thread a rank: the matrices are small, and ranks that share cores slow each other down with more.
# BLAS reads this while NumPy is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import sys
import time

import numpy as np
from sklearn.datasets import load_digits
from tqdm import tqdm

import cupy_syncbn as syncbn

TEST_IMAGES = 299  # of 1797; the other 1498 leave a last batch that has fewer images than ranks
MOMENTUM = 0.9

# dtype: the largest difference between the losses of SyncBatchNorm and of one process, and in how many steps
AGREEMENT = {"float64": (1e-9, 2000), "float32": (1e-3, 20)}


class Conv2d(syncbn.Module):
    """3 × 3 convolution, padding 1. No bias: the normalization that follows would take it out again."""

    def __init__(self, xp, weight, stride=1):
        self.xp, self.weight, self.stride = xp, syncbn.Parameter(weight), stride

    def taps(self, padded):
        """Return nine shifted views of the padded images: what each of the nine weights is multiplied by."""
        H, W, step = padded.shape[2] - 2, padded.shape[3] - 2, self.stride
        return [padded[:, :, i : i + H : step, j : j + W : step] for i in range(3) for j in range(3)]

    def forward(self, x):
        """Gather what each output depends on in a column; one matrix product does the rest (im2col)."""
        N, C, H, W = x.shape
        padded = self.xp.zeros((N, C, H + 2, W + 2), x.dtype)
        padded[:, :, 1:-1, 1:-1] = x
        columns = self.xp.stack(self.taps(padded), axis=2)  # (N, C, 9, H, W), H and W those of the output
        self.padded_shape, self.gathered_shape = padded.shape, columns.shape
        H, W = columns.shape[3:]
        self.columns = columns.reshape(N, C * 9, H * W)
        weight = self.weight.data
        return (weight.reshape(len(weight), C * 9) @ self.columns).reshape(N, len(weight), H, W)

    def backward(self, dy):
        """Return dx: the gradient of a column goes back to the pixels that it was gathered from."""
        N, C, H, W = dy.shape
        dy = dy.reshape(N, C, H * W)
        dweight = (dy @ self.columns.swapaxes(1, 2)).sum(axis=0)
        self.weight.accumulate(dweight.reshape(self.weight.data.shape))
        dcolumns = (self.weight.data.reshape(dweight.shape).T @ dy).reshape(self.gathered_shape)
        dpadded = self.xp.zeros(self.padded_shape, dy.dtype)
        for k, tap in enumerate(self.taps(dpadded)):
            tap += dcolumns[:, :, k]
        return dpadded[:, :, 1:-1, 1:-1]


class ResidualBlock(syncbn.Module):
    """relu(x + bn2(conv2(relu(bn1(conv1(x)))))): bn2 adds the residual and applies the ReLU itself."""

    def __init__(self, conv1, bn1, conv2, bn2):
        self.conv1, self.bn1, self.conv2, self.bn2 = conv1, bn1, conv2, bn2

    def forward(self, x):
        """Return an array of the shape of x."""
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), residual=x)

    def backward(self, dy):
        """Return dx, the sum of what comes back through the convolutions and past them."""
        dy, dresidual = self.bn2.backward(dy)
        return self.conv1.backward(self.bn1.backward(self.conv2.backward(dy))) + dresidual


class Classifier(syncbn.Module):
    """The mean of each channel over the image, then a linear layer: (N, C, H, W) to logits (N, classes)."""

    def __init__(self, xp, weight, bias):
        self.xp, self.weight, self.bias = xp, syncbn.Parameter(weight), syncbn.Parameter(bias)

    def forward(self, x):
        """Return the logits."""
        self.shape = x.shape
        self.features = x.mean(axis=(2, 3))
        return self.features @ self.weight.data + self.bias.data

    def backward(self, dy):
        """Return dx, the same for all the pixels of a channel."""
        self.weight.accumulate(self.features.T @ dy)
        self.bias.accumulate(dy.sum(axis=0))
        dmean = dy @ self.weight.data.T
        return self.xp.broadcast_to(dmean[:, :, None, None] / (self.shape[2] * self.shape[3]), self.shape)


def build_network(xp, args):
    """Return the network, with local batch normalization; its weights are the same at every call."""
    rng = np.random.default_rng(args.seed)

    def weight(*shape, fan_in):  # He et al. (2015): keeps the variance through a ReLU
        return xp.asarray(rng.normal(0, (2 / fan_in) ** 0.5, shape), dtype=args.dtype)

    def conv(C_in, C_out, stride=1):
        return Conv2d(xp, weight(C_out, C_in, 3, 3, fan_in=9 * C_in), stride)

    def bn_relu(C):
        return syncbn.BatchNorm2d(C, dtype=args.dtype, device=args.device, activation="relu")

    return syncbn.Sequential(
        *(conv(1, 16), bn_relu(16)),
        ResidualBlock(conv(16, 16), bn_relu(16), conv(16, 16), bn_relu(16)),
        *(conv(16, 32, stride=2), bn_relu(32)),
        Classifier(xp, weight(32, 10, fan_in=32), xp.zeros(10, args.dtype)),
    )


def cross_entropy(xp, logits, labels):
    """Return the sum of the losses of all images, and its gradient with respect to the logits."""
    logits = logits - logits.max(axis=1, keepdims=True)
    log_p = logits - xp.log(xp.exp(logits).sum(axis=1, keepdims=True))
    target = labels[:, None] == xp.arange(10)
    return -(log_p * target).sum(), xp.exp(log_p) - target


def share(start, stop, group):
    """Return this rank's part of start:stop; the parts differ by one at most, and some may be empty."""
    count = stop - start
    return slice(start + count * group.rank // group.size, start + count * (group.rank + 1) // group.size)


class Way:
    """One way of training: a network, the ranks that share its batches, and what was measured."""

    def __init__(self, name, network, group, xp, args):
        self.name, self.network, self.group, self.xp, self.args = name, network, group, xp, args
        self.parallel = syncbn.DistributedDataParallel(network, group)
        self.parameters = list(network.parameters())
        self.velocity = [xp.zeros_like(p.data) for p in self.parameters]
        self.losses, self.tests, self.seconds = [], [], 0.0

    def train_epoch(self, images, labels, progress):
        """Take a step for each batch of images; record the loss of each whole batch."""
        started = time.perf_counter()
        self.network.train()
        starts = range(0, len(labels), self.args.batch)
        losses = self.xp.zeros(len(starts))
        for step, start in enumerate(starts):
            stop = min(start + self.args.batch, len(labels))
            mine = share(start, stop, self.group)
            loss_sum, dlogits = cross_entropy(self.xp, self.network(images[mine]), labels[mine])
            losses[step] = loss_sum / (stop - start)
            # The loss is the mean over the whole batch: each rank divides by the size of that, and the
            # gradients of the ranks add up, however unequal their shares. DistributedDataParallel takes the
            # mean over the ranks instead: times their number, that is the sum.
            self.network.zero_grad()
            self.network.backward(dlogits * (self.group.size / (stop - start)))
            self.parallel.reduce_gradients()
            for p, velocity in zip(self.parameters, self.velocity, strict=True):
                velocity *= MOMENTUM
                velocity += p.grad
                p.data -= self.args.lr * velocity
            progress.update()
        self.group.allreduce(losses)  # from each rank's share of them
        self.losses.extend(losses.tolist())
        self.seconds += time.perf_counter() - started

    def evaluate(self, images, labels):
        """Record loss and accuracy on the test images, which running statistics normalize."""
        # Local BatchNorm leaves others on each rank: take those of rank 0, which would be saved with the
        # network, as torch's DistributedDataParallel does. Those of SyncBatchNorm are the same everywhere.
        for buffer in self.network.buffers():
            self.group.broadcast(buffer, 0)
        self.network.eval()
        mine = share(0, len(labels), self.group)
        logits = self.network(images[mine])
        loss_sum, _ = cross_entropy(self.xp, logits, labels[mine])
        correct = (logits.argmax(axis=1) == labels[mine]).sum()
        sums = self.xp.stack([loss_sum, correct]).astype("float64")
        self.group.allreduce(sums)
        self.tests.append((sums / len(labels)).tolist())


def report(ways, args):
    """Print the table; return whether SyncBatchNorm agrees with the single process."""
    _, sync, single = ways
    steps = len(single.losses) // args.epochs
    print(f"{args.epochs} epochs of {steps} batches of {args.batch} images,", end=" ")
    print(f"{args.dtype} on {args.device}, {sync.group.size} rank(s)\n")
    print(f"{'':15}  test accuracy  test loss  train loss  difference  seconds")
    for way in ways:
        way.difference = np.abs(np.subtract(way.losses, single.losses))
        test_loss, test_accuracy = way.tests[-1]
        print(f"{way.name:15}  {test_accuracy:13.1%}  {test_loss:9.4f}", end="  ")
        print(f"{np.mean(way.losses[-steps:]):10.4f}  {way.difference.max():10.1e}  {way.seconds:7.1f}")
    print("(train loss: mean of the last epoch; difference: from the loss of one process, at most)")
    print("From machine to machine the seconds differ, and on several ranks the row of local BatchNorm:")
    print("training by the statistics of few images amplifies rounding.\n")
    tolerance, checked = AGREEMENT[args.dtype]
    difference = sync.difference[:checked]
    agrees = bool(difference.max() <= tolerance)  # NaN does not
    print(f"SyncBatchNorm, one process: {difference.max():.1e} apart in {len(difference)} losses,", end=" ")
    print(f"tolerance {tolerance:.0e}: they {'agree' if agrees else 'DO NOT AGREE'}", flush=True)
    return agrees


def why_no_picture(path):
    """Return why no picture can be drawn there, or nothing: better before the training than after it."""
    existed = os.path.exists(path)
    try:
        import matplotlib.figure  # noqa: F401

        with open(path, "ab"):
            pass
    except (ImportError, OSError) as error:
        return f"--plot {path}: {error}; name another file, or '' for no picture"
    if not existed:
        os.remove(path)
    return ""


def plot(path, ways, epochs):
    """Draw the curves."""
    from matplotlib.figure import Figure  # needs no display

    figure = Figure(figsize=(13, 4), layout="constrained")
    loss, accuracy, difference = figure.subplots(1, 3)
    epoch = np.arange(1, epochs + 1)
    styles = [{"color": "C1"}, {"color": "C0", "ls": "--"}, {"color": "0.75", "lw": 5, "zorder": 1}]
    for way, style in zip(ways, styles, strict=True):
        loss.plot(epoch, np.reshape(way.losses, (epochs, -1)).mean(axis=1), label=way.name, **style)
        accuracy.plot(epoch, [test_accuracy for _, test_accuracy in way.tests], **style)
        difference.plot(np.where(way.difference > 0, way.difference, np.nan), color=style["color"], lw=0.8)
    loss.set(title="training loss", xlabel="epoch", xticks=epoch, yscale="log")
    accuracy.set(title="test accuracy", xlabel="epoch", xticks=epoch, ylim=(0, 1.02))
    difference.set(title="difference from one process's loss", xlabel="step", yscale="log")
    loss.legend()
    figure.savefig(path, format="png", dpi=120)
    print(f"the curves: {os.path.abspath(path)}")


def parse_arguments():
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--epochs", type=int, default=4, help="passes over the training images (%(default)s)")
    add("--batch", type=int, default=4, help="images in a step, over all ranks (%(default)s)")
    add("--lr", type=float, default=0.01, help="learning rate (%(default)s)")
    add("--dtype", choices=AGREEMENT, default="float64", help="of weights and images (%(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (%(default)s)")
    add("--seed", type=int, default=0, help="of the weights and the order of the images (%(default)s)")
    add("--plot", default="train_digits.png", help="where to draw the curves (%(default)s; '' for nowhere)")
    args = parser.parse_args()
    if args.epochs < 1 or args.batch < 1:
        parser.error("--epochs and --batch must be at least 1")
    return args


def main():
    """Train in the three ways, an epoch of each in turn; return the exit status."""
    args = parse_arguments()
    xp = np
    if args.device == "cuda":
        import cupy as xp

        syncbn.bind_device()  # the GPU of this rank
    group = syncbn.default_group()

    reason = why_no_picture(args.plot) if args.plot and group.rank == 0 else ""
    if group.allreduce(np.array([float(bool(reason))])).item():
        if reason:
            print(reason, file=sys.stderr)
        return 2

    rng = np.random.default_rng(args.seed)  # draws the same on all ranks
    images, labels = load_digits(return_X_y=True)
    test, train = np.split(rng.permutation(len(labels)), [TEST_IMAGES])
    images = xp.asarray(images.reshape(-1, 1, 8, 8) / 16, dtype=args.dtype)
    labels, test = xp.asarray(labels), xp.asarray(test)

    local, sync = build_network(xp, args), syncbn.convert_sync_batchnorm(build_network(xp, args))
    ways = [Way("local BatchNorm", local, group, xp, args), Way("SyncBatchNorm", sync, group, xp, args)]
    if group.rank == 0:  # meanwhile the others wait for it in their next exchange
        ways.append(Way("one process", build_network(xp, args), syncbn.SingleProcessGroup(), xp, args))

    total = args.epochs * len(ways) * -(-len(train) // args.batch)
    silent = {} if group.rank == 0 else {"disable": True}  # else TQDM_DISABLE decides
    with tqdm(total=total, unit="step", mininterval=0.5, **silent) as progress:
        for _ in range(args.epochs):
            order = xp.asarray(rng.permutation(train))
            for way in ways:
                progress.set_description(way.name, refresh=False)
                way.train_epoch(images[order], labels[order], progress)
                way.evaluate(images[test], labels[test])

    if group.rank != 0:
        return 0
    agrees = report(ways, args)
    if args.plot:
        plot(args.plot, ways, args.epochs)
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
