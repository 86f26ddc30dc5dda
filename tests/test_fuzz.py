"""Drawn cases: both engines against the reference, on this rank's part of a batch.

All ranks draw the same cases, and find the same one wrong: so they shrink it together. `--fuzz-cases N` runs
N of them instead of few.
"""

import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from cupy_syncbn import sync_batch_norm, sync_batch_norm_backward
from support.arrays import DTYPES
from support.reference import BatchNorm

CASES = 60
SPECIAL = (np.nan, np.inf, -np.inf)
KINDS = ("normal", "offset", "constant", "outlier", "huge", "tiny", "subnormal", "special")
STRETCHES = ("contiguous", "swapped", "strided", "reversed")

# Relative to what the terms of a result add up to: what float32 and float64 leave of it.
ROUNDING = {8: 1e-13, 4: 3e-6, 2: 3e-6}


class Case(NamedTuple):
    """What is drawn."""

    shape: tuple[int, ...]
    dtypes: str
    kind: str
    seed: int
    shares: list[int]
    stretch: str
    channels_last: bool
    activation: Any
    residual: bool
    affine: bool
    training: bool
    momentum: float | None
    eps: float


SIZES = st.sampled_from([1, 2, 3, 5, 7, 8, 16, 31, 33])
SPATIAL = st.one_of(
    st.lists(st.sampled_from([1, 2, 3, 4, 7, 9]), max_size=3), st.sampled_from([[257], [130, 5], [0], [1030]])
)

cases = st.builds(
    lambda n, c, spatial, **drawn: Case(shape=(n, c, *spatial), **drawn),
    n=st.sampled_from([0, 1, 2, 3, 6, 11]),
    c=SIZES,
    spatial=SPATIAL,
    dtypes=st.sampled_from(list(DTYPES)),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32 - 1),
    shares=st.lists(st.sampled_from([0, 1, 1, 2, 5]), min_size=1, max_size=4),
    stretch=st.sampled_from(STRETCHES),
    channels_last=st.booleans(),
    activation=st.sampled_from([None, "relu", "leaky_relu", ("leaky_relu", 0.3)]),
    residual=st.booleans(),
    affine=st.booleans(),
    training=st.sampled_from([True, True, True, False]),
    momentum=st.sampled_from([None, 0.0, 0.1, 1.0]),
    eps=st.sampled_from([1e-5, 1e-3, 1e-12]),
)


def draw_values(case, rng, dtype):
    """Return data of a kind, channels first; and the channel that has what is not finite, or None."""
    shape, channels = case.shape, case.shape[1]
    per_channel = (1, channels, *[1] * (len(shape) - 2))
    x = rng.normal(size=shape) * rng.uniform(0.3, 3, per_channel)
    limit = float(np.finfo(np.float16).max) / 8 if dtype == np.float16 else 1e30
    if case.kind in ("normal", "special"):
        x += rng.normal(0, 2, per_channel)
    elif case.kind == "offset":
        x += rng.choice([-1, 1], per_channel) * min(limit, 10.0 ** rng.integers(2, 6))
    elif case.kind == "constant":
        x = np.broadcast_to(rng.normal(0, 5, per_channel), shape).copy()
    elif case.kind == "outlier" and x.size:
        x.reshape(-1)[rng.integers(x.size)] = min(limit, 1e4)
    elif case.kind == "huge":
        x *= limit / 10
    elif case.kind == "tiny":
        x *= 1e-4 if dtype == np.float16 else 1e-20
    elif case.kind == "subnormal":
        x *= 1e-6 if dtype == np.float16 else 1e-40
    dirty = None
    if case.kind == "special" and x.size:
        at = tuple(rng.integers(size) for size in shape)
        x[at] = rng.choice(SPECIAL)
        dirty = at[1]
    return x.astype(dtype), dirty


def stretched(xp, a, how):
    """Return an equal array of another memory layout."""
    a = xp.asarray(a)
    if how == "swapped":
        order = [0, *range(2, a.ndim), 1]
        return xp.ascontiguousarray(a.transpose(order)).transpose([0, a.ndim - 1, *range(1, a.ndim - 1)])
    if how == "strided":
        wide = xp.zeros((*a.shape[:-1], 2 * a.shape[-1] + 1), a.dtype)
        wide[..., 1::2] = a
        return wide[..., 1::2]
    if how == "reversed":
        return xp.ascontiguousarray(a[::-1])[::-1]
    return a


def part_of(world, case):
    """Return this rank's slice of the batch."""
    shares = [case.shares[rank % len(case.shares)] for rank in range(world.size)]
    if not any(shares):
        shares = [1] * world.size
    ends = np.rint(case.shape[0] * np.cumsum([0, *shares]) / sum(shares)).astype(int)
    return slice(*ends[world.rank : world.rank + 2])


def run(xp, case, part, arrays, x, r, dy, channel_last):
    """Return y, dx, dresidual, dweight, dbias, running_mean, running_var of an engine, on the host."""

    def give(a):
        if a is None:
            return None
        a = a[part]
        if channel_last:
            a = np.moveaxis(a, 1, -1)
        return stretched(xp, np.ascontiguousarray(a), case.stretch)

    def host(a):
        return a if a is None or xp is np else a.get()

    def first(a):
        return a if a is None or not channel_last else np.moveaxis(a, -1, 1)

    own = {name: xp.asarray(a.copy()) for name, a in arrays.items()}
    y, saved = sync_batch_norm(
        give(x), **own, training=case.training, momentum=case.momentum, eps=case.eps,
        channels_last=channel_last, activation=case.activation, residual=give(r),
    )  # fmt: skip
    gradients = sync_batch_norm_backward(give(dy), saved)
    maps = [first(host(a)) for a in (y, gradients.x, gradients.residual)]
    rest = [gradients.weight, gradients.bias, own["running_mean"], own["running_var"]]
    return [*maps, *map(host, rest)]


def expect(case, arrays, x, r, dy):
    """Return what a run should give over the whole batch, and how far from it each value may be."""
    dtype, _ = DTYPES[case.dtypes]
    channels = case.shape[1]
    reference = BatchNorm(
        channels, eps=case.eps, momentum=case.momentum, affine=case.affine, activation=case.activation,
        dtype=np.longdouble,
    )  # fmt: skip
    for name, array in arrays.items():
        setattr(reference, name, array.astype(np.longdouble))
    reference.num_batches_tracked = 0
    reference.training = case.training
    y = reference.forward(x, r)
    gradients = reference.backward(dy)
    dx, dresidual = gradients if case.residual else (gradients, None)
    if not x.size:
        return [y, dx, dresidual, *[None] * 4], [0.0] * 7

    rounding = ROUNDING[dtype.itemsize]
    axes = reference.axes

    def size(a):
        return np.abs(a).max(axis=axes, keepdims=True)

    one = np.ones((1, channels, *[1] * (x.ndim - 2)), np.longdouble)
    w = np.abs(reference._broadcast(reference.weight)) if case.affine else one
    b = np.abs(reference._broadcast(reference.bias)) if case.affine else 0 * one
    # A mean is rounded itself, in float64.
    offset = 4e-16 * np.abs(reference.mean) / reference.std
    small = 1e-37 / reference.std  # below it there are subnormal numbers, which may count as zero
    spread = size(reference.xhat) + (offset / rounding + small / rounding)
    terms = spread * w + b + (size(r.astype(np.longdouble)) if case.residual else 0)
    if case.activation is not None:  # near zero the derivative may be that of the other side
        before = _before_activation(reference, r)
        assume(not np.any(np.abs(before) < 1e2 * rounding * terms))
    g = np.abs(np.asarray(dy).astype(np.longdouble) * reference.derivative)
    mean_g, mean_gx = (
        g.mean(axis=axes, keepdims=True),
        (g * np.abs(reference.xhat)).mean(axis=axes, keepdims=True),
    )
    mean_gx = mean_gx + mean_g * (offset / rounding + small / rounding)
    slack = [rounding * terms, rounding * (size(g) + mean_g + spread * mean_gx) * w / reference.std]
    slack += [rounding * size(g) if case.residual else None]
    total = reference.count
    slack += [rounding * (mean_gx * total).ravel(), rounding * (mean_g * total).ravel()]
    mean, var = reference.mean.ravel(), reference.var.ravel()
    deviation = np.sqrt(var) + np.abs(mean)
    slack += [rounding * (deviation + 1), rounding * (2 * var + 1) + 1e-30]
    values = [y, dx, dresidual, reference.weight_grad, reference.bias_grad]
    values += [reference.running_mean, reference.running_var]
    return values, slack


def _before_activation(reference, r):
    value = reference.xhat
    if reference.weight is not None:
        value = value * reference._broadcast(reference.weight) + reference._broadcast(reference.bias)
    return value if r is None else value + np.asarray(r).astype(np.longdouble)


def wrong(name, actual, expected, slack, dtype):
    """Return what is wrong with a result, or nothing."""
    if expected is None or actual is None or actual.size == 0:
        return ""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cast = expected.astype(dtype).astype(np.longdouble)
        actual = actual.astype(np.longdouble)
        # A unit of the last place of the result's own type, or of its subnormal numbers.
        step = {2: 2.0**-10 if dtype == np.float16 else 2.0**-7, 4: 2.0**-23, 8: 2.0**-52}[dtype.itemsize]
        least = {2: 6e-8 if dtype == np.float16 else 1e-38, 4: 1e-37, 8: 1e-300}[dtype.itemsize]
        error = np.abs(actual - expected)
        same = (actual == cast) | (np.isnan(actual) & np.isnan(cast))
        near = error <= slack + step * np.abs(expected) + least
        bad = ~(same | near)
    if not bad.any():
        return ""
    at = tuple(np.argwhere(bad)[0])
    within = np.broadcast_to(slack, bad.shape)[at]
    return f"{name}{list(at)} is {actual[at]}, expected {expected[at]} within {within}"


def check(world, xp, case):
    dtype, parameter_dtype = DTYPES[case.dtypes]
    rng = np.random.default_rng(case.seed)
    channels = case.shape[1]
    (x, dirty), r, dy = (
        draw_values(case, rng, dtype),
        rng.normal(size=case.shape),
        rng.normal(size=case.shape),
    )
    r, dy = r.astype(dtype) if case.residual else None, dy.astype(dtype)
    arrays = {
        "running_mean": rng.normal(size=channels).astype(parameter_dtype),
        "running_var": rng.uniform(0.5, 2, channels).astype(parameter_dtype),
        "num_batches_tracked": np.array(0),
    }
    if case.affine:
        arrays["weight"] = rng.uniform(0.5, 2, channels).astype(parameter_dtype)
        arrays["bias"] = rng.normal(size=channels).astype(parameter_dtype)
    count = x.size // channels
    assume(not (case.training and count == 1))  # an error in one process, and y = bias in several
    part = part_of(world, case) if case.training else slice(None)
    with np.errstate(all="ignore"):
        expected, slack = expect(case, arrays, x, r, dy)
    actual = run(xp, case, part, arrays, x, r, dy, case.channels_last and len(case.shape) > 2)
    if case.training:
        for i in 3, 4:
            if actual[i] is not None and world.size > 1:
                actual[i] = world.sum(actual[i]).astype(np.longdouble)
    clean = [c for c in range(channels) if c != dirty]
    found = ""
    names = ("y", "dx", "dresidual", "dweight", "dbias", "running_mean", "running_var")
    for i, name in enumerate(names):
        if expected[i] is None or actual[i] is None:
            continue
        axis = 1 if i < 3 else 0
        where = [
            np.take(a, clean, axis=axis) for a in (expected[i], np.broadcast_to(slack[i], expected[i].shape))
        ]
        if i < 3:
            where = [a[part] for a in where]
        kind = dtype if i < 3 else parameter_dtype
        if kind.itemsize == 2 and 3 <= i <= 4:
            continue  # the sum of the ranks' rounded gradients is not the sum rounded
        found = found or wrong(name, np.take(actual[i], clean, axis=axis), *where, kind)
    if dirty is not None and case.training and not found:
        y = actual[0][:, dirty].astype(float)
        if not np.isnan(y).all():
            found = f"channel {dirty} has what is not finite, and y is {y}"
    return found


@pytest.mark.parametrize("engine", ["numpy", "cupy"])
def test_drawn_cases(world, request, engine):
    xp = np if engine == "numpy" else request.getfixturevalue("cupy")
    number = request.config.getoption("--fuzz-cases") or CASES

    @settings(
        max_examples=number, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(cases)
    def every_case(case):
        message = check(world, xp, case)
        messages = [message for message in world.comm.allgather(message) if message]
        assert not messages, messages

    every_case()
