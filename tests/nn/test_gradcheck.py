"""Gradients against differences of the loss, in float64: over all modes, reductions, epilogues and layouts.

The loss is ``Σ dy y`` over all ranks. Along a random direction it changes by the product of that with the
gradient, which is compared for each argument by itself: about the arithmetic it assumes nothing.
"""

import contextlib
import itertools

import numpy as np
import pytest

from cupy_syncbn import SyncBatchNorm, frozen_statistics, no_backward
from cupy_syncbn.backends import backend_of
from support.arrays import random_array, random_batch, random_channels

C, STEP, TOLERANCE = 3, 1e-6, 2e-7

MODES = [
    "training",
    "without statistics",
    "frozen",
    "evaluation",
    "evaluation, own statistics",
    "untracked later",
]
REDUCTIONS = ["none", "sum", "mean"]
ACTIVATIONS = [None, "relu", ("leaky_relu", 0.3)]
SPATIAL = [(), (2, 3)]
SPLITS = ["even", "uneven", "empty", "first_empty"]
FACTORS = [
    ACTIVATIONS,
    [False, True],
    [False, True],
    [False, True],
    SPATIAL,
]  # residual, affine, channels last
COUNTS = {"cpu": {1: 1, 2: 2, 3: 4}, "cuda": {1: 12, 2: 24, 3: 48}}
"""Of how many cases one is checked, by engine and number of ranks."""


def cases(mode, reduction, device, ranks):
    """Return what this test checks; each combination has a number that also says which split it takes."""
    each = COUNTS[device][min(ranks, 3)]
    offset = MODES.index(mode) + len(MODES) * REDUCTIONS.index(reduction)
    for number, case in enumerate(itertools.product(*FACTORS)):
        if (number + offset) % each == 0:
            yield case, SPLITS[(number // each + offset) % len(SPLITS)]


def as_layout(array, last):
    return np.ascontiguousarray(np.moveaxis(array, 1, -1)) if last else array


def make(rng, world, mode, reduction, case, device):
    """Return a layer of random parameters and, on each rank, statistics of its own."""
    activation, _, affine, last, _ = case
    layer = SyncBatchNorm(
        C, dtype="float64", affine=affine, activation=activation, channels_last=last, device=device,
        grad_reduction=reduction,
        track_running_stats=mode not in ("without statistics", "evaluation, own statistics"),
    )  # fmt: skip
    if affine:
        for parameter, values in zip(
            (layer.weight, layer.bias), random_channels(rng, C, "float64"), strict=True
        ):
            parameter.data[...] = there(values, device)
    if layer.running_mean is not None:
        layer.running_mean[...] = there(rng.normal(size=C) + world.rank, device)
        layer.running_var[...] = there(rng.uniform(0.5, 2, C) * (1 + world.rank), device)
    layer.train(not mode.startswith("evaluation"))
    if mode == "untracked later":
        layer.track_running_stats = False
    return layer


def there(array, device):
    if device == "cpu":
        return array
    import cupy

    return cupy.asarray(array)


def host(array):
    return array if isinstance(array, np.ndarray | np.generic) else array.get()


def check(world, rng, mode, reduction, case, split, device):
    _, has_residual, affine, last, spatial = case
    layer = make(rng, world, mode, reduction, case, device)
    n = 12 * world.size  # no rank has a single sample, of which there is no variance
    shape, part = (n, C, *spatial), world.part(n, split)
    x, dy = random_batch(rng, shape, "float64"), random_array(rng, shape, "float64")
    arguments = {"x": x, "residual": random_array(rng, shape, "float64") if has_residual else None}
    arguments = {
        name: None if array is None else there(as_layout(array[part], last), device)
        for name, array in arguments.items()
    }
    dy = there(as_layout(dy[part], last), device)
    context = frozen_statistics(layer) if mode == "frozen" else contextlib.nullcontext()

    def loss(**changed):
        with no_backward(layer):
            return float(world.sum(host((layer(**arguments | changed) * dy).sum())))

    with context:
        layer(**arguments)
        result = layer.backward(dy)
        found = dict(zip(("x", "residual"), result if has_residual else (result,), strict=False))
        errors = {}
        scale = max(1.0, abs(loss()))
        for name, gradient in found.items():
            direction = there(as_layout(rng.normal(size=shape)[part], last), device)
            values = arguments[name]
            up, down = (loss(**{name: values + sign * STEP * direction}) for sign in (1, -1))
            expected = float(world.sum(host((gradient * direction).sum())))
            errors[name] = abs((up - down) / (2 * STEP) - expected) / scale
        for name in ("weight", "bias") if affine else ():
            parameter, direction = getattr(layer, name), there(rng.normal(size=C), device)
            values = parameter.data.copy()
            changes = []
            for sign in 1, -1:
                parameter.data[...] = values + sign * STEP * direction
                changes.append(loss())
            parameter.data[...] = values
            product = float(host((parameter.grad * direction).sum()))
            expected = {
                "none": lambda p: float(world.sum(p)),
                "sum": lambda p: p,
                "mean": lambda p: p * world.size,
            }
            errors[name] = abs((changes[0] - changes[1]) / (2 * STEP) - expected[reduction](product)) / scale
            if reduction != "none":
                world.assert_same(host(parameter.grad))
    wrong = {name: error for name, error in errors.items() if not error < TOLERANCE}
    assert not wrong, (case, split, wrong)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_gradients_are_those_of_differences(request, world, rng, device, mode, reduction):
    if device == "cuda":
        request.getfixturevalue("cupy")
    for case, split in cases(mode, reduction, device, world.size):
        check(world, rng, mode, reduction, case, split, device)


def test_number_of_checks(world):
    """At least 400 on one rank, 200 on two, 100 on three."""
    for ranks, least in (1, 400), (2, 200), (3, 100):
        numbers = [len(list(cases(mode, each, "cpu", ranks))) for mode in MODES for each in REDUCTIONS]
        assert sum(numbers) >= least
        assert min(numbers) > 0


def test_wrong_gradient_is_found(world, rng, monkeypatch):
    """A check that cannot fail is none: the gradient of evaluation, in a mode of training."""
    operations = backend_of(np.empty(0))
    whole = operations.input_gradient
    monkeypatch.setattr(
        operations,
        "input_gradient",
        lambda g, x, n, dx, sums, parameters, mailbox: whole(g, x, n, dx, None, parameters, mailbox),
    )
    with pytest.raises(AssertionError, match="'x'"):
        check(world, rng, "training", "none", (None, False, True, False, ()), "even", "cpu")
