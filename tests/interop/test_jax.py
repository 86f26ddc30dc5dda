"""The JAX function on ranks: they compute what jax.numpy does with the whole batch in one process."""

import functools
import os
import sys

import numpy as np
import pytest

from cupy_syncbn import new_group
from support.compare import relative_error
from support.launcher import REPOSITORY, clean_environment, run

jax = pytest.importorskip("jax", reason="JAX is not installed")

import jax.numpy as jnp  # noqa: E402

from cupy_syncbn.interop import jax as interop  # noqa: E402
from cupy_syncbn.interop.jax import BatchNormState, init_state, sync_batch_norm  # noqa: E402

Error = jax.errors.JaxRuntimeError
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}


@pytest.fixture(autouse=True)
def with_float64():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def batch_norm(x, weight, bias, state, *, momentum=0.1, eps=1e-5, channels_last=False):
    """Do the same in one process, by what JAX differentiates itself."""
    channel = x.ndim - 1 if channels_last else 1
    others = tuple(axis for axis in range(x.ndim) if axis != channel)
    n = x.size // x.shape[channel]
    mean, var = x.mean(others), x.var(others)
    y = (x - jnp.expand_dims(mean, others)) / jnp.sqrt(jnp.expand_dims(var, others) + eps)
    y = y if weight is None else y * jnp.expand_dims(weight, others)
    y = y if bias is None else y + jnp.expand_dims(bias, others)
    if state is None:
        return y, None
    count = state.num_batches_tracked + 1
    share = 1 / count if momentum is None else momentum
    new = [
        (1 - share) * old + share * value
        for old, value in zip(state[:2], (mean, var * n / (n - 1)), strict=True)
    ]
    return y, BatchNormState(*new, count)


def make_batches(dtype, total=11, steps=10):
    rng = np.random.default_rng(3)
    x = rng.normal(np.arange(total).reshape(-1, 1, 1), 2, (steps, total, 3, 5))
    return x.astype(dtype), rng.normal(size=(steps, total, 4)).astype(dtype)


def make_parameters(dtype):
    rng = np.random.default_rng(4)
    shapes = {"first": (3, 6), "weight": (6,), "bias": (6,), "second": (6, 4), "weight2": (4,)}
    return {name: jnp.asarray(rng.normal(0.3, 0.3, shape), dtype) for name, shape in shapes.items()}


def make_loss(norm, total):
    """Return the loss of a network with two layers, as a share of the whole batch's."""

    def loss(parameters, states, x, target):
        h = jnp.einsum("ncs,cd->nds", x, parameters["first"])
        h, first = norm(h, parameters["weight"], parameters["bias"], states[0])
        h = jax.nn.relu(h).mean(2) @ parameters["second"]
        y, second = norm(h, parameters["weight2"], None, states[1])
        return ((y - target) ** 2).sum() / total, (first, second)

    return loss


def train(norm, x, target, part, reduce):
    dtype = x.dtype
    parameters, states = make_parameters(dtype), (init_state(6, dtype), init_state(4, dtype))
    step = jax.jit(jax.value_and_grad(make_loss(norm, x.shape[1]), has_aux=True))
    losses = []
    for batch, wanted in zip(x, target, strict=True):
        (loss, states), gradients = step(parameters, states, batch[part], wanted[part])
        losses.append(float(reduce(loss)))
        gradients = {name: reduce(each) for name, each in gradients.items()}
        parameters = {name: each - 0.05 * gradients[name].astype(dtype) for name, each in parameters.items()}
    return [np.array(losses), *gradients.values(), *parameters.values(), *jax.tree.leaves(states)]


@functools.cache
def one_process(dtype):
    """In float64: in float32 jax.numpy's gradients are 2e-5 off, six times what ours are."""
    x, target = (array.astype("float64") for array in make_batches(dtype))
    return train(batch_norm, x, target, slice(None), np.asarray)


@pytest.mark.parametrize(
    ("dtype", "split"), [("float64", "uneven"), ("float64", "first_empty"), ("float32", "empty")]
)
def test_training_equals_one_process(world, dtype, split):
    x, target = make_batches(dtype)
    ours = train(sync_batch_norm, x, target, world.part(11, split), world.sum)
    assert max(map(relative_error, ours, one_process(dtype))) <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("split", "momentum", "given", "channels_last"),
    [
        ("uneven", 0.3, "weight and bias", False),
        ("first_empty", None, "weight", True),
        ("uneven", None, "bias", False),
        ("first_empty", "no state", "neither", False),
        ("uneven", "no state", "weight and bias", True),
    ],
)
def test_layer_equals_one_process(world, split, momentum, given, channels_last):
    rng = np.random.default_rng(5)
    x, dy = rng.normal(2, 1, (2, 7, 3, 4, 3))
    weight = rng.normal(size=3) if "weight" in given else None
    bias = rng.normal(size=3) if "bias" in given else None
    settings = {"channels_last": channels_last}
    state = init_state(3, "float64")
    if momentum == "no state":
        state = None
    else:
        settings["momentum"] = momentum
    part = world.part(7, split)

    def run_both(norm, rows, **more):
        def call(*arrays):
            return norm(*arrays, state, **settings, **more)

        y, pullback, new = jax.vjp(call, x[rows], weight, bias, has_aux=True)
        return y, *pullback(jnp.asarray(dy[rows])), new

    y, dx, dweight, dbias, new = run_both(sync_batch_norm, part, grad_reduction="sum")
    theirs = run_both(batch_norm, slice(None))
    assert jax.tree.structure((dweight, dbias, new)) == jax.tree.structure(theirs[2:])
    for ours, expected in zip((y, dx), theirs, strict=False):
        assert relative_error(ours, expected[part], np.abs(expected).max()) <= 1e-12
    for ours, expected in zip(
        jax.tree.leaves((dweight, dbias, new)), jax.tree.leaves(theirs[2:]), strict=True
    ):
        assert relative_error(ours, expected) <= 1e-12


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_grad_reduction(world, reduction):
    x = np.random.default_rng(6).normal(size=(6, 3, 4))
    part = world.part(6, "uneven")

    def loss(weight):
        return (sync_batch_norm(x[part], weight, grad_reduction=reduction)[0] ** 2).sum()

    gradient = np.asarray(jax.jit(jax.grad(loss))(jnp.ones(3)))
    total = jax.grad(lambda weight: (batch_norm(x, weight, None, None)[0] ** 2).sum())(jnp.ones(3))
    ours = {"none": world.sum, "sum": np.asarray, "mean": lambda array: array * world.size}[reduction](
        gradient
    )
    assert relative_error(ours, total) <= 1e-12


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_data_of_16_bits(world, dtype):
    x = jnp.asarray(np.random.default_rng(7).normal(size=(8, 3, 5)), dtype)
    part = world.part(8, "uneven")
    y, state = jax.jit(sync_batch_norm)(x[part], jnp.ones(3, "float32"), None, init_state(3))
    expected, new = batch_norm(x.astype("float64"), None, None, init_state(3, "float64"))
    assert y.dtype == dtype
    assert relative_error(y, expected[part], 1) <= 2e-2
    assert relative_error(state.var, new.var) <= 1e-6
    assert state.var.dtype == "float32"


def test_evaluation_needs_nobody_else(world):
    if world.rank:
        return
    rng = np.random.default_rng(8)
    x, weight, bias = rng.normal(size=(5, 3)), rng.normal(size=3), rng.normal(size=3)
    state = BatchNormState(jnp.asarray(rng.normal(size=3)), jnp.asarray(rng.uniform(1, 2, 3)), jnp.asarray(4))

    def evaluate(x):
        return sync_batch_norm(x, weight, bias, state, training=False)

    y, same = jax.jit(evaluate)(x)
    expected = (x - state.mean) / np.sqrt(state.var + 1e-5) * weight + bias
    assert relative_error(y, expected) <= 1e-12
    assert same.num_batches_tracked == 4
    dx = jax.grad(lambda x: evaluate(x)[0].sum())(jnp.asarray(x))
    assert relative_error(dx, np.broadcast_to(weight / np.sqrt(state.var + 1e-5), x.shape)) <= 1e-12
    y, _ = sync_batch_norm(x, training=False, channels_last=True)
    assert relative_error(y, batch_norm(x, None, None, None)[0]) <= 1e-12


def test_no_samples_on_all_ranks_leave_the_state(world):
    y, state = sync_batch_norm(jnp.zeros((0, 3), "float32"), state=init_state(3))
    assert y.shape == (0, 3)
    assert state.num_batches_tracked == 0


def test_scan_keeps_the_order(world):
    """The messages of the steps, and those of their backwards."""
    x = np.random.default_rng(9).normal(size=(6, 3, 4))
    part = world.part(6, "uneven")

    def loss(norm, x):
        def step(carried, _):
            y, _ = norm(carried, None, None, None)
            return jnp.sin(y) + carried, None

        return (jax.lax.scan(step, x, None, length=4)[0] ** 3).sum()

    ours = jax.jit(jax.grad(functools.partial(loss, sync_batch_norm)))(x[part])
    theirs = jax.grad(functools.partial(loss, batch_norm))(x)
    assert relative_error(ours, theirs[part], np.abs(theirs).max()) <= 1e-11


@pytest.mark.mpi(min_size=2)
def test_a_result_that_a_rank_does_not_use_is_computed_all_the_same(world):
    """XLA would leave out a pure callback on that rank, and its next would meet another of the others."""
    x = np.random.default_rng(10).normal(np.arange(world.size)[:, None], 1, (world.size, 3))
    part = slice(world.rank, world.rank + 1)

    @jax.jit
    def program(x):
        first, _ = sync_batch_norm(x * x)
        second, _ = sync_batch_norm(x)
        return (second, first) if world.rank == 0 else (second,)

    assert relative_error(program(x[part])[0], batch_norm(x, None, None, None)[0][part], 1) <= 1e-12


def test_pullback_called_twice(world):
    x = np.random.default_rng(11).normal(size=(6, 3))
    part = world.part(6, "even")
    _, pullback = jax.vjp(lambda x: sync_batch_norm(x)[0], jnp.asarray(x[part]))
    for dy in np.cos(x), np.sin(x):
        _, theirs = jax.vjp(lambda x: batch_norm(x, None, None, None)[0], jnp.asarray(x))
        expected = theirs(jnp.asarray(dy))[0]
        ours = pullback(jnp.asarray(dy[part]))[0]
        assert relative_error(ours, expected[part], np.abs(expected).max()) <= 1e-11


def second_derivative(call, x):
    return jax.grad(lambda x: jax.grad(lambda x: call(x).sum())(x).sum())(x)


REFUSED = {
    "vmap": (lambda call, x: jax.vmap(call)(x[None]), ValueError, "vmap"),
    "checkpoint": (lambda call, x: jax.grad(lambda x: jax.checkpoint(call)(x).sum())(x), Exception, "remat"),
    "second derivative": (second_derivative, ValueError, "JVP"),
    "forward mode": (lambda call, x: jax.jvp(call, (x,), (x,)), TypeError, "custom_vjp"),
    "eps": (lambda call, x: call(x, eps=-1.0), ValueError, "eps"),
    "momentum": (lambda call, x: call(x, momentum=2), ValueError, "momentum"),
    "reduction": (lambda call, x: call(x, grad_reduction="all"), ValueError, "grad_reduction"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(world, what):
    """Before anything is sent, on all ranks alike."""
    call, kind, match = REFUSED[what]
    with pytest.raises(kind, match=match):
        call(
            lambda *x, **more: sync_batch_norm(*x, **more)[0],
            jnp.asarray(np.random.default_rng(12).normal(size=(4, 3))),
        )


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_fault_of_one_rank_is_an_error_on_all(world, direction, monkeypatch):
    culprit = world.size - 1
    x = jnp.asarray(np.random.default_rng(13).normal(size=(4, 3)))
    if direction == "forward":
        weight = jnp.ones(2 if world.rank == culprit else 3)
    else:
        weight = jnp.ones(3)
        if world.rank == culprit:
            monkeypatch.setattr(interop, "prepare", lambda *arguments: 1 / 0)
    program = jax.jit(jax.grad(lambda x: (sync_batch_norm(x, weight, name="layer 1")[0] ** 2).sum()))
    fault = "ValueError: expected weight" if direction == "forward" else "ZeroDivisionError"
    match = fault if world.rank == culprit else f"rank {culprit} failed before {direction} [0-9]+ of layer 1"
    with pytest.raises(Error, match=match):
        jax.block_until_ready(program(x))
    monkeypatch.undo()
    y, _ = jax.jit(sync_batch_norm)(x)  # all go on
    assert relative_error(y, batch_norm(x, None, None, None)[0]) <= 1e-12


@pytest.mark.mpi(min_size=2)
def test_a_call_too_many(world):
    group = new_group()
    x = jnp.asarray(np.random.default_rng(14).normal(size=(4, 3)))
    y, pullback = jax.vjp(lambda x: sync_batch_norm(x, process_group=group)[0], x)
    with pytest.raises(Error, match="RankMismatchError"):
        jax.block_until_ready(sync_batch_norm(x, process_group=group) if world.rank == 0 else pullback(y))


ONE_CORE = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import jax, jax.numpy as jnp
if sys.argv[1] == "started":
    jnp.zeros(1)
from cupy_syncbn.interop.jax import sync_batch_norm
x = jnp.ones((32, 4, 96, 96))  # so large that JAX copies it in a thread
try:
    y, _ = jax.jit(sync_batch_norm)(x)
    print("result", float(abs(y).max()))
except RuntimeError as error:
    print(error)
"""


@pytest.mark.mpi_skip
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be bound to a core here")
@pytest.mark.parametrize(("when", "said"), [("first", "result 0.0"), ("started", "JAX has a single thread")])
def test_one_core(when, said):
    """A callback does not wait for itself: an error says what to do where it would."""
    environment = clean_environment(PYTHONPATH=str(REPOSITORY), JAX_PLATFORMS="cpu")
    status, output = run([sys.executable, "-c", ONE_CORE, when], environment, 60)
    assert status == 0, output
    assert said in output
