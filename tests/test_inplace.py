"""Normalization in place: y over x, and gradients from y alone, by both engines."""

import copy
import pickle
import sys

import numpy as np
import pytest

from cupy_syncbn import (
    BatchNorm1d,
    BatchNorm2d,
    CapturedStep,
    DistributedDataParallel,
    Module,
    RankMismatchError,
    RemoteRankError,
    Sequential,
    SyncBatchNorm,
    convert_sync_batchnorm,
    sync_batch_norm,
    sync_batch_norm_backward,
)
from support.arrays import DTYPES, LAYOUTS, random_array, random_batch, random_channels
from support.cases import pairwise
from support.compare import IN_PLACE_TOLERANCE, assert_identical, relative_error
from support.reference import BatchNorm
from support.world import SPLITS

ACTIVATIONS = [None, "leaky_relu", ("leaky_relu", 0.25), ("leaky_relu", 1e-3)]
SHAPES = {"dense": (18, 40), "rows": (12, 3, 131), "maps": (18, 4, 3, 5), "large": (6, 2, 40, 40)}


def on_host(array):
    return array if isinstance(array, np.ndarray) else array.get()


def parameters_of(rng, channels, dtype, ratio=4.0):
    """Return weights of at least 0.1, and biases of at most `ratio` times as much."""
    weight = rng.uniform(0.1, 2, channels) * rng.choice([-1, 1], channels)
    return weight.astype(dtype), (weight * rng.uniform(-ratio, ratio, channels)).astype(dtype)


def reference_of(arrays, channel_axis=1, **arguments):
    reference = BatchNorm(arrays["running_mean"].size, channel_axis=channel_axis, **arguments)
    for name, array in arrays.items():
        setattr(reference, name, on_host(array).astype(np.float64))
    return reference


@pytest.mark.parametrize(
    ("dtypes", "shape", "split", "activation", "mode", "channels_last"),
    pairwise(DTYPES, SHAPES, SPLITS, ACTIVATIONS, ["training", "evaluation", "own"], [False, True]),
)
def test_equals_reference(world, rng, xp, dtypes, shape, split, activation, mode, channels_last):
    dtype, parameter_dtype = DTYPES[dtypes]
    N, C, *spatial = SHAPES[shape]
    shape, axis = ((N, *spatial, C), -1) if channels_last else ((N, C, *spatial), 1)
    x, dy = random_batch(rng, shape, dtype, axis), random_array(rng, shape, dtype)
    weight, bias = parameters_of(rng, C, parameter_dtype)
    arrays = {"weight": weight, "bias": bias}
    arrays["running_mean"] = random_array(rng, C, parameter_dtype)
    arrays["running_var"] = rng.uniform(0.5, 2, C).astype(parameter_dtype)
    reference = reference_of(arrays, axis, activation=activation)
    if mode == "own":
        reference.running_mean = reference.running_var = None
        del arrays["running_mean"], arrays["running_var"]
    reference.training = mode == "training"
    part = world.part(N, split) if reference.training else slice(None)
    settings = {"training": reference.training, "activation": activation, "channels_last": channels_last}

    mine = xp.array(x[part])
    ordinary, _ = sync_batch_norm(mine, **{k: xp.array(a) for k, a in arrays.items()}, **settings)
    y, saved = sync_batch_norm(mine, **{k: xp.array(a) for k, a in arrays.items()}, **settings, inplace=True)
    assert y is mine
    assert_identical(on_host(y), on_host(ordinary))
    gradient = xp.array(dy[part])
    gradients = sync_batch_norm_backward(gradient, saved, out=gradient)
    assert gradients.x is gradient
    assert gradients.residual is None

    reference(x)
    expected, tolerance = reference.backward(dy), IN_PLACE_TOLERANCE[np.dtype(dtype)]
    scale = np.max(abs(expected))
    assert relative_error(on_host(gradients.x), expected[part], scale) <= tolerance
    for name in "weight", "bias":
        actual = on_host(getattr(gradients, name)).astype(np.float64)
        actual, whole = (
            world.sum(actual) if reference.training else actual,
            getattr(reference, f"{name}_grad"),
        )
        # Sums of values of both signs may be small by chance, where their terms are not.
        scale = max(np.max(abs(whole)), np.sqrt(x.size / C))
        assert relative_error(actual, whole, scale) <= max(tolerance, 2 * IN_PLACE_TOLERANCE[parameter_dtype])


@pytest.mark.mpi_skip
def test_errors_grow_with_the_bias(rng):
    """As the docstring says: about by 1 + |bias / weight|."""
    errors = []
    x = random_array(rng, (64, 8, 49))
    dy = x + random_array(rng, x.shape)  # a gradient that x matters to
    for ratio in 1.0, 1e2, 1e4:
        weight, bias = np.full(8, 0.5, "f4"), np.full(8, 0.5 * ratio, "f4")
        reference = reference_of({"weight": weight, "bias": bias, "running_mean": bias, "running_var": bias})
        reference(x)
        _, saved = sync_batch_norm(x.copy(), weight, bias, inplace=True)
        errors.append(relative_error(sync_batch_norm_backward(dy, saved).x, reference.backward(dy)))
        assert errors[-1] <= 1e-7 * (10 + ratio)
    assert errors[2] > 1e2 * errors[0]


@pytest.mark.mpi_skip
@pytest.mark.parametrize("dtypes", DTYPES)
def test_weight_close_to_zero(rng, xp, dtypes):
    """It counts as 1e-5 with its sign: for y and for all gradients."""
    dtype, parameter_dtype = DTYPES[dtypes]
    x, dy = random_batch(rng, (9, 6, 5), dtype), random_array(rng, (9, 6, 5), dtype)
    weight = np.array([0.0, -0.0, 1e-7, -1e-6, 2e-5, np.nan]).astype(parameter_dtype)
    used = np.array([1e-5, -1e-5, 1e-5, -1e-5, weight[4], np.nan], np.float64)
    zeros = np.zeros(6)
    reference = reference_of({"weight": used, "bias": zeros, "running_mean": zeros, "running_var": zeros})
    expected = reference(x)
    given = xp.array(weight)
    y, saved = sync_batch_norm(xp.array(x), given, inplace=True)
    assert_identical(on_host(given), weight)
    gradients = sync_batch_norm_backward(xp.array(dy), saved)
    dx = reference.backward(dy)
    for c in range(5):
        is_tiny = dtype.itemsize == 2  # y has few of its digits left in float16
        tolerance = (
            (0.1 if dtype == np.float16 else IN_PLACE_TOLERANCE[dtype])
            if is_tiny
            else IN_PLACE_TOLERANCE[dtype]
        )
        assert relative_error(on_host(y)[:, c], expected[:, c]) <= max(tolerance, 1e-7)
        assert relative_error(on_host(gradients.x)[:, c], dx[:, c]) <= tolerance
        scale = max(abs(reference.weight_grad[c]), np.sqrt(45))
        assert relative_error(on_host(gradients.weight)[c], reference.weight_grad[c], scale) <= tolerance
    assert np.isnan(on_host(gradients.x)[:, 5]).all()


@pytest.mark.mpi_skip
def test_products_beyond_float32(rng):
    """Their sum is taken in float64."""
    x, dy = random_array(rng, (4, 3, 50)), random_array(rng, (4, 3, 50))
    weight, bias = np.full(3, 1e18, "f4"), np.zeros(3, "f4")
    dy *= np.float32(1e21)
    reference = reference_of({"weight": weight, "bias": bias, "running_mean": bias, "running_var": bias})
    for activation in None, "leaky_relu":
        reference.activation = activation
        reference(x)
        expected = reference.backward(dy)
        _, saved = sync_batch_norm(x.copy(), weight, bias, activation=activation, inplace=True)
        actual = sync_batch_norm_backward(dy, saved, grad_reduction="none")
        assert relative_error(actual.weight, reference.weight_grad) <= 2e-6
        assert np.isinf(actual.x).any() == (np.max(abs(expected)) > np.finfo("f4").max)


# ---- Memory ----


@pytest.mark.mpi_skip
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", ["float64", "float32", "float16-float32", "bfloat16-float32"])
def test_memory_layouts(rng, dtypes, layout):
    dtype, parameter_dtype = DTYPES[dtypes]
    shape = (6, 4, 3, 5)
    weight, bias = parameters_of(rng, 4, parameter_dtype)
    plain, dy = random_batch(rng, shape, dtype), random_array(rng, shape, dtype)
    expected, saved = sync_batch_norm(plain.copy(), weight, bias, activation="leaky_relu", inplace=True)
    wanted = sync_batch_norm_backward(dy, saved)
    x, given = LAYOUTS[layout](plain), LAYOUTS[layout](dy)
    if layout == "read_only":
        with pytest.raises(ValueError, match="writeable"):
            sync_batch_norm(x, weight, bias, inplace=True)
        x, given = x.copy(), given.copy()
    base = x.base if x.base is not None and layout == "sliced" else None
    y, saved = sync_batch_norm(x, weight, bias, activation="leaky_relu", inplace=True)
    assert y is x
    tolerance = IN_PLACE_TOLERANCE[np.dtype(dtype)]
    assert relative_error(y, expected) <= tolerance
    gradients = sync_batch_norm_backward(given, saved, out=given)
    assert gradients.x is given
    assert relative_error(given, wanted.x) <= tolerance
    if base is not None:
        outside = base.copy()
        outside[tuple(slice(1, None, 2) for _ in shape)] = 77
        assert (outside == 77).all()


@pytest.mark.mpi_skip
def test_other_libraries(rng):
    x = random_batch(rng, (6, 4, 5))
    expected, _ = sync_batch_norm(x)
    with pytest.raises(TypeError, match="expected x of NumPy, CuPy or torch") as caught:
        sync_batch_norm(memoryview(x), inplace=True)
    assert "numpy.array(x)" in str(caught.value)
    if "jax" in sys.modules or pytest.importorskip("jax", reason="makes arrays that must not change"):
        import jax

        immutable = jax.numpy.asarray(x)
        with pytest.raises(TypeError, match=r"\(got jax"):
            sync_batch_norm(immutable, inplace=True)
        assert_identical(np.asarray(immutable), x)
    torch = pytest.importorskip("torch", reason="makes tensors, and torch is not installed")
    tensor = torch.from_numpy(x.copy())
    y, saved = sync_batch_norm(tensor, inplace=True)
    assert_identical(tensor.numpy(), expected)
    assert np.shares_memory(y, tensor.numpy())
    dy = torch.ones_like(tensor)
    dx = sync_batch_norm_backward(dy, saved, out=dy).x
    assert np.shares_memory(dx, dy.numpy())
    leaf = torch.from_numpy(x.copy()).requires_grad_()
    with pytest.raises(TypeError, match="without a graph"):
        sync_batch_norm(leaf, inplace=True)


@pytest.mark.mpi_skip
def test_array_of_a_subclass_stays_one(rng):
    class Image(np.ndarray):
        pass

    x = random_batch(rng, (6, 4, 5)).view(Image)
    y, saved = sync_batch_norm(x, inplace=True)
    assert y is x
    assert sync_batch_norm_backward(np.ones((6, 4, 5), "f4"), saved).x.shape == x.shape


@pytest.mark.mpi_skip
@pytest.mark.parametrize("inplace", [True, False])
def test_values_that_share_memory(inplace):
    """As x in place, and as out."""
    windows = np.lib.stride_tricks.sliding_window_view(np.arange(40.0), 8, writeable=True)
    once = np.lib.stride_tricks.as_strided(np.arange(8.0), (4, 8), (0, 8))
    for x in windows, once:
        before = x.copy()
        arguments = {"x": x, "inplace": True} if inplace else {"x": x.copy(), "out": x}
        with pytest.raises(ValueError, match=r"without values that share memory .*: use (x|out)\.copy\(\)"):
            sync_batch_norm(**arguments)
        assert_identical(x, before)


# ---- Where dx goes ----


@pytest.mark.mpi_skip
@pytest.mark.parametrize(
    ("dtypes", "shape", "activation", "residual"),
    pairwise(DTYPES, [(18, 3, 7), (18, 5), (4, 2, 33, 33)], [None, "relu", "leaky_relu"], [False, True]),
)
def test_dx_over_dy(rng, xp, dtypes, shape, activation, residual):
    """Of the ordinary layer, too: the same bits as elsewhere."""
    dtype, parameter_dtype = DTYPES[dtypes]
    x, dy, r = (xp.array(random_array(rng, shape, dtype)) for _ in range(3))
    weight, bias = (xp.array(a) for a in random_channels(rng, shape[1], parameter_dtype))
    settings = {"activation": activation, "residual": r if residual else None}
    results = []
    for out in None, xp.empty_like(dy), dy:
        _, saved = sync_batch_norm(x, weight, bias, **settings)
        gradients = sync_batch_norm_backward(dy, saved, out=out)
        assert out is None or gradients.x is out
        results.append([None if g is None else on_host(g).copy() for g in gradients])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_identical(b, a)


# name: (out of the backward, error, message)
WRONG_OUT = {
    "shape": (lambda x, dy: dy[:, :, :2].copy(), ValueError, "expected out of the input's size"),
    "type": (lambda x, dy: dy.astype("f8"), TypeError, "expected out of the input's type float32"),
    "x": (lambda x, dy: x, ValueError, "what the forward has kept"),
    "part of dy": (lambda x, dy: dy[:], ValueError, "expected out to be dy, or to share no memory"),
    "list": (lambda x, dy: dy.tolist(), TypeError, "expected out to be a NumPy or CuPy array"),
    "read-only": (lambda x, dy: LAYOUTS["read_only"](dy), ValueError, "writeable"),
    "shared": (
        lambda x, dy: np.lib.stride_tricks.as_strided(np.zeros(4, "f4"), dy.shape, (0, 4, 0)),
        ValueError,
        "share memory",
    ),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", WRONG_OUT)
def test_wrong_out_of_a_backward(world, rng, case, inplace):
    make, error, message = WRONG_OUT[case]
    layer = SyncBatchNorm(4, inplace=inplace)
    x, dy = random_array(rng, (6, 4, 3)), random_array(rng, (6, 4, 3))
    y = layer(x)
    copies = x.copy(), dy.copy()
    if world.rank == 0:
        with pytest.raises(error, match=message):
            layer.backward(dy, out=make(x, dy))
    else:
        with pytest.raises(RemoteRankError, match="rank 0"):
            layer.backward(dy)
    assert_identical(x, copies[0])
    assert_identical(dy, copies[1])
    assert layer.weight.grad is None
    assert layer.backward(dy, out=dy) is dy  # and goes on
    assert y.shape == dy.shape


# ---- What is refused, and what is noticed ----


WRONG = {
    "relu": ({"activation": "relu"}, "got 'relu', which has no inverse"),
    "slope": ({"activation": ("leaky_relu", 1e-40)}, "expected a slope of at least 0.001 with inplace=True"),
    "residual": ({"residual": np.ones((6, 4, 3), "f4")}, "expected no residual with inplace=True"),
    "out": ({"out": np.ones((6, 4, 3), "f4")}, "expected no out with inplace=True"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_go_with_it(world, rng, case):
    settings, message = WRONG[case]
    x = random_array(rng, (6, 4, 3))
    before = x.copy()
    if world.rank == world.size - 1:
        with pytest.raises(ValueError, match=message):
            sync_batch_norm(x, inplace=True, **settings)
    else:
        with pytest.raises(RemoteRankError, match=f"rank {world.size - 1}"):
            sync_batch_norm(x, inplace=True)
    assert_identical(x, before)  # nobody has written yet
    sync_batch_norm(x, inplace=True)
    assert (x != before).any()


def test_layer_refuses_at_once():
    for make in SyncBatchNorm, BatchNorm1d, BatchNorm2d:
        with pytest.raises(ValueError, match="which has no inverse"):
            make(4, activation="relu", inplace=True)
    layer = BatchNorm1d(4, inplace=True)
    with pytest.raises(ValueError, match="no residual"):
        layer(np.ones((6, 4), "f4"), residual=np.ones((6, 4), "f4"))


@pytest.mark.parametrize("dtypes", DTYPES)
def test_changed_result_is_noticed(world, rng, dtypes):
    """On the rank that changed it, and told to the others; the backward can then be called again."""
    dtype, parameter_dtype = DTYPES[dtypes]
    layer = SyncBatchNorm(4, dtype=parameter_dtype, inplace=True)
    x = random_array(rng, (6, 4, 30), dtype)
    y = layer(x)
    kept = y.copy()
    if world.rank == 0:
        y[y < 0] = 0  # as a ReLU in place
        with pytest.raises(RuntimeError, match="y was changed since"):
            layer.backward(kept)
    else:
        with pytest.raises(RemoteRankError, match="rank 0"):
            layer.backward(kept)
    y[...] = kept
    assert layer.backward(np.ones_like(kept)).shape == y.shape


@pytest.mark.mpi(min_size=2)
def test_ranks_that_disagree(world, rng):
    layer = SyncBatchNorm(4, inplace=world.rank == 0)
    x = random_array(rng, (6, 4, 3))
    before = x.copy()
    with pytest.raises(RankMismatchError, match="first call"):
        layer(x)
    assert_identical(x, before)


# ---- Layers ----


class Doubled(Module):
    """A layer that keeps nothing."""

    def forward(self, x):
        return x + x

    def backward(self, dy):
        return dy + dy


def make_nets(device):
    """Return an ordinary network, and one in place."""
    settings = {"device": device, "dtype": "float64", "activation": "leaky_relu", "grad_reduction": "mean"}
    for inplace in False, True:
        layers = (SyncBatchNorm(4, **settings, inplace=inplace) for _ in range(2))
        yield Sequential(next(layers), Doubled(), next(layers))


def test_chain_equals_the_ordinary_layers(world, rng, device, xp):
    """Some steps of training over ranks, and an evaluation."""
    nets = list(make_nets(device))
    part = world.part(18, "empty")
    for _ in range(3):
        x, dy = (random_batch(rng, (18, 4, 9), "f8")[part] for _ in range(2))
        results = []
        for net in nets:
            y = on_host(net(xp.array(x))).copy()
            results.append((y, on_host(net.backward(xp.array(dy)))))
            for parameter in net.parameters():
                parameter.data -= 0.001 * parameter.grad
            net.zero_grad()
        for ordinary, other in zip(*results, strict=True):
            assert relative_error(other, ordinary, 10.0) <= 1e-11
    states = [net.state_dict() for net in nets]
    for name, array in states[0].items():
        assert relative_error(on_host(states[1][name]), on_host(array), 10.0) <= 1e-11
    x = random_batch(rng, (4, 4, 9), "f8")
    y, other = (on_host(net.eval()(xp.array(x))) for net in nets)
    assert relative_error(other, y) <= 1e-11


@pytest.mark.mpi_skip
def test_captured_step(rng, cupy):
    """Each batch is copied to x, where its y is found."""
    layers = [BatchNorm1d(4, device="cuda", activation="leaky_relu", inplace=True) for _ in range(2)]
    x, dy = (cupy.asarray(random_batch(rng, (6, 4, 9))) for _ in range(2))

    def step(layer, x, dy):
        layer.zero_grad()
        return layer(x), layer.backward(dy)

    step(layers[1], x.copy(), dy)  # as the constructor does
    captured = CapturedStep(lambda: step(layers[0], x, dy))
    for _ in range(2):
        batch = random_batch(rng, (6, 4, 9))
        x[...] = cupy.asarray(batch)
        y, dx = captured()
        assert y is x
        expected = step(layers[1], cupy.asarray(batch), dy)
        assert_identical(y.get(), expected[0].get())
        assert_identical(dx.get(), expected[1].get())
        assert_identical(layers[0].weight.grad.get(), layers[1].weight.grad.get())


@pytest.mark.mpi_skip
def test_copies_and_conversion(rng):
    layer = BatchNorm1d(4, inplace=True, activation="leaky_relu")
    assert "inplace=True" in repr(layer)
    assert "inplace" not in repr(BatchNorm1d(4))
    for other in copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), convert_sync_batchnorm(layer):
        x = random_array(rng, (6, 4, 3))
        assert other.inplace
        assert other(x) is x
    old = BatchNorm1d(4)
    del vars(old)["inplace"]  # of a version that had none
    x = random_array(rng, (6, 4, 3))
    assert pickle.loads(pickle.dumps(old))(x) is not x


def test_with_data_parallel(world, rng):
    model = DistributedDataParallel(Sequential(SyncBatchNorm(4, inplace=True)))
    x = random_array(rng, (6, 4, 3))
    assert model(x) is x
    model.backward(np.ones_like(x))
    model.reduce_gradients()
    world.assert_same(*[parameter.grad for parameter in model.parameters()])


@pytest.mark.mpi_skip
def test_nothing_of_the_size_of_x_is_kept(rng):
    """The record refers to y alone; a forward allocates little beside it."""
    import tracemalloc

    x = random_array(rng, (32, 8, 64, 64))
    layer = BatchNorm2d(8, inplace=True, activation="leaky_relu", device="cpu")
    layer(x)
    layer.forget()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        layer(x)
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert now - before < 0.01 * x.nbytes
    from cupy_syncbn.backends import backend_of

    assert peak - before < (0.01 if "native" in backend_of(x).__name__ else 3) * x.nbytes
