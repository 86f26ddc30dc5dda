"""Arrays of other libraries as input: torch tensors, JAX arrays, whatever has DLPack or `__array__`."""

import contextlib
import sys

import numpy as np
import pytest

from cupy_syncbn import (
    BatchNorm2d,
    RemoteRankError,
    SyncBatchNorm,
    arrays,
    backends,
    no_backward,
    sync_batch_norm,
    sync_batch_norm_backward,
)
from support.arrays import BFLOAT16, random_batch, randomize
from support.compare import assert_close, assert_identical, assert_unchanged, snapshot
from support.reference import BatchNorm

SHAPE = (6, 4, 3, 5)
TYPES = {
    "float16": np.dtype("f2"),
    "bfloat16": BFLOAT16,
    "float32": np.dtype("f4"),
    "float64": np.dtype("f8"),
}


def exporter(*names):
    """Return a function that hides an array behind some of its interfaces."""

    def wrap(array):
        methods = [getattr(array, name) for name in names]
        return type("Exporter", (), {n: staticmethod(m) for n, m in zip(names, methods, strict=True)})()

    return wrap


by_dlpack = exporter("__dlpack__", "__dlpack_device__")
by_array = exporter("__array__")


def torch_tensor(array, requires_grad=False):
    torch = pytest.importorskip("torch", reason="gives torch tensors, and torch is not installed")
    if array.dtype == BFLOAT16:
        tensor = torch.from_numpy(array.view("i2")).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array)
    return tensor.requires_grad_(requires_grad)


def torch_channels_last(array):
    torch = pytest.importorskip("torch", reason="gives torch tensors, and torch is not installed")
    return torch_tensor(array).to(memory_format=torch.channels_last)


def torch_strided(array):
    return torch_tensor(array).repeat_interleave(2, 3)[..., ::2]


def torch_parameter(array):
    torch = pytest.importorskip("torch", reason="gives torch tensors, and torch is not installed")
    return torch.nn.Parameter(torch_tensor(array))


def jax_array(array):
    jax = pytest.importorskip("jax", reason="gives JAX arrays, and JAX is not installed")
    with jax.enable_x64(True):
        return jax.numpy.asarray(array)


MAKE = {
    "torch": torch_tensor,
    "torch_channels_last": torch_channels_last,
    "torch_strided": torch_strided,
    "torch_requires_grad": lambda array: torch_tensor(array, requires_grad=True),
    "torch_parameter": torch_parameter,
    "jax": jax_array,
    "dlpack": by_dlpack,
    "array": by_array,
}
WITH_GRAPH = ("torch_requires_grad", "torch_parameter")


def without_graph(make):
    """Return a context in which torch keeps no graph, if that is torch's tensor with one."""
    return sys.modules["torch"].no_grad() if make in WITH_GRAPH else contextlib.nullcontext()


def pointer(array):
    """Return the address of an array, as its own library says it."""
    for name in ("data_ptr", "unsafe_buffer_pointer"):
        if hasattr(array, name):
            return getattr(array, name)()
    return np.asarray(array).ctypes.data if hasattr(array, "__array__") else np.from_dlpack(array).ctypes.data


@pytest.mark.mpi_skip
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("make", MAKE)
def test_no_copy_and_the_same_numbers(rng, make, dtype):
    if (make, dtype) == ("dlpack", "bfloat16"):
        pytest.skip("NumPy exports no bfloat16 by DLPack: see the test of errors")
    dtype = TYPES[dtype]
    x, residual, dy = (random_batch(rng, SHAPE, dtype) for _ in "123")
    given = [MAKE[make](array) for array in (x, residual, dy)]
    for array, expected in zip(given, (x, residual, dy), strict=True):
        found = arrays.as_array(array)
        assert type(found) is np.ndarray
        assert found.ctypes.data == pointer(array)
        np.testing.assert_array_equal(found, expected)

    layer, other = (BatchNorm2d(4, activation="relu", dtype="f8" if dtype == "f8" else "f4") for _ in "12")
    with without_graph(make):
        y = layer(given[0], residual=given[1])
    # In the memory order of x, which sums are made in.
    alike = [np.copy(arrays.as_array(array), order="K") for array in given]
    assert_identical(y, other(alike[0], residual=alike[1]))
    with no_backward(other):
        assert y.strides == other(alike[0]).strides
    with without_graph(make):
        gradients = layer.backward(given[2])
    for actual, expected in zip(gradients, other.backward(alike[2]), strict=True):
        assert type(actual) is np.ndarray
        assert_identical(actual, expected)
    assert_identical(layer.weight.grad, other.weight.grad)
    for array, expected in zip(given, (x, residual, dy), strict=True):
        np.testing.assert_array_equal(arrays.as_array(array), expected)


@pytest.mark.parametrize("make", ["torch_requires_grad", "jax", "dlpack", "array"])
def test_training_on_all_ranks(world, rng, make):
    """By the layer, and by the functions; what is given is this rank's part."""
    layer, reference = SyncBatchNorm(4, dtype="float64"), BatchNorm(4)
    randomize(layer, reference, rng)
    part = world.part(SHAPE[0], "empty")
    for _ in range(2):
        x, dy = (random_batch(rng, SHAPE, "float64") for _ in "12")
        own = [MAKE[make](array[part].copy()) for array in (x, dy)]
        with without_graph(make):
            assert_close(layer(own[0]), reference(x), part)
            expected = reference.backward(dy)
            assert_close(layer.backward(own[1]), expected, part)
            _, saved = sync_batch_norm(own[0], layer.weight.data, layer.bias.data)
            assert_close(sync_batch_norm_backward(own[1], saved).x, expected, part)
    assert_close(layer.running_var, reference.running_var)


@pytest.mark.mpi_skip
def test_torch_gradients_go_both_ways(rng):
    """A layer within torch's graph, by a function of torch's."""
    torch = pytest.importorskip("torch", reason="builds a function of torch, which is not installed")
    layer, theirs = BatchNorm2d(4, dtype="float64"), torch.nn.BatchNorm2d(4, dtype=torch.float64)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return torch.from_numpy(layer(x))

        @staticmethod
        def backward(context, dy):
            return torch.from_numpy(layer.backward(dy))

    x = torch_tensor(random_batch(rng, SHAPE, "float64"), requires_grad=True)
    results = []
    for module in Function.apply, theirs:
        (module(x) ** 3).sum().backward()
        results.append(x.grad.numpy().copy())
        x.grad = None
    assert_close(*results, tolerance=1e-11)
    assert_close(layer.weight.grad, theirs.weight.grad.numpy(), tolerance=1e-11)


@pytest.mark.parametrize("make", WITH_GRAPH)
@pytest.mark.parametrize("argument", ["x", "residual", "dy"])
def test_graph_of_torch_that_would_end(world, rng, make, argument):
    """Nothing tells torch that the result depends on it: torch's own .numpy() refuses as well."""
    pytest.importorskip("torch", reason="gives torch tensors, and torch is not installed")  # on all ranks
    layer = SyncBatchNorm(4)
    usual = {name: random_batch(rng, SHAPE) for name in ("x", "residual", "dy")}
    given = usual | ({argument: MAKE[make](usual[argument].copy())} if world.rank == 0 else {})
    match = rf"{argument} without a graph .*use {argument}\.detach\(\)"
    if argument == "dy":
        layer(usual["x"], residual=usual["residual"])
    before = snapshot(layer)
    with pytest.raises(TypeError, match=match) if world.rank == 0 else pytest.raises(RemoteRankError):
        layer.backward(given["dy"]) if argument == "dy" else layer(given["x"], residual=given["residual"])
    assert_unchanged(layer, before)
    if world.rank == 0:
        given[argument] = given[argument].detach()
    layer.forget()
    layer(given["x"], residual=given["residual"])
    layer.backward(given["dy"])


class Unit(np.ndarray):
    """Has an arithmetic of its own, which must not be met."""

    def __array_ufunc__(self, *arguments, **keywords):
        raise NotImplementedError

    def __array_function__(self, *arguments, **keywords):
        raise NotImplementedError


@pytest.mark.parametrize("kind", [np.matrix, np.memmap, np.recarray, Unit])
def test_subclasses_of_numpys_array(world, rng, kind):
    x, dy = (random_batch(rng, (12, 4)) for _ in "12")
    part = world.part(12, "uneven")
    layer, reference = SyncBatchNorm(4), BatchNorm(4)
    with no_backward(layer):
        y = layer(x[part].view(kind), residual=x[part].view(kind))
    assert type(y) is np.ndarray
    out = np.empty_like(y)
    given = out.view(kind)
    assert layer(x[part].view(kind), residual=x[part].view(kind), out=given) is given
    for result in y, out:
        assert_close(result, reference(x, x), part)
    for actual, expected in zip(layer.backward(dy[part].view(kind)), reference.backward(dy), strict=True):
        assert type(actual) is np.ndarray
        assert_close(actual, expected, part)
    assert_close(layer.running_var, reference.running_var)


@pytest.mark.mpi_skip
@pytest.mark.parametrize("kind", [np.memmap, Unit])
def test_evaluation_in_place_of_subclasses(rng, kind):
    x = random_batch(rng, SHAPE)
    layer, given = BatchNorm2d(4).eval(), x.copy().view(kind)
    assert layer(given, out=given) is given
    assert_identical(given.view(np.ndarray), layer(x))


@pytest.mark.mpi_skip
def test_mask(rng):
    x = random_batch(rng, SHAPE)
    masked, match = np.ma.masked_greater(x, 0), r"without a mask \(got numpy\.ma\.\w*\.?MaskedArray\).*filled"
    layer = BatchNorm2d(4)
    wrong(layer, TypeError, match, masked)
    wrong(layer, TypeError, match, x, residual=masked)
    wrong(layer, TypeError, match, x, out=masked)
    layer(x)
    with pytest.raises(TypeError, match=match):
        layer.backward(masked)
    with pytest.raises(TypeError, match=match):
        layer.load_state_dict(layer.state_dict() | {"weight": np.ma.ones(4)})
    layer.backward(x)


def wrong(layer, error, match, *arguments, **keywords):
    before = snapshot(layer)
    with pytest.raises(error, match=match):
        layer(*arguments, **keywords)
    assert_unchanged(layer, before)


@pytest.mark.mpi_skip
@pytest.mark.parametrize(
    "x",
    [[[1.0]], (1.0,), 1.0, np.float32(1), "x", None, b"x", memoryview(b"x")],
    ids=lambda x: type(x).__name__,
)
def test_what_is_no_array(x):
    wrong(BatchNorm2d(4), TypeError, r"expected x to be a NumPy or CuPy array \(got [\w.]+\): ", x)


@pytest.mark.mpi_skip
def test_output_is_numpys(rng):
    """What comes in might be a copy, and what is written to it lost."""
    x = random_batch(rng, SHAPE)
    for out in by_dlpack(x.copy()), by_array(x.copy()):
        wrong(
            BatchNorm2d(4),
            TypeError,
            r"expected out to be a NumPy or CuPy array \(got .*Exporter",
            x,
            out=out,
        )


@pytest.mark.mpi_skip
def test_torch_output(rng):
    x = random_batch(rng, SHAPE)
    wrong(BatchNorm2d(4), TypeError, r"\(got torch.Tensor\)", x, out=torch_tensor(x.copy()))
    out = torch_tensor(np.empty_like(x))
    assert_identical(BatchNorm2d(4)(x, out=out.numpy()), BatchNorm2d(4)(x))
    np.testing.assert_array_equal(out.numpy(), BatchNorm2d(4)(x))


@pytest.mark.mpi_skip
def test_torch_tensors_without_memory_of_the_host(rng):
    layer, x = BatchNorm2d(4), torch_tensor(random_batch(rng, SHAPE))
    wrong(layer, TypeError, "to_dense", x.to_sparse())
    wrong(layer, (TypeError, ValueError), "meta", x.to("meta"))
    wrong(layer, TypeError, "float32.*got int64", x.long())


class Elsewhere:
    """An array on some device, which NumPy cannot reach."""

    def __init__(self, device):
        self.device = device

    def __dlpack_device__(self):
        return self.device, 0

    def __dlpack__(self, **arguments):
        raise BufferError("no memory of the host")


@pytest.mark.mpi_skip
def test_arrays_without_memory_of_the_host():
    for device in 1, 3, 11, 13:
        match = r"NumPy takes by DLPack \(got .*Elsewhere: .*\): convert it"
        wrong(BatchNorm2d(4), TypeError, match, Elsewhere(device))


@pytest.mark.mpi_skip
@pytest.mark.parametrize(
    ("device", "name"), [(8, "an Apple GPU"), (10, "an AMD GPU"), (14, "an Intel GPU"), (99, "another")]
)
def test_arrays_on_other_devices(device, name):
    """They are not copied through the host, though they would let themselves be, as JAX's do."""

    class Copied(Elsewhere):
        def __array__(self, *arguments, **settings):
            pytest.fail("it was copied to the host")

    layer, match = BatchNorm2d(4), f"Copied on {name}.*DLPack's type {device}.*: move it to the CPU"
    wrong(layer, TypeError, match, Copied(device))
    x = np.zeros(SHAPE, "f4")
    for arguments in {"residual": Copied(device)}, {"out": Copied(device)}:
        with pytest.raises(TypeError, match=match):
            layer(x, **arguments)
    layer(x)
    with pytest.raises(TypeError, match=match):
        layer.backward(Copied(device))


@pytest.mark.mpi_skip
def test_cupy_for_amd(monkeypatch, cupy):
    """Its compiler would ask for CUDA's headers."""
    x = cupy.zeros(SHAPE, "float32")
    monkeypatch.setattr(cupy.cuda.runtime, "is_hip", True, raising=False)
    monkeypatch.delenv("CUPY_SYNCBN_DEVICE")
    arrays.why_no_gpu.cache_clear()
    backends._cuda.cache_clear()
    assert BatchNorm2d(4).weight.data.__class__ is np.ndarray
    for call in lambda: BatchNorm2d(4, device="cuda"), lambda: sync_batch_norm(x):
        with pytest.raises(RuntimeError, match=r"for AMD GPUs .* NVIDIA's only"):
            call()
    backends._cuda.cache_clear()


@pytest.mark.mpi_skip
def test_array_on_a_gpu_without_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    layer = BatchNorm2d(4)
    with pytest.raises(ModuleNotFoundError, match="CuPy is not installed") as caught:
        layer(Elsewhere(2))
    assert any("on a GPU. Or move it to the CPU" in note for note in caught.value.__notes__)


@pytest.mark.mpi_skip
def test_array_on_a_gpu_with_a_layer_on_the_cpu(monkeypatch, rng, cupy):
    x = cupy.asarray(random_batch(rng, SHAPE))
    monkeypatch.setattr(cupy, "from_dlpack", lambda array: x)
    wrong(BatchNorm2d(4), TypeError, r"input on the layer's device, cpu .*\.to\('cuda'\)", Elsewhere(2))


@pytest.mark.mpi_skip
def test_bfloat16_by_dlpack_alone():
    """NumPy's DLPack does not know it; the error says how."""
    tensor = torch_tensor(np.ones(SHAPE, BFLOAT16))
    wrong(BatchNorm2d(4), TypeError, "bfloat16 by a view as int16", by_dlpack(tensor))
    both = exporter("__dlpack__", "__dlpack_device__", "__array__")
    assert arrays.as_array(both(tensor.float())).ctypes.data


def test_one_rank_with_another_library(world, rng):
    """Ranks need not be alike."""
    x = random_batch(rng, SHAPE)
    layer, reference = SyncBatchNorm(4), BatchNorm(4)
    part = world.part(SHAPE[0], "uneven")
    own = x[part].copy()
    assert_close(layer(by_dlpack(own) if world.rank == 0 else own), reference(x), part)


@pytest.mark.mpi_skip
def test_on_the_gpu(rng, cupy):
    """An array of the host is not moved to a layer on the GPU."""
    layer = BatchNorm2d(4, device="cuda")
    x = random_batch(rng, SHAPE)
    for array in by_dlpack(x), by_array(x):
        with pytest.raises(TypeError, match=r"input on the layer's device, cuda \(got numpy.ndarray\)"):
            layer(array)


def test_torch_tensor_with_a_lazy_sign(rng):
    torch = pytest.importorskip("torch")
    z = torch.from_numpy(rng.normal(size=(6, 3)) + 1j * rng.normal(size=(6, 3)))
    x = z.conj().imag
    assert x.is_neg()
    layer = SyncBatchNorm(3, dtype="float64")
    assert_identical(layer(x), SyncBatchNorm(3, dtype="float64")(-z.imag.numpy()))
