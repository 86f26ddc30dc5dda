"""Layers and data-parallel training on the CUDA engine, their state, and what is wrong with arguments."""

import gc
import weakref

import numpy as np
import pytest

import cupy_syncbn
from cupy_syncbn import (
    BatchNorm2d,
    DistributedDataParallel,
    Sequential,
    SyncBatchNorm,
    arrays,
    convert_sync_batchnorm,
    sync_batch_norm,
)
from support.arrays import random_array, random_batch, random_channels
from support.compare import assert_close
from support.reference import BatchNorm

SHAPE = (18, 4, 3, 5)


@pytest.fixture
def workspaces(cupy):
    """Return the engine's workspaces; its module can be imported where `cupy` can."""
    from cupy_syncbn.backends.cuda import operations as cuda_operations

    return cuda_operations._workspaces


@pytest.mark.parametrize("grad_reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("split", ["uneven", "first_empty"])
def test_training_steps_equal_the_reference(world, rng, cupy, split, grad_reduction):
    layer = SyncBatchNorm(4, momentum=None, device="cuda", activation="relu", grad_reduction=grad_reduction)
    reference = BatchNorm(4, momentum=None, activation="relu")
    reference.weight, reference.bias = random_channels(rng, 4)
    for name in "weight", "bias":
        getattr(layer, name).data[...] = cupy.asarray(getattr(reference, name))
    part = world.part(len(np.empty(SHAPE)), split)
    expected = {"weight": 0, "bias": 0}
    for _ in range(3):
        x, r, dy = random_batch(rng, SHAPE), *(random_array(rng, SHAPE) for _ in "12")
        y = layer(cupy.asarray(x[part]), residual=cupy.asarray(r[part]))
        dx, dresidual = layer.backward(cupy.asarray(dy[part]))
        assert_close(y.get(), reference(x, r), part)
        for actual, wanted in zip((dx, dresidual), reference.backward(dy), strict=True):
            assert_close(actual.get(), wanted, part)
        for name in expected:
            expected[name] = expected[name] + getattr(reference, f"{name}_grad")
    for name in "weight", "bias":
        gradient = getattr(layer, name).grad
        assert isinstance(gradient, cupy.ndarray)
        total = world.sum(gradient.get()) if grad_reduction == "none" else gradient.get()
        share = world.size if grad_reduction == "mean" else 1
        assert_close(total.astype("f4"), expected[name] / share)
    for name in "running_mean", "running_var":
        assert_close(getattr(layer, name).get(), getattr(reference, name))
    assert int(layer.num_batches_tracked) == 3
    world.assert_same(layer.running_mean.get(), layer.running_var.get())

    layer.eval()
    reference.training = False
    assert_close(layer(cupy.asarray(x)).get(), reference(x))


def test_data_parallel_training_equals_one_process(world, rng, cupy):
    """N ranks with their parts take the same steps as one with the whole batch."""
    batches = [(random_batch(rng, SHAPE), random_array(rng, SHAPE)) for _ in range(3)]
    part = world.part(len(batches[0][0]), "uneven")

    def train(model, step):
        for x, dy in batches:
            model(cupy.asarray(step(x)))
            model.backward(cupy.asarray(step(dy)))
            if isinstance(model, DistributedDataParallel):
                model.reduce_gradients()
            for parameter in model.parameters():
                parameter.data -= parameter.grad * (0.1 * scale)
            model.zero_grad()
        return [array.get() for array in model.state_dict().values()]

    def network(convert):
        layers = Sequential(
            BatchNorm2d(4, device="cuda", activation="leaky_relu"), BatchNorm2d(4, device="cuda")
        )
        return convert_sync_batchnorm(layers) if convert else layers

    scale = 1
    alone = train(network(False), lambda a: a)
    scale = world.size  # gradients were averaged
    together = train(DistributedDataParallel(network(True)), lambda a: a[part])
    for actual, expected in zip(together, alone, strict=True):
        assert_close(actual, expected, tolerance=3e-6)


def test_first_rank_decides_the_start(world, cupy):
    layer = BatchNorm2d(4, device="cuda")
    layer.weight.data[...] = world.rank + 2
    DistributedDataParallel(layer)
    assert layer.weight.data.get().tolist() == [2] * 4


def test_moving_between_devices(rng, cupy):
    layer = BatchNorm2d(4, device="cpu")
    x = random_batch(rng, SHAPE)
    expected = layer(x)
    layer.backward(x)
    state = {name: array.copy() for name, array in layer.state_dict().items()}
    layer.to("cuda")
    for array in (*layer.state_dict().values(), layer.weight.grad):
        assert isinstance(array, cupy.ndarray)
    assert_close(layer(cupy.asarray(x)).get(), expected)
    layer.load_state_dict(state)
    other = BatchNorm2d(4, device="cuda")
    other.load_state_dict(layer.state_dict())
    other.to("cpu")
    for name, array in other.state_dict().items():
        np.testing.assert_array_equal(array, state[name])
    other.to("cuda").reset_parameters("uniform")
    assert 0 < float(other.weight.data.max()) < 1


@pytest.mark.parametrize("variable", ["", "cuda"])
def test_default_device_is_a_gpu_where_there_is_one(monkeypatch, cupy, variable):
    monkeypatch.setenv("CUPY_SYNCBN_DEVICE", variable)
    assert isinstance(BatchNorm2d(4).weight.data, cupy.ndarray)


def test_streams_have_their_own_workspaces(rng, cupy, workspaces):
    x = random_batch(rng, (6, 40, 30))
    expected = BatchNorm(40)(x)
    found = set()
    for stream in (cupy.cuda.Stream.null, cupy.cuda.Stream(), cupy.cuda.Stream()):
        with stream:
            y, _ = sync_batch_norm(cupy.asarray(x))
            found.add(id(workspaces.current()))
            stream.synchronize()
        assert_close(y.get(), expected)
    assert len(found) == 3


def test_a_captured_graph_has_its_own_workspace(monkeypatch, cupy, workspaces):
    """It may be replayed while the stream that it was captured from has other launches under way."""
    with cupy.cuda.Stream(non_blocking=True):
        outside = workspaces.current()
        assert workspaces.current() is outside
        monkeypatch.setattr(cupy.cuda.runtime, "streamIsCapturing", lambda stream: True)
        first = workspaces.current()
        assert first is not outside
        assert workspaces.current() is not first  # nobody tells where one graph ends


def test_a_workspace_keeps_its_stream(cupy, workspaces):
    """Another stream at the address of one that is gone would share the memory of its work."""
    stream = cupy.cuda.Stream()
    with stream:
        workspaces.current()
    reference = weakref.ref(stream)
    del stream
    gc.collect()
    assert reference() is not None


class Tensor:
    """Another library's array on the GPU."""

    def __init__(self, array, *names):
        for name in names:
            setattr(self, name, getattr(array, name))
        self.array = array


@pytest.mark.mpi_skip
def test_cuda_array_interface_comes_in_without_a_copy(rng, cupy):
    x = cupy.asarray(random_batch(rng, SHAPE))
    tensor = Tensor(x, "__cuda_array_interface__")
    assert arrays.as_array(tensor).data.ptr == x.data.ptr
    layer = BatchNorm2d(4, device="cuda")
    y, dx = layer(tensor).get(), layer.backward(tensor).get()
    np.testing.assert_array_equal(y, layer(x).get())
    np.testing.assert_array_equal(dx, layer.backward(x).get())


@pytest.mark.mpi_skip
def test_dlpack_comes_in_without_a_copy(monkeypatch, rng, cupy):
    x = cupy.asarray(random_batch(rng, SHAPE))

    class Exporter:
        def __dlpack_device__(self):
            return 2, 0

        def __dlpack__(self, **arguments):
            return x.__dlpack__(**arguments)

    if "StandIn" in type(cupy).__name__:  # it makes no capsules
        monkeypatch.setattr(cupy, "from_dlpack", lambda array: x)
    assert arrays.as_array(Exporter()).data.ptr == x.data.ptr
    assert isinstance(BatchNorm2d(4, device="cuda")(Exporter()), cupy.ndarray)


def wrong_call(layer, error, match, *arguments, **keywords):
    """A rank's error is its own, the others hear of it, and nothing has changed."""
    before = {name: array.get() for name, array in layer.state_dict().items()}
    with pytest.raises(error, match=match):
        layer(*arguments, **keywords)
    for name, array in layer.state_dict().items():
        np.testing.assert_array_equal(array.get(), before[name])


def test_mixed_arguments(world, rng, cupy):
    x = random_batch(rng, SHAPE)
    layer = SyncBatchNorm(4, device="cuda")
    on_gpu = cupy.asarray(x)
    wrong_call(layer, TypeError, r"input on the layer's device, cuda \(got numpy.ndarray\)", x)
    with pytest.raises(TypeError, match=r"weight on the device of the input .*numpy"):
        sync_batch_norm(on_gpu, np.ones(4, "f4"))
    wrong_call(layer, TypeError, "residual on the device of the input .*numpy", on_gpu, residual=x)
    wrong_call(layer, TypeError, "out on the device of the input .*numpy", on_gpu, out=x)
    layer(on_gpu)
    with pytest.raises(TypeError, match=r"dy on the device of the input .*numpy"):
        layer.backward(x)
    assert layer.backward(on_gpu).shape == SHAPE
    on_cpu = SyncBatchNorm(4, device="cpu")
    with pytest.raises(
        TypeError, match=r"input on the layer's device, cpu \(got .*ndarray\): .*\.to\('cuda'\)"
    ):
        on_cpu(on_gpu)


@pytest.mark.mpi(min_size=2)
def test_one_rank_with_a_wrong_array(world, rng, cupy):
    """It hears what is wrong, the others which rank failed."""
    x = random_batch(rng, SHAPE)
    layer = SyncBatchNorm(4, device="cuda", name="stem")
    layer(cupy.asarray(x))
    before = layer.running_mean.get()
    wrong = world.rank == world.size - 1
    error, match = (TypeError, "numpy") if wrong else (cupy_syncbn.RemoteRankError, f"rank {world.size - 1} ")
    with pytest.raises(error, match=match):
        layer(x if wrong else cupy.asarray(x))
    np.testing.assert_array_equal(layer.running_mean.get(), before)


def test_unsupported_types(world, cupy):
    layer = SyncBatchNorm(4, device="cuda")
    for dtype in ("int32", "complex64", "bool"):
        wrong_call(layer, TypeError, f"float32.*got {dtype}", cupy.zeros(SHAPE, dtype))
    wrong_call(layer, TypeError, "float32 for float32|float64", cupy.zeros(SHAPE, "float64"))


def test_array_on_another_device(monkeypatch, world, cupy):
    layer = SyncBatchNorm(4, device="cuda")
    x = cupy.zeros(SHAPE, "float32")
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 1)
    wrong_call(layer, ValueError, r"current device, 1 \(got one on 0\): call bind_device", x)


def test_overlapping_output(world, cupy):
    layer = SyncBatchNorm(4, device="cuda")
    buffer = cupy.ones((2, *SHAPE), "float32")
    match = "out to share no memory with the input"
    wrong_call(layer, ValueError, match, buffer[0], out=buffer[0])
    shifted = buffer.reshape(-1)[8 : 8 + buffer[0].size].reshape(SHAPE)
    wrong_call(layer, ValueError, match, buffer[0], out=shifted)
    wrong_call(
        layer, ValueError, "with residual", buffer[0], out=buffer[1], residual=buffer[1]
    )  # fmt: skip
    layer(buffer[0], out=buffer[1])


@pytest.mark.mpi_skip
@pytest.mark.parametrize(
    ("count", "match"),
    [
        (0, "sees no GPU: see what nvidia-smi and CUDA_VISIBLE_DEVICES say"),
        (None, "driver .*is insufficient"),
    ],
)
def test_no_gpu_to_compute_on(monkeypatch, cupy, count, match):
    class NoDriverError(cupy.cuda.runtime.CUDARuntimeError):
        def __init__(self):
            pass

        def __str__(self):
            return "CUDA driver version is insufficient"

    def devices():
        if count is None:
            raise NoDriverError
        return count

    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", devices)
    arrays.why_no_gpu.cache_clear()
    for call in (lambda: BatchNorm2d(4, device="cuda"), cupy_syncbn.bind_device):
        with pytest.raises(RuntimeError, match=match):
            call()
    monkeypatch.setenv("CUPY_SYNCBN_DEVICE", "")
    assert isinstance(BatchNorm2d(4).weight.data, np.ndarray)


@pytest.mark.mpi_skip
def test_without_cupy(monkeypatch, cupy):
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    arrays.why_no_gpu.cache_clear()
    with pytest.raises(ModuleNotFoundError, match="install 'cupy-cuda13x"):
        BatchNorm2d(4, device="cuda")


def test_bind_device(cupy, world):
    number = cupy_syncbn.bind_device()
    assert number == cupy.cuda.runtime.getDevice()
    assert number == cupy_syncbn.local_rank() % cupy.cuda.runtime.getDeviceCount()


def test_buffers_of_rank_0_on_the_gpu(world, rng, cupy):
    """Those of a local layer; of items of 8, 4 and 2 bytes, each where its type wants it."""
    local, half = BatchNorm2d(4, device="cuda"), BatchNorm2d(3, device="cuda", dtype="float16")
    model = DistributedDataParallel(Sequential(SyncBatchNorm(4, device="cuda"), local))
    model.module.layers.append(half)  # is not called
    local.running_mean[...] = cupy.asarray(np.float32(world.rank + rng.normal(size=4)))
    half.running_var[...] = cupy.asarray(np.float16(world.rank + rng.normal(size=3)))
    expected = {name: buffer.get() for name, buffer in model.named_buffers()}
    expected = world.comm.bcast(expected)

    def forward(x):
        for name, buffer in model.named_buffers():
            np.testing.assert_array_equal(buffer.get(), expected[name])
        return x

    model.module.forward = forward
    model(cupy.asarray(random_batch(rng, SHAPE)))
