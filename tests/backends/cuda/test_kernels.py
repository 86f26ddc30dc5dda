"""The CUDA kernels through their backend and the public functions, against the reference in float64.

Without a GPU they run in the emulator, under several schedules of their threads, and every access to memory
is checked. Each instance of each template is launched: see `COMBINATIONS`.
"""

import contextlib
import functools
import gc
import itertools
import operator
from typing import NamedTuple

import numpy as np
import pytest
from test_launch import accesses

import cuda_emulator as emulator
from cupy_syncbn import SingleProcessGroup, sync_batch_norm, sync_batch_norm_backward
from cupy_syncbn.backends.cuda import kernels, symbols
from cupy_syncbn.backends.cuda import launch as launches
from cupy_syncbn.backends.cuda.launch import THREADS, launch_for
from cupy_syncbn.backends.interface import Affine, BatchSums, Epilogue, ParameterSums, Running
from support.arrays import DTYPES, random_array, random_batch, random_channels
from support.cases import sweep
from support.compare import IN_PLACE_TOLERANCE, TOLERANCE, assert_close, assert_identical, relative_error
from support.reference import BatchNorm

pytestmark = pytest.mark.mpi_skip

ALONE = SingleProcessGroup()
TRAILER = (0.0, 7.0, 49.0, 5.0, 25.0)


def is_emulated(cupy):
    return hasattr(cupy.RawModule, "prebuild")


def needs_emulator(cupy, what):
    if not is_emulated(cupy):
        pytest.skip(f"only the emulator {what}")


def schedules(cupy, number=None):
    """Return what to run a kernel under: all schedules, or the first one and another that goes by `number`.

    On a GPU there is the one schedule, its own: twice, to compare the bits.
    """
    if not is_emulated(cupy):
        return [None, None]
    first, *others = emulator.SCHEDULES
    return [first, *others] if number is None else [first, others[number % len(others)]]


def the_backend():
    from cupy_syncbn.backends.cuda import (
        operations as cuda_operations,  # imports CuPy, which the fixtures install
    )

    return cuda_operations


# ---- A training step, its results and what they should be ----


class Step(NamedTuple):
    """What goes into a forward and a backward, on the host. `x` is (N, C, S), or (N, S, C) channels-last."""

    x: np.ndarray
    dy: np.ndarray
    residual: np.ndarray | None
    weight: np.ndarray | None
    bias: np.ndarray | None
    running_mean: np.ndarray
    running_var: np.ndarray
    channels_last: bool = False
    activation: str | tuple | None = None
    training: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5
    inplace: bool = False
    """Whether y is written over x, and dx over dy."""

    @property
    def channel_axis(self):
        return -1 if self.channels_last else 1


def make_step(shape, dtypes="float32", *, residual=False, channels_last=False, seed=0, **settings):
    """Return a step on random data of a shape (N, C, S)."""
    rng = np.random.default_rng(seed)
    dtype, parameter_dtype = DTYPES[dtypes]
    N, C, S = shape
    shape = (N, S, C) if channels_last else (N, C, S)
    weight, bias = random_channels(rng, C, parameter_dtype)
    step = Step(
        x=random_batch(rng, shape, dtype, -1 if channels_last else 1),
        dy=random_array(rng, shape, dtype),
        residual=random_array(rng, shape, dtype) if residual else None,
        weight=weight,
        bias=bias,
        running_mean=random_array(rng, C, parameter_dtype),
        running_var=rng.uniform(0.5, 2, C).astype(parameter_dtype),
        channels_last=channels_last,
    )
    return step._replace(**settings)


def aligned(module, array):
    return module.asarray(array)


def misaligned(cupy, array):
    """Return a contiguous array one element behind a boundary of 16 bytes."""
    view = cupy.empty(array.size + 1, array.dtype)[1:].reshape(array.shape)
    view.set(np.ascontiguousarray(array))
    return view


def compute(module, step, put=aligned):
    """Run a step on arrays of cupy or numpy; return the results on the host, by their names."""
    put = functools.partial(put, module)
    as_is = {name: value for name, value in step._asdict().items() if not isinstance(value, np.ndarray)}
    arrays = {name: getattr(step, name) for name in ("weight", "bias", "running_mean", "running_var")}
    arrays = {name: None if array is None else module.array(array) for name, array in arrays.items()}
    tracked = module.array(np.int64(0))
    x, dy = put(step.x), put(step.dy)
    if module is np and step.inplace:
        x, dy = x.copy(), dy.copy()
    y, saved = sync_batch_norm(
        x,
        num_batches_tracked=tracked,
        process_group=ALONE,
        **as_is | arrays | ({} if step.residual is None else {"residual": put(step.residual)}),
    )
    gradients = sync_batch_norm_backward(dy, saved, out=dy if step.inplace else None)
    if step.inplace:
        assert y is x
        assert gradients.x is dy
    names = "dx", "dweight", "dbias", "dresidual"
    results = {"y": y} | {name: g for name, g in zip(names, gradients, strict=True) if g is not None}
    results |= {name: arrays[name] for name in ("running_mean", "running_var")} | {"tracked": tracked}
    if module is np:
        return results
    assert not the_backend()._workspaces.current().counters.any(), "a counter is not zero after the launch"
    return {name: array.get() for name, array in results.items()}


def expected_of(step):
    """Return the results of the reference."""
    reference = BatchNorm(
        step.running_mean.size,
        eps=step.eps,
        momentum=step.momentum,
        affine=step.weight is not None,
        activation=step.activation,
        channel_axis=step.channel_axis,
    )
    for name in "weight", "bias", "running_mean", "running_var":
        if getattr(step, name) is not None:
            setattr(reference, name, getattr(step, name).astype("f8"))
    reference.training = step.training
    results = {"y": reference(step.x, step.residual)}
    dx = reference.backward(step.dy)
    results["dx"], results["dresidual"] = dx if step.residual is not None else (dx, None)
    results["dweight"], results["dbias"] = reference.weight_grad, reference.bias_grad
    results |= {name: getattr(reference, name) for name in ("running_mean", "running_var")}
    results["tracked"] = np.array(reference.num_batches_tracked)
    return {name: array for name, array in results.items() if array is not None}


def assert_results(actual, expected, inplace=False):
    assert actual.keys() == expected.keys()
    assert actual["tracked"] == expected["tracked"]
    for name in actual.keys() - {"tracked", "dweight", "dbias"}:
        assert_close(actual[name], expected[name], tolerance=in_place_tolerance(actual[name], inplace, name))
    count = expected["y"].size / max(expected["running_mean"].size, 1)
    for name in actual.keys() & {"dweight", "dbias"}:
        tolerance = in_place_tolerance(actual["y"], inplace, name)
        assert_sums_close(actual[name], expected[name], count, tolerance)


def in_place_tolerance(array, inplace, name):
    """Return what a gradient of 16-bit data may be off by: in place x has the precision of y."""
    is_coarse = inplace and array.dtype.itemsize == 2 and name in ("dx", "dweight", "dbias")
    return IN_PLACE_TOLERANCE[array.dtype] if is_coarse else None


def assert_sums_close(actual, expected, count, tolerance=None):
    """Check sums of `count` values of both signs, which may be small by chance where their terms are not."""
    if tolerance is None and actual.dtype.itemsize > 2:
        largest = np.max(np.abs(expected), initial=1e-9)
        tolerance = TOLERANCE[actual.dtype] * max(1, np.sqrt(count) / largest)
    assert_close(actual, expected, tolerance=tolerance)


def assert_step(cupy, step, put=aligned, number=None):
    """Compare a step with the reference, and its bits under several schedules; return the results."""
    with np.errstate(all="ignore"):
        expected = expected_of(step)
    first = None
    for schedule in schedules(cupy, number):
        with emulator.schedule(schedule):
            actual = compute(cupy, step, put)
        if first is None:
            assert_results(actual, expected, step.inplace)
            first = actual
        for name, array in actual.items():
            assert_identical(array, first[name])
    return first


# ---- Launches of other shapes than launch.py chooses ----


@contextlib.contextmanager
def remembering_nothing(backend):
    """Shape the launches inside anew, and those behind it."""
    backend.forget_launches()
    try:
        yield
    finally:
        backend.forget_launches()


@contextlib.contextmanager
def launched_with(items=None, idle=0):
    """Give every thread `items` vectors, and launch `idle` splits more than there is work for."""
    backend, usual = the_backend(), launches.launch_for.__wrapped__
    with pytest.MonkeyPatch.context() as patch:
        if items:
            patch.setattr(launches, "MIN_ITEMS", items)
            patch.setattr(launches, "MAX_ITEMS", items)

        def launch(*arguments):
            chosen = usual(*arguments)
            return chosen._replace(splits=chosen.splits + idle)

        patch.setattr(backend, "launch_for", launch)
        with remembering_nothing(backend):
            yield


LAUNCHES = {
    "usual": {},
    "many_splits": {"items": 1},
    "one_split": {"items": 1 << 20},
    "idle_blocks": {"items": 2, "idle": 3},
}


class Launched(NamedTuple):
    """A launch; the bytes are those that a checked kernel accessed, in shared memory too."""

    name: str
    read: int
    written: int


@contextlib.contextmanager
def recorded():
    """Yield the list of the launches inside."""
    backend, done = the_backend(), []
    original = backend._kernel

    def kernel(file, name):
        function = original(file, name)

        def launch(*arguments):
            read, written = emulator.stats.read_bytes, emulator.stats.write_bytes
            function(*arguments)
            done.append(
                Launched(name, emulator.stats.read_bytes - read, emulator.stats.write_bytes - written)
            )

        return launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "_kernel", kernel)
        with remembering_nothing(backend):
            yield done


# ---- Every instance ----


class Combination(NamedTuple):
    """What tells the instances of a kernel apart."""

    dtype: str
    vectors: bool
    columns: bool
    residual: bool
    activation: str

    def __str__(self):
        words = [self.dtype, "vectors" if self.vectors else "scalars", "columns" if self.columns else "rows"]
        return "-".join(words + ["residual"] * self.residual + [self.activation.lower()])

    @property
    def width(self):
        itemsize = {"float64": 8, "float32": 4}.get(self.dtype, 2)
        return kernels.vector_width(itemsize) if self.vectors else 1

    @property
    def instances(self):
        """The kernels of a training step."""
        rest = self.dtype, self.width, self.columns
        found = [kernels.statistics(*rest)] + [kernels.centered_squares()] * (self.dtype == "float64")
        forward = "LEAKY_RELU" if self.activation == kernels.INVERTED else self.activation
        found.append(kernels.normalize(*rest, self.residual, forward))
        for kernel in kernels.reduce_gradients, kernels.input_gradient:
            found.append(kernel(*rest, self.residual, self.activation))
        return [name for _, name in found]


COMBINATIONS = [
    Combination(*values)
    for values in [
        *itertools.product(kernels.TYPES, *[(True, False)] * 3, kernels.ACTIVATIONS),
        *itertools.product(kernels.TYPES, *[(True, False)] * 2, [False], [kernels.INVERTED]),
    ]
]

# (outer, C, inner) that all types of data walk in this way; channels-last data has an inner size of 1.
# By (columns, vectors): the last group of channels full and not, fewer and more rows than a block is high,
# groups of one and of several channels, vectors of several channels, rows with and without edges.
SHAPES = {
    (True, True): [(5, 8, 1), (41, 264, 1), (600, 16, 1), (40, 8, 3), (3, 24, 33), (9, 5, 64), (2, 1, 496)],
    (True, False): [(5, 3, 1), (300, 7, 1), (3, 257, 1), (7, 33, 3), (5, 31, 31), (9, 1, 31), (513, 1, 1)],
    (False, True): [(5, 3, 257), (1, 2, 2051), (33, 1, 131), (3, 2, 4096), (2, 31, 129), (1, 1, 9001)],
    (False, False): [(5, 3, 257), (1, 2, 2048), (33, 1, 131), (3, 2, 1024), (2, 31, 129), (1, 1, 3001)],
}


def test_all_instances_are_launched_below():
    """`test_instance` checks that what is launched is what is said here."""
    said = {name for combination in COMBINATIONS for name in combination.instances}
    all_of_them = {
        name
        for file, dtype in itertools.product(kernels.FILES, kernels.TYPES)
        for name in kernels.instances(file, dtype)
    }
    assert said == all_of_them


def steps_of(combination, half):
    """Yield numbers, steps and launches for a combination: the settings go round, so that all meet.

    A half has every other shape. Which it is goes round too, so that each setting is in either.
    """
    index = COMBINATIONS.index(combination)
    walk = combination.columns, combination.vectors
    dtypes = [name for name in DTYPES if name.split("-")[0] == combination.dtype]
    activations = {
        "IDENTITY": (None,),
        "RELU": ("relu",),
        "LEAKY_RELU": ("leaky_relu", ("leaky_relu", 0.25)),
        kernels.INVERTED: ("leaky_relu", ("leaky_relu", 0.25)),
    }[combination.activation]
    for i, shape in enumerate(SHAPES[walk], index):
        if (i - index + index // 2) % 2 != half:
            continue
        step = make_step(
            shape,
            dtypes[i // 2 % len(dtypes)],
            residual=combination.residual,
            activation=activations[i % len(activations)],
            channels_last=shape[2] == 1 and i % 2 == 1,
            seed=i,
            inplace=combination.activation == kernels.INVERTED,
        )
        yield i, step, list(LAUNCHES)[i % len(LAUNCHES)]


@functools.cache
def build_all_instances():
    """Compile all for the emulator at once: on all cores, not one library after the other."""
    emulator.build_all(
        (kernels.source(file), kernels.instances(file, dtype))
        for file, dtype in itertools.product(kernels.FILES, kernels.TYPES)
    )


@pytest.mark.parametrize("half", [0, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_instance(cupy, combination, half):
    if is_emulated(cupy):
        build_all_instances()
    put = aligned if combination.vectors else misaligned
    for number, step, name in steps_of(combination, half):
        with recorded() as done, launched_with(**LAUNCHES[name]):
            # The order of the threads matters most where many blocks add up together.
            assert_step(cupy, step, put, None if name == "many_splits" else number)
        assert {launch.name for launch in done} == set(combination.instances)


@pytest.mark.parametrize("shape", [(41, 264, 1), (40, 8, 3), (5, 3, 257)], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_in_place(cupy, dtypes, shape):
    """Without an activation, by the instances of the ordinary backward; and by running statistics."""
    for number, training in enumerate((True, False)):
        assert_step(cupy, make_step(shape, dtypes, inplace=True, training=training), number=number)
        step = make_step(shape, dtypes, inplace=True, training=training, activation="leaky_relu")
        assert_step(cupy, step, misaligned, number=number)


# ---- Sizes, layouts, settings ----


@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize("C", [1, 3, 31, 33, 257])
def test_awkward_sizes(cupy, C, channels_last):
    """The types of data and what else there is to choose go round; N = 1 is among them."""
    for i, S in enumerate([1, 3, 31, 33, 257], C):
        N = {1: 5, 3: 2}.get(S, 1 if C == 257 else 1 + i % 3)
        step = make_step(
            (N, C, S),
            list(DTYPES)[i % len(DTYPES)],
            residual=i % 2 == 1,
            activation=[None, "relu", "leaky_relu"][i % 3],
            channels_last=channels_last,
            seed=i,
        )
        with launched_with(**list(LAUNCHES.values())[i % 4]):
            assert_step(cupy, step, misaligned if i % 5 == 0 else aligned, i)


@pytest.mark.parametrize("shape", [(0, 4, 1), (0, 4, 9), (0, 3, 300), (2, 4, 0), (0, 4, 0)], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_no_data(cupy, dtypes, shape):
    """Without any rank's data, everything stays as it was."""
    for settings in {}, {"momentum": None}, {"activation": "relu", "residual": True}, {"channels_last": True}:
        step = make_step(shape, dtypes, **settings)
        for idle in 0, 2:
            with launched_with(idle=idle):
                actual = compute(cupy, step)
        assert actual["y"].shape == actual["dx"].shape == step.x.shape
        for name in "running_mean", "running_var":
            assert_identical(actual[name], getattr(step, name))
        assert actual["tracked"] == 0
        for name in "dweight", "dbias":
            assert_identical(actual[name], np.zeros_like(step.weight))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_running_statistics_used(cupy, dtypes, residual):
    """Without training; the gradient of the input then has no sums."""
    for activation, shape in zip(
        (None, "relu", "leaky_relu"), [(5, 33, 7), (2, 3, 257), (40, 8, 1)], strict=True
    ):
        step = make_step(shape, dtypes, residual=residual, activation=activation, training=False)
        actual = assert_step(cupy, step)
        for name in "running_mean", "running_var":
            assert_identical(actual[name], getattr(step, name))


def test_without_parameters(cupy):
    for dtypes in DTYPES:
        step = make_step((5, 33, 7), dtypes, weight=None, bias=None)
        expected = expected_of(step)
        actual = compute(cupy, step)
        assert "dweight" not in actual
        assert_results(actual, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_types_of_parameters(cupy, dtype):
    """Each of them may be of the data's type or float32, whatever the others are."""
    names = "weight", "bias", "running_mean", "running_var"
    for number, wide in enumerate(itertools.product([False, True], repeat=4)):
        step = make_step((6, 5, 7), dtype, training=number % 3 > 0)
        arrays = {
            name: getattr(step, name).astype("float32" if is_wide else DTYPES[dtype][1])
            for name, is_wide in zip(names, wide, strict=True)
        }
        step = step._replace(**arrays)
        actual = compute(cupy, step)
        assert_results(actual, expected_of(step))
        for name in names:
            result = actual[{"weight": "dweight", "bias": "dbias"}.get(name, name)]
            assert result.dtype == arrays[name].dtype


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("momentum", [None, 0.0, 0.1, 1.0])
def test_momentum(cupy, dtypes, momentum):
    """Every block reads num_batches_tracked before the last one raises it: 257 channels are many blocks."""
    _, parameter_dtype = DTYPES[dtypes]
    for schedule in schedules(cupy, list(DTYPES).index(dtypes)):
        reference = BatchNorm(257, affine=False, momentum=momentum)
        mean, var = cupy.zeros(257, parameter_dtype), cupy.ones(257, parameter_dtype)
        tracked = cupy.array(np.int64(0))
        for i in range(3):
            x = make_step((2, 257, 3), dtypes, seed=i).x
            reference(x)
            with emulator.schedule(schedule), launched_with(items=1):
                sync_batch_norm(
                    cupy.asarray(x), None, None, mean, var, num_batches_tracked=tracked, momentum=momentum,
                    process_group=ALONE,
                )  # fmt: skip
            assert int(tracked) == i + 1
            if i == 0 or parameter_dtype.itemsize > 2:  # those of 16 bits are rounded at every step
                assert_close(mean.get(), reference.running_mean)
                assert_close(var.get(), reference.running_var)


UNSOUND = [(1.0, 7, 49, 5, 25), (0.0, 7, 50, 5, 25), (0.0, 7, 49, 5, 26), (np.nan, 7, 49, 5, 25)]


def assert_unchanged_by(cupy, dtypes, *trailers):
    """Running statistics stay as they were, if the trailers of the sums tell of a fault."""
    backend, step = the_backend(), make_step((5, 33, 7), dtypes)
    x, y = cupy.asarray(step.x), cupy.empty(step.x.shape, step.x.dtype)
    arrays = cupy.array(step.running_mean), cupy.array(step.running_var), cupy.array(np.int64(3))
    vector, local = backend.statistics(x, trailers[0])
    squares = backend.centered_squares(local, vector, trailers[1], 0) if local else None
    backend.normalize(x, y, BatchSums(vector, squares), Running(*arrays), Affine(), Epilogue())
    assert_identical(arrays[0].get(), step.running_mean)
    assert_identical(arrays[1].get(), step.running_var)
    assert int(arrays[2]) == 3


@pytest.mark.parametrize("trailer", UNSOUND, ids=str)
def test_fault_of_another_rank(cupy, trailer):
    """The host may learn of it later; of the two sums of float64 data either may tell of it."""
    assert_unchanged_by(cupy, "float32", trailer)
    assert_unchanged_by(cupy, "float64", trailer, TRAILER)
    assert_unchanged_by(cupy, "float64", TRAILER, trailer)


def assert_mailboxes(cupy, dtypes, shape):
    """Each kernel behind a sum copies the trailer of that one, and nothing else, to the host."""
    backend, step, boxes = the_backend(), make_step(shape, dtypes), []
    first, second, third = ((float(rank), 7.0 * rank, 49.0, 5.0 + rank, 25.0) for rank in range(3))

    def mailbox():
        boxes.append(np.frombuffer(cupy.cuda.alloc_pinned_memory(512), "float64", 64))
        boxes[-1][:] = -1
        return boxes[-1].ctypes.data

    x, dy = cupy.asarray(as_3d(step, step.x)), cupy.asarray(as_3d(step, step.dy))
    y, dx = cupy.empty(x.shape, x.dtype), cupy.empty(x.shape, x.dtype)
    vector, local = backend.statistics(x, first)
    squares, told = None, [first]
    if local:
        squares, told = backend.centered_squares(local, vector, second, mailbox()), [first, second]
    batch = BatchSums(vector, squares, 1, mailbox())
    normalization, _ = backend.normalize(x, y, batch, None, Affine(), Epilogue())
    sums, _, gradient = backend.reduce_gradients(dy, x, normalization, None, third)
    backend.input_gradient(gradient, x, normalization, dx, sums, ParameterSums(sums), mailbox())
    cupy.cuda.get_current_stream().synchronize()
    for box, trailer in zip(boxes, [*told, third], strict=True):
        np.testing.assert_array_equal(box, [*trailer, *[-1] * 59])


@pytest.mark.parametrize("shape", [(40, 33, 5), (4, 600, 1), (3, 7, 1025), (0, 5, 3)], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_mailboxes(cupy, dtypes, shape):
    with launched_with(items=1):
        assert_mailboxes(cupy, dtypes, shape)


def _channels_last_memory(cupy, a):
    last = cupy.asarray(np.ascontiguousarray(np.moveaxis(a, 1, -1)))
    return last.transpose(0, a.ndim - 1, *range(1, a.ndim - 1))


def _sliced(cupy, a):
    larger = cupy.zeros([2 * n + 1 for n in a.shape], a.dtype)
    view = larger[tuple(slice(1, None, 2) for _ in a.shape)]
    view[...] = cupy.asarray(a)
    return view


def _reversed(cupy, a):
    back = tuple(slice(None, None, -1) for _ in a.shape)
    return cupy.asarray(np.ascontiguousarray(a[back]))[back]


def _transposed(cupy, a):
    return cupy.asarray(np.ascontiguousarray(a.T)).T


VIEWS = {
    "aligned": aligned,
    "misaligned": misaligned,
    "channels_last": _channels_last_memory,
    "sliced": _sliced,
    "reversed": _reversed,
    "transposed": _transposed,
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtypes", ["float32", "float16-float32"])
def test_views(cupy, dtypes, view):
    """Each memory layout for the input, beside another one for the rest."""
    names = list(VIEWS)
    for shape in (6, 5, 4, 3), (3, 8, 16, 16), (600, 5):
        step = make_step((*shape[:2], 1), dtypes)._replace(activation="relu")
        rng = np.random.default_rng(0)
        dtype = step.x.dtype
        x, dy, residual = random_batch(rng, shape, dtype), *(random_array(rng, shape, dtype) for _ in "12")
        step = step._replace(x=x, dy=dy, residual=residual)
        puts = itertools.cycle(VIEWS[names[(names.index(view) + i) % len(names)]] for i in range(3))
        actual = compute(cupy, step, lambda cupy, a, puts=puts: next(puts)(cupy, a))
        assert_results(actual, expected_of(step))


@pytest.mark.parametrize("view", VIEWS)
def test_views_as_output(cupy, view):
    x = random_batch(np.random.default_rng(0), (6, 5, 4, 3))
    out = VIEWS[view](cupy, np.full(x.shape, 7, "f4"))
    y, _ = sync_batch_norm(cupy.asarray(x), process_group=ALONE, out=out)
    assert y is out
    assert_close(out.get(), BatchNorm(5)(x))


@pytest.mark.parametrize("view", ["misaligned", "sliced", "reversed"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_views_as_parameters(cupy, view, training):
    """The running statistics are written through the views."""
    step = make_step((6, 5, 4), training=training)
    names = "weight", "bias", "running_mean", "running_var"
    arrays = {name: VIEWS[view](cupy, getattr(step, name)) for name in names}
    y, _ = sync_batch_norm(cupy.asarray(step.x), **arrays, training=training, process_group=ALONE)
    expected = expected_of(step)
    assert_close(y.get(), expected["y"])
    for name in names[2:]:
        assert_close(arrays[name].get(), expected[name])


# ---- What ranks exchange ----


def as_3d(step, array):
    """Return data of a step as the operations of a backend take them: (outer, C, inner)."""
    return array.reshape(-1, array.shape[-1], 1) if step.channels_last else array


def rounded_to_12_bits(values):
    fraction, _ = np.frexp(values)
    return (np.ldexp(fraction, 12) == np.rint(np.ldexp(fraction, 12))).all()


def assert_vector(cupy, x, put=aligned):
    """Compare what `statistics` makes of (N, C, S) data with what its documentation says, in float64."""
    vector, _ = the_backend().statistics(put(cupy, x), TRAILER)
    N, C, S = x.shape
    *parts, rest = np.split(vector.get(), C * np.arange(1, 5))
    assert_identical(rest, np.array([N * S, *TRAILER]))
    pivots, squared_pivots, sums, squares = parts
    pivot = pivots / (N * S)
    assert rounded_to_12_bits(pivot)
    assert_identical(N * S * pivot, pivots)  # exactly
    assert_identical(N * S * pivot**2, squared_pivots)
    tolerance = TOLERANCE[np.dtype("f8" if x.dtype.itemsize == 8 else "f4")] / 10
    x = x.astype("f8")
    near = np.abs(pivot) * 2.0**-12
    assert ((x.min((0, 2)) - near <= pivot) & (pivot <= x.max((0, 2)) + near)).all()
    terms = x - pivot[:, None]
    for actual, expected in (sums, terms), (squares - 2 * pivot * sums, terms**2):
        assert (np.abs(actual - expected.sum((0, 2))) <= tolerance * np.abs(expected).sum((0, 2))).all()
    assert not the_backend()._workspaces.current().counters.any(), "a counter is not zero after the launch"


@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize("dtypes", ["float64", "float32", "float16", "bfloat16"])
def test_vector_of_the_forward(cupy, dtypes, name):
    for shape in (7, 5, 9), (300, 7, 1), (2, 3, 300):
        with launched_with(**LAUNCHES[name]):
            assert_vector(cupy, make_step(shape, dtypes).x)


@pytest.mark.parametrize("dtypes", ["float64", "float32", "float16", "bfloat16"])
def test_vector_where_products_are_contracted(fast_cupy, dtypes):
    """The pivots are rounded on a GPU too."""
    assert_vector(fast_cupy, make_step((2, 3, 300), dtypes).x)


@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize("dtypes", ["float64", "float32", "float16", "bfloat16"])
def test_vector_of_the_backward(cupy, dtypes, name):
    backend = the_backend()
    for shape in (7, 5, 9), (300, 7, 1), (2, 3, 300):
        step = make_step(shape, dtypes)
        x, dy, y = cupy.asarray(step.x), cupy.asarray(step.dy), cupy.empty(shape, step.x.dtype)
        mean, var = cupy.asarray(step.running_mean), cupy.asarray(step.running_var)
        with launched_with(**LAUNCHES[name]):
            normalization, _ = backend.normalize(x, y, None, Running(mean, var), Affine(), Epilogue())
            vector, local_sums, _ = backend.reduce_gradients(dy, x, normalization, None, TRAILER)
        sums, trailer = np.split(vector.get(), [2 * shape[1]])
        assert_identical(trailer, np.array(TRAILER))
        assert_identical(local_sums.get(), sums)
        dy, xmu = step.dy.astype("f8"), step.x.astype("f8") - step.running_mean.astype("f8")[:, None]
        terms = np.concatenate([dy, dy * xmu], axis=1)
        tolerance = 1e-14 if dtypes == "float64" else 1e-6
        assert (np.abs(sums - terms.sum((0, 2))) <= tolerance * np.abs(terms).sum((0, 2))).all()


def add_up(vectors):
    """Return what an allreduce leaves on each rank."""
    total = functools.reduce(operator.add, vectors)
    return [total.copy() for _ in vectors]


@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_ranks(cupy, dtypes, channels_last):
    """Ranks with many samples, one and none, whose values lie apart: the same as all samples together."""
    backend = the_backend()
    step = make_step((11, 33, 5), dtypes, channels_last=channels_last, activation="leaky_relu", residual=True)
    parts = [slice(0, 7), slice(7, 7), slice(7, 8), slice(8, 11)]
    for rank, part in enumerate(parts):
        step.x[part] += np.asarray(3 * rank, step.x.dtype)
    expected = expected_of(step)
    dtype, parameter_dtype = DTYPES[dtypes]

    with launched_with(items=1):
        xs, dys, residuals = (
            [cupy.asarray(as_3d(step, array[part])) for part in parts]
            for array in (step.x, step.dy, step.residual)
        )
        vectors, local = zip(*[backend.statistics(x, TRAILER) for x in xs], strict=True)
        vectors, squares = add_up(vectors), [None] * len(parts)
        if dtype == np.float64:
            squares = add_up(
                [backend.centered_squares(*pair, TRAILER, 0) for pair in zip(local, vectors, strict=True)]
            )
        ys, dxs, dresiduals = ([cupy.empty(x.shape, dtype) for x in xs] for _ in range(3))
        weight, bias = cupy.asarray(step.weight), cupy.asarray(step.bias)
        runnings = [
            Running(cupy.array(step.running_mean), cupy.array(step.running_var), cupy.array(np.int64(0)), 0.1)
            for _ in parts
        ]
        normalizations = [
            backend.normalize(
                x, y, BatchSums(*sums, len(parts)), running, Affine(weight, bias), Epilogue(residual, 0.01)
            )[0]
            for x, y, *sums, running, residual in zip(
                xs, ys, vectors, squares, runnings, residuals, strict=True
            )
        ]
        reduced = [
            backend.reduce_gradients(*arguments, TRAILER)
            for arguments in zip(dys, xs, normalizations, dresiduals, strict=True)
        ]
        sums, local_sums, gradients = zip(*reduced, strict=True)
        totals = add_up(sums)
        averaged, unreduced = [], []
        types = parameter_dtype, parameter_dtype
        for *arguments, total, local in zip(
            gradients, xs, normalizations, dxs, totals, local_sums, strict=True
        ):
            for found, sums in ((averaged, (total, 1 / len(parts))), (unreduced, (local, 1.0))):
                found.append(backend.input_gradient(*arguments, total, ParameterSums(*sums, *types), 0))

    for total in vectors[0], squares[0], totals[0]:
        if total is not None:
            np.testing.assert_array_equal(total.get()[-len(TRAILER) :], len(parts) * np.array(TRAILER))
    for name, arrays in ("y", ys), ("dx", dxs), ("dresidual", dresiduals):
        together = np.concatenate([array.get() for array in arrays])
        assert_close(together, as_3d(step, expected[name]))
    for running in runnings:
        assert_close(running.mean.get(), expected["running_mean"])
        assert_close(running.var.get(), expected["running_var"])
        assert int(running.num_batches_tracked) == 1
        assert_identical(running.mean.get(), runnings[0].mean.get())
        assert_identical(running.var.get(), runnings[0].var.get())
    for i, name in enumerate(["dweight", "dbias"]):
        for gradients in averaged:
            assert_close(gradients[i].get(), expected[name] / len(parts))
        assert not unreduced[1][i].get().any()  # it has no samples
        if parameter_dtype.itemsize > 2:
            assert_close(sum(gradients[i].get() for gradients in unreduced), expected[name])


@pytest.mark.parametrize("dtypes", DTYPES)
def test_one_value_in_all(cupy, dtypes):
    """One rank has a sample, another has none: y is the bias, and the variance zero."""
    backend, step = the_backend(), make_step((1, 33, 1), dtypes)
    x, empty = cupy.asarray(step.x), cupy.empty((0, 33, 1), step.x.dtype)
    total, _ = add_up([backend.statistics(part, TRAILER)[0] for part in (x, empty)])
    squares = cupy.zeros(33 + len(TRAILER)) if dtypes == "float64" else None
    arrays = (cupy.asarray(getattr(step, name)) for name in ("weight", "bias", "running_mean", "running_var"))
    weight, bias, mean, var = arrays
    running = Running(mean, var, cupy.array(np.int64(0)), 1.0)
    y = cupy.empty(x.shape, x.dtype)
    backend.normalize(x, y, BatchSums(total, squares, 2), running, Affine(weight, bias), Epilogue())
    assert_identical(y.get(), step.bias.astype(step.x.dtype).reshape(x.shape))
    assert_identical(mean.get(), step.x.reshape(-1).astype(step.running_mean.dtype))
    assert not var.get().any()


# ---- Values ----


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", [(12, 7, 5), (12, 8, 1), (3, 7, 257)], ids=str)
def test_not_a_number_and_infinity(cupy, dtypes, shape):
    """They go where the NumPy backend has them go."""
    values = [np.nan, np.inf, -np.inf]
    for settings in {}, {"activation": "relu"}, {"activation": "leaky_relu", "residual": True}:
        step = make_step(shape, dtypes, **settings)
        step.x.reshape(shape)[[0, -1, 5 % shape[0]], [0, 1, 2], [0, -1, shape[2] // 2]] = values
        step.x.reshape(shape)[[0, 1], 3, 0] = np.inf, -np.inf
        step.dy.reshape(shape)[[0, -1, 2], [4, 5, 6], [0, -1, shape[2] // 2]] = values
        if step.residual is not None:
            step.residual[1, 4:7, 0] = values
        with np.errstate(all="ignore"):
            expected = compute(np, step)
        actual = compute(cupy, step)
        for name, array in actual.items():
            array, other = array.astype("f8"), expected[name].astype("f8")
            finite = np.isfinite(other)
            np.testing.assert_array_equal(np.isfinite(array), finite, name)
            if name in ("dx", "dweight"):  # inf - inf or inf, by the order of the terms
                others = np.isfinite(step.dy.astype("f8")).all((0, 2))
                array, other = (
                    np.moveaxis(a, -2, 0)[others] if a.ndim > 1 else a[others] for a in (array, other)
                )
            np.testing.assert_array_equal(
                np.where(np.isfinite(array), 0, array), np.where(np.isfinite(other), 0, other), name
            )
            if name != "tracked":
                assert_close(np.where(finite, actual[name], 0), np.where(finite, expected[name], 0))


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16-float32"])
@pytest.mark.parametrize("shape", [(600, 8, 1), (300, 5, 7), (3, 2, 257), (3, 2, 256)], ids=str)
def test_squares_beyond_float32(cupy, dtypes, shape):
    step = make_step(shape, dtypes)
    step.x[...] = (step.x.astype("f8") * 1e25).astype(step.x.dtype)
    step.x[:, 1] = 1  # beside the others
    for put in aligned, misaligned:
        for launch in LAUNCHES.values():
            with launched_with(**launch), np.errstate(all="ignore"):
                actual, expected = compute(cupy, step, put), expected_of(step)
            others = np.arange(shape[1]) != 1
            assert (actual["running_var"][others] == np.inf).all()
            for name in "y", "dx":
                # Each channel has its own scale.
                for c in range(shape[1]):
                    assert_close(actual[name][:, c], expected[name][:, c])
            assert_close(actual["running_mean"][others], expected["running_mean"][others])
            assert_sums_close(actual["dweight"], expected["dweight"], shape[0] * shape[2])


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", [(40, 8, 1), (12, 5, 7), (3, 2, 257)], ids=str)
def test_constant_channels(cupy, dtypes, shape):
    """Of any value: nothing is left of x - mean, and the variance is zero."""
    step = make_step(shape, dtypes, momentum=1.0)
    for c, value in enumerate([0, 3.3, -1000.7, 1e-3, 12345.6][: shape[1]]):
        step.x[:, c] = value
    constant = step.x[0, :5, 0]
    actual = compute(cupy, step)
    if step.x.dtype == np.float64:
        assert_close(actual["y"][:, :5], expected_of(step)["y"][:, :5], tolerance=1e-8)
    else:
        bias = np.broadcast_to(step.bias[:5].astype(step.x.dtype)[:, None], actual["y"][:, :5].shape)
        np.testing.assert_array_equal(actual["y"][:, :5], bias)
    assert_close(actual["running_mean"][: constant.size], constant.astype("f8"))
    running_var = actual["running_var"][: constant.size].astype("f8")
    assert (running_var >= 0).all()
    assert (running_var <= 1e-12 * np.maximum(1, constant.astype("f8") ** 2)).all()
    assert np.isfinite(actual["dx"].astype("f8")).all()


def assert_zeros_block(cupy, residual):
    """Check that no gradient passes where the input of ReLU is zero, as in torch."""
    step = make_step((40, 8, 1), residual=residual, activation="relu")
    step.x[:, 2:5] = 3
    step.bias[2:5] = 0
    if residual:
        step.residual[:, 2:5] = 0
    actual = assert_step(cupy, step)
    assert not actual["dbias"][2:5].any()


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_activation_of_zero(cupy, residual):
    assert_zeros_block(cupy, residual)


def variance(cupy, x, put=aligned):
    """Return the variance of each channel, as the running statistics get it."""
    C, count = x.shape[1], x.size // x.shape[1]
    mean, var = cupy.zeros(C, x.dtype), cupy.ones(C, x.dtype)
    sync_batch_norm(put(cupy, x), None, None, mean, var, momentum=1.0, process_group=ALONE)
    return var.get().astype("f8") * (count - 1) / count


# Half a million values per channel, in the shapes that are walked in different ways.
LARGE = {
    "pixels": (2, 1, 1 << 18),
    "maps": (10240, 1, 49),
    "samples": (1 << 19, 1, 1),
    "features": (1 << 18, 4, 1),
}


def undisturbed(x):
    pass


def outlier_first(x):
    x.flat[0] += 1e4


def outliers_everywhere(x):
    x.reshape(-1)[:: 1 << 14] += 1e4


def jump(x):
    x[len(x) // 2 :] += 1e4


@pytest.mark.parametrize("disturb", [undisturbed, outlier_first, outliers_everywhere, jump])
@pytest.mark.parametrize("shape", LARGE)
def test_accuracy_of_the_variance(fast_cupy, shape, disturb):
    for offset in 0, 1e3, -1e5:
        x = np.random.default_rng(0).standard_normal(LARGE[shape], np.float32) + np.float32(offset)
        disturb(x)
        expected = np.var(x.astype("f8"), axis=(0, 2))
        for put in aligned, misaligned:
            assert relative_error(variance(fast_cupy, x, put), expected) <= 1e-6


@pytest.mark.parametrize("size", [1 << 16, 1 << 18, 1 << 20])
def test_variance_where_a_thread_meets_two_outliers_first(fast_cupy, size):
    """Among its first three, whose median is one of them. Fewer than 30 values are not summed again."""
    for shape, loads in ((1, 2, size), np.s_[:, :, [0, 4 * THREADS]]), ((size, 4, 1), np.s_[[0, THREADS]]):
        for outlier in 8, 30, 1e3, 1e4, 1e5:
            x = np.random.default_rng(0).standard_normal(shape, np.float32)
            x[loads] = outlier
            expected = np.var(x.astype("f8"), axis=(0, 2))
            assert relative_error(variance(fast_cupy, x), expected) <= 3e-6
            with launched_with(items=launches.MAX_ITEMS):
                assert relative_error(variance(fast_cupy, x), expected) <= 1e-6


@pytest.mark.parametrize("shape", [(400, 3, 50), (9000, 3, 1), (2, 3, 70000)], ids=str)
@pytest.mark.parametrize("offset", [0, 1e5, -1e8])
def test_accuracy_of_the_variance_float64(fast_cupy, shape, offset):
    x = np.random.default_rng(0).normal(offset, 1, shape)
    expected = np.var(x.astype(np.longdouble), axis=(0, 2))
    assert relative_error(variance(fast_cupy, x), expected) <= 1e-12


@pytest.mark.parametrize(
    ("shape", "dtypes"),
    [((8, 3, 12321), "float32"), ((20000, 12, 1), "bfloat16-float32"), ((700, 3, 98), "float64")],
    ids=str,
)
def test_large_step(cupy, shape, dtypes):
    """Threads have as many vectors as usual, and blocks several rounds of loads."""
    step = make_step(shape, dtypes, activation="relu", residual=True)
    assert_results(compute(cupy, step), expected_of(step))


# ---- Memory ----


@sweep(("dtype", "activation", "residual"), kernels.TYPES, [None, "relu", "leaky_relu"], [False, True])
def test_traffic(cupy, dtype, activation, residual):
    """Each kernel reads and writes an element once: what twice the samples in as many blocks add tells."""
    needs_emulator(cupy, "counts bytes")
    for N, C, S in (300, 16, 1), (40, 3, 49), (3, 2, 1031), (2, 1, 4096):
        counts = []
        for samples in N, 2 * N:
            step = make_step((samples, C, S), dtype, activation=activation, residual=residual)
            with recorded() as done, launched_with(items=1 << 20):
                compute(cupy, step)
            counts.append({launch.name.partition("<")[0]: launch for launch in done})
        first, second = counts
        tensor = step.x.nbytes / 2
        mask = mask_bytes(step) / 2 if activation and residual else 0
        expected = {  # bytes read and written
            "statistics": (tensor, 0),
            "normalize": (tensor * (1 + residual), tensor + mask),
            "reduce_gradients": (2 * tensor + mask, tensor * residual),
            "input_gradient": (2 * tensor + (mask if activation != "relu" else 0), tensor),
        }
        assert first.keys() - expected.keys() <= {"centered_squares"}
        for kernel, bytes_ in expected.items():
            more = second[kernel].read - first[kernel].read, second[kernel].written - first[kernel].written
            assert more == bytes_, kernel


def mask_bytes(step):
    """Return how many bytes of the mask there are: one a vector, one an element in the edges of rows."""
    launch = launch_for(step.x.shape, step.x.dtype.itemsize, True, 2)
    N, C, S = step.x.shape
    if launch.columns or S % launch.width == 0:
        return step.x.size // launch.width
    begins = np.arange(N * C) * S
    heads = -begins % launch.width
    vectors = (S - heads) // launch.width
    return int(np.sum(vectors + S - vectors * launch.width))


def test_gradient_without_statistics_reads_no_input(cupy):
    """Nor does it need to, unless an activation's mask has to be computed."""
    needs_emulator(cupy, "counts bytes")
    counts = []
    for N in 300, 600:
        step = make_step((N, 16, 1), training=False)
        with recorded() as done, launched_with(items=1 << 20):
            compute(cupy, step)
        counts.append(done[-1])
    assert counts[0].name.startswith("input_gradient")
    assert counts[1].read - counts[0].read == step.x.nbytes / 2


def test_number_of_launches(cupy):
    for dtypes in DTYPES:
        for training in True, False:
            step = make_step((5, 33, 7), dtypes, activation="relu", residual=True, training=training)
            with recorded() as done:
                compute(cupy, step)
            forward = ["statistics"] * training + ["centered_squares"] * (training and dtypes == "float64")
            expected = [*forward, "normalize", "reduce_gradients", "input_gradient"]
            assert [launch.name.partition("<")[0] for launch in done] == expected


@pytest.mark.parametrize("shape", [(4, 16, 4096), (1 << 13, 32, 1), (1024, 5, 49)], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_memory(cupy, shape, residual):
    """A step needs its outputs, a mask where there is a residual, and a hundredth of the tensor besides."""
    needs_emulator(cupy, "knows the most memory in use")
    rng = np.random.default_rng(0)
    x, dy = (cupy.asarray(random_array(rng, shape)) for _ in "12")
    r = cupy.asarray(random_array(rng, shape)) if residual else None
    gc.collect()
    memory = emulator.memory
    before = memory.live_bytes
    memory.reset_peak()
    _y, saved = sync_batch_norm(x, activation="relu", residual=r, process_group=ALONE)
    mask = x.nbytes / 16 * 1.01 if residual else 0
    if residual and shape[1] * shape[2] % 4:
        mask = x.nbytes / 4
    assert memory.peak_bytes - before <= 1.01 * x.nbytes + mask
    before = memory.live_bytes
    memory.reset_peak()
    sync_batch_norm_backward(dy, saved)
    assert memory.peak_bytes - before <= (1.01 + residual) * x.nbytes


def test_workspace_is_kept(cupy):
    """What blocks add up in is allocated once; NaN of an earlier, larger batch stays there."""
    large = make_step((50, 33, 40))
    compute(cupy, large._replace(x=np.full_like(large.x, np.nan)))
    workspace = the_backend()._workspaces.current()
    arrays = workspace.partials, workspace.counters
    small = make_step((5, 3, 7))
    assert_results(compute(cupy, small), expected_of(small))
    assert the_backend()._workspaces.current() is workspace
    assert (workspace.partials, workspace.counters) == arrays


# ---- Tensors of more than 2^31 elements ----

PROBE = """
// What the threads of some blocks of a large launch visit: width, element, and byte of the mask.
template <int V> struct Recorder {
    template <int WIDTH> struct Loaded {};
    long long *visits, slots;
    int count;

    template <int WIDTH> __device__ Loaded<WIDTH> load(const Place&) const { return {}; }
    template <typename L, typename B> __device__ void begin(const L&, const B&) const {}
    template <int WIDTH> __device__ void use(const Loaded<WIDTH>&, const Place& place)
    {
        if (count < slots) {
            visits[3 * count] = WIDTH;
            visits[3 * count + 1] = place.element;
            visits[3 * count + 2] = place.mask;
        }
        ++count;
    }
};

// parts    [blocks, 2] group and split
// visits   [blocks, THREADS, slots, 3]
// counts   [blocks, THREADS]
template <int V, bool COLUMNS>
__global__ void visit(GEOMETRY, const long long* parts, long long slots, long long* visits, int* counts)
{
    const Geometry g = {N, C, S, lanes, group, per_split, groups, splits};
    const long long index = parts[2 * blockIdx.x], split = parts[2 * blockIdx.x + 1];
    const Part part = {index, split, splits, index * group, static_cast<int>(min(group, C - index * group))};
    const long long thread = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    Recorder<V> body = {visits + thread * slots * 3, slots, 0};
    walk<V, COLUMNS, 4>(g, part, body);
    counts[thread] = body.count;
}

// What each of `every` blocks takes itself to be: [blocks / every, 5]
template <bool REVERSE> __global__ void take_part(GEOMETRY, long long every, long long* parts)
{
    const long long block = blockIdx.y * static_cast<long long>(gridDim.x) + blockIdx.x;
    if (block % every) return;
    const Part part = part_of_block<REVERSE>({N, C, S, lanes, group, per_split, groups, splits});
    long long* to = parts + block / every * 5;
    to[0] = part.index;
    to[1] = part.split;
    to[2] = part.splits;
    to[3] = part.channel;
    to[4] = part.channels;
}
"""

# (N, C, S), itemsize, aligned: above 2^31 elements, and where not by much, samples, rows or maps are many.
HUGE = {
    "columns": ((1 << 21 | 5, 8 * 129, 1), 4, True),
    "columns_16_bit": ((1 << 24 | 3, 520, 1), 2, True),
    "columns_scalar": (((1 << 33) + 77, 1, 1), 8, False),
    "maps": ((1 << 22 | 1, 40, 49), 2, True),
    "maps_scalar": ((1 << 21 | 1, 41, 49), 4, True),
    "rows": ((2, 3, (1 << 31) + 5), 4, True),
    "rows_16_bit": ((1, 2, (1 << 33) + 9), 2, True),
    "rows_scalar": ((3, 2, (1 << 31) - 1), 4, False),
    "many_rows": ((1 << 21 | 7, 3, 2049), 4, True),
    "many_rows_scalar": ((1 << 22 | 7, 5, 513), 2, False),
    "many_channels": ((2, 1 << 22, 1025), 8, True),
    "short_rows": ((5, 1 << 22, 1023), 4, True),
}


def probe(cupy):
    names = [f"visit<{V}, {columns}>" for V, columns in itertools.product((1, 2, 4, 8), ("true", "false"))]
    names += ["take_part<false>", "take_part<true>"]
    return cupy.RawModule(
        code=kernels.source("common.cuh") + PROBE, options=kernels.OPTIONS, name_expressions=tuple(names)
    )


def interesting_blocks(shape, launch):
    """Return groups and splits: the first, the last, and those where elements pass powers of two."""
    N, C, S = shape
    found = set()
    for group in {0, launch.groups // 2, launch.groups - 1}:
        found |= {(group, split) for split in (0, launch.splits // 3, launch.splits - 1)}
    per_row = launch.splits / N
    for power in 31, 32, 33:
        row, rest = divmod((1 << power) - 1, C * S)
        if row < N:
            group = rest // S // launch.group
            inside = 0 if launch.columns else rest % S / S
            split = min(int((row + inside) * per_row), launch.splits - 1)
            found |= {(group, s) for s in (split - 1, split, split + 1) if 0 <= s < launch.splits}
    return sorted(found)


def assert_walk(cupy, name):
    """Compare the kernels' own walk, without memory behind it, with the model of test_launch.py."""
    shape, itemsize, is_aligned = HUGE[name]
    launch = launch_for(shape, itemsize, is_aligned, 132)
    geometry = *shape, *launch[2:]
    assert np.prod(shape, dtype=object) > 2**31
    blocks = interesting_blocks(shape, launch)
    slots = 160 + launch.per_split * launch.lanes // THREADS
    parts = cupy.asarray(np.array(blocks, np.int64))
    visits = cupy.zeros((len(blocks), THREADS, slots, 3), "int64")
    counts = cupy.zeros((len(blocks), THREADS), "int32")
    kernel = probe(cupy).get_function(f"visit<{launch.width}, {str(launch.columns).lower()}>")
    kernel((len(blocks),), (THREADS,), (*geometry, parts, slots, visits, counts))
    visits, counts = visits.get(), counts.get()
    assert counts.max() <= slots
    masks = []
    for block, visited, count in zip(blocks, visits, counts, strict=True):
        visited = visited[np.arange(slots) < count[:, None]]
        vectors, edges = accesses(shape, launch, *block)
        is_vector = visited[:, 0] == launch.width
        np.testing.assert_array_equal(np.sort(visited[is_vector, 1]), vectors)
        np.testing.assert_array_equal(np.sort(visited[~is_vector, 1]), edges)
        masks.append(visited[:, 2])
    masks = np.concatenate(masks)
    assert np.unique(masks).size == masks.size
    assert masks.min() >= 0
    passes = the_backend()._Passes(shape, np.dtype(f"f{itemsize}"), is_aligned, 0)
    assert masks.max() < passes.mask_size


@pytest.mark.parametrize("name", HUGE)
def test_walk_beyond_32_bits(cupy, name):
    assert_walk(cupy, name)


@pytest.mark.parametrize("name", ["columns_16_bit", "rows", "many_rows_scalar", "many_channels"])
@pytest.mark.parametrize("reverse", [False, True])
def test_parts_of_huge_grids(cupy, name, reverse):
    shape, itemsize, is_aligned = HUGE[name]
    launch = launch_for(shape, itemsize, is_aligned, 132)
    every = launch.blocks // 50
    parts = cupy.zeros((launch.blocks // every + 1, 5), "int64")
    kernel = probe(cupy).get_function(f"take_part<{str(reverse).lower()}>")
    kernel((launch.groups, launch.splits), (1,), (*shape, *launch[2:], every, parts))
    for i, part in enumerate(parts.get().tolist()[: -(-launch.blocks // every)]):
        block = launch.blocks - 1 - i * every if reverse else i * every
        split, index = divmod(block, launch.groups)
        channel = index * launch.group
        channels = min(launch.group, shape[1] - channel)
        assert part == [index, split, launch.splits, channel, channels]


def assert_periodic_step(cupy, shape, period):
    """Compare a step on data that repeats every `period` elements of a map; then so do its results."""
    N, C, S = shape
    rng = np.random.default_rng(0)
    x_pattern, dy_pattern = (random_array(rng, (C, period), "float16", offset=0.5) for _ in "12")
    x, dy = cupy.empty(shape, "float16"), cupy.empty(shape, "float16")
    starts = range(0, S, period)
    for array, pattern in (x, x_pattern), (dy, dy_pattern):
        pattern = cupy.asarray(pattern)
        for n, start in itertools.product(range(N), starts):
            array[n, :, start : start + period] = pattern[:, : min(period, S - start)]

    weight, bias = random_channels(rng, C)
    y, saved = sync_batch_norm(x, cupy.asarray(weight), cupy.asarray(bias), process_group=ALONE)
    dx = sync_batch_norm_backward(dy, saved).x

    times = np.full(period, S // period)  # how often each element of the pattern is there
    times[: S % period] += 1
    values, gradients = x_pattern.astype("f8"), dy_pattern.astype("f8")
    mean = (values @ times / S)[:, None]
    xmu = values - mean
    invstd = 1 / np.sqrt((xmu**2 @ times / S)[:, None] + 1e-5)
    sum_dy, sum_dy_xmu = ((terms @ times / S)[:, None] for terms in (gradients, gradients * xmu))
    scale = invstd * weight[:, None]
    expected_y = xmu * scale + bias[:, None]
    expected_dx = (gradients - sum_dy - xmu * invstd**2 * sum_dy_xmu) * scale
    for array, expected in (y, expected_y), (dx, expected_dx):
        first = array[0, :, : min(period, S)]
        assert_close(first.get(), expected[:, : min(period, S)])
        for n, start in itertools.product(range(N), starts):
            part = array[n, :, start : start + period]
            same = first[:, : part.shape[1]]
            assert bool((abs(part - same) <= abs(same) * 2**-10 + 2**-20).all())  # one step of float16


def test_periodic_step(cupy):
    """What the next test does, on small data."""
    assert_periodic_step(cupy, (2, 3, 7001), 997)


@pytest.mark.parametrize("shape", [(3, 1, 2**30 - 1), (2, 2, 2**29 + 8)], ids=str)
def test_more_than_2_to_the_31_elements(cupy, shape):
    if is_emulated(cupy):
        pytest.skip("would take hours in the emulator, whose walk is checked above")
    if cupy.cuda.runtime.memGetInfo()[0] < 5 * 2 * np.prod(shape):
        pytest.skip("not enough memory for x, y, dy and dx")
    assert_periodic_step(cupy, shape, 1 << 22)


@pytest.mark.parametrize(
    ("version", "expressions"), [("13.6.0", False), ("14.1.1", False), ("15.0.0rc1", True)]
)
def test_sources_that_cupy_keeps_on_disk(cupy, monkeypatch, version, expressions):
    """Before 14.2 those alone that are asked for without expressions: they make the instance themselves."""
    asked = []

    class Module:
        def __init__(self, **arguments):
            asked.append(arguments)

        def get_function(self, name):
            return name

    monkeypatch.setattr(cupy, "__version__", version)
    monkeypatch.setattr(cupy, "RawModule", Module)
    for file, name in kernels.normalize("float16", 8, True, False, "RELU"), kernels.centered_squares():
        found = the_backend()._kernel.__wrapped__(file, name)
        assert found == (name if expressions else symbols.symbol(name))
        (arguments,), asked[:] = asked, []
        code, options = kernels.source(file), {"options": kernels.OPTIONS}
        if expressions:
            assert arguments == {"code": code, **options, "name_expressions": (name,)}
        else:
            assert arguments == {"code": code + symbols.instantiation(name), **options}
