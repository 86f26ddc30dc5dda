"""The torch layer in one process: what torch's own tests ask of its batch normalizations, and more."""

import copy
import io
import logging
import pickle
import warnings
from types import SimpleNamespace

import pytest
from mpi4py import MPI

from cupy_syncbn import SingleProcessGroup
from cupy_syncbn.interop.threads import check_threads

torch = pytest.importorskip("torch", reason="torch is not installed")

from cupy_syncbn.interop import torch as interop  # noqa: E402
from cupy_syncbn.interop.torch import SyncBatchNorm, convert_sync_batchnorm  # noqa: E402

pytestmark = pytest.mark.mpi_skip

nn = torch.nn
KINDS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def close(ours, theirs, tolerance=None):
    assert (ours is None) == (theirs is None)
    if theirs is None:
        return
    assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
    tolerance = TOLERANCE.get(theirs.dtype, 0) if tolerance is None else tolerance
    scale = max(1.0, float(theirs.detach().double().abs().max())) if theirs.numel() else 1.0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale, check_stride=True)


def compare(ours, theirs, x, dy, tolerance=None):
    """Compare a forward and a backward of two layers, and all that they leave."""
    theirs.load_state_dict(ours.state_dict())
    inputs = [x.detach().clone().requires_grad_() for _ in range(2)]
    results = [layer(each) for layer, each in zip((ours, theirs), inputs, strict=True)]
    for y in results:
        y.backward(dy)
    close(*results, tolerance)
    close(inputs[0].grad, inputs[1].grad, tolerance)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(mine.grad, other.grad, tolerance)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, buffer in theirs.named_buffers():
        close(ours.get_buffer(name), buffer, tolerance)


# torch's inputs of these modules: arguments of the layer.
ARGUMENTS = {
    "default": ((5,), {}),
    "simple average": ((5, 1e-3, None), {}),
    "momentum": ((5, 1e-3, 0.8), {}),
    "not affine": ((5, 1e-3, 0.8, False), {}),
    "not tracking": ((5, 1e-3, 0.8, True, False), {}),
    "neither": ((5, 1e-3, 0.3, False, False), {}),
    "no bias": ((5,), {"bias": False}),
}
SHAPES = [(4, 5), (4, 5, 3), (2, 5, 6, 4), (2, 5, 4, 3, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torchs_inputs_of_the_module(shape, arguments, training, dtype):
    torch.manual_seed(0)
    given, keywords = ARGUMENTS[arguments]
    ours = SyncBatchNorm(*given, dtype=dtype, **keywords).train(training)
    theirs = KINDS[len(shape)](*given, dtype=dtype).train(training)
    if keywords:
        theirs.register_parameter("bias", None)
    for name, tensor in ours.state_dict().items():
        if tensor.dtype == dtype:
            tensor.uniform_(0.5, 1.5) if name != "running_mean" else tensor.normal_()
    x, dy = 3 * torch.randn(2, *shape, dtype=dtype) + 1
    for _ in range(2):
        compare(ours, theirs, x, dy)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_no_samples(training):
    layer = SyncBatchNorm(5).train(training)
    before = copy.deepcopy(layer.state_dict())
    x = torch.ones(0, 5, 2, 2, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(layer.weight.grad, torch.zeros(5))
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parameters", ["float32", "same"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_data_of_16_bits(dtype, parameters, memory_format):
    torch.manual_seed(0)
    kind = dtype if parameters == "same" else torch.float32
    ours, theirs = SyncBatchNorm(5, dtype=kind), nn.BatchNorm2d(5, dtype=kind)
    x, dy = (each.to(dtype).contiguous(memory_format=memory_format) for each in torch.randn(2, 8, 5, 6, 4))
    compare(ours, theirs, x, dy, TOLERANCE[dtype])
    assert ours.running_var.dtype == kind


def test_sums_of_float16_do_not_overflow():
    """As torch's test of a large batch, and of values whose squares are infinite in float16."""
    x = torch.full((64, 2, 64, 64), 300.0, dtype=torch.float16)
    x[::2] = 500
    layer = SyncBatchNorm(2)
    y = layer(x)
    assert torch.equal(y.unique(), torch.tensor([-1.0, 1.0], dtype=torch.float16))
    torch.testing.assert_close(layer.running_mean, torch.full((2,), 40.0))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_mixed_precision(autocast):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    ours = convert_sync_batchnorm(copy.deepcopy(network))
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        results = [each(x) for each in (ours, network)]
        for y in results:
            y.float().square().sum().backward()
    close(*results, 2e-2)
    close(ours[0].weight.grad, network[0].weight.grad, 2e-2)


STRIDED = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every other": lambda x: x[:, :, ::2],
    "transposed": lambda x: x.transpose(2, 3),
    "flipped batch": lambda x: x.flip(0)[1:],
    "expanded": lambda x: x[:1].expand(4, -1, -1, -1),
    "lazy sign": lambda x: torch.complex(x, -x).conj().imag,
}


@pytest.mark.parametrize("of_dy", ["same", "contiguous", "expanded"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("strides", STRIDED)
def test_strided_input_and_gradient(strides, training, of_dy):
    torch.manual_seed(0)
    x = STRIDED[strides](torch.randn(4, 3, 6, 5, dtype=torch.float64))
    dy = {
        "same": x.cos(),
        "contiguous": x.cos().contiguous(),
        "expanded": torch.ones(1).double().expand_as(x),
    }
    ours, theirs = SyncBatchNorm(3).double().train(training), nn.BatchNorm2d(3).double().train(training)
    leaves = [x.detach().requires_grad_() for _ in range(2)]
    results = [layer(leaf) for layer, leaf in zip((ours, theirs), leaves, strict=True)]
    for y in results:
        y.backward(dy[of_dy])
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=0, atol=1e-11)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=0, atol=1e-11)


def test_memory_format_is_kept():
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = SyncBatchNorm(3)(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_nothing_is_copied(monkeypatch):
    """The arrays of the package are the tensors' memory: what goes in, and what comes out."""
    seen = []
    whole = interop.functional.forward

    def forward(x, *arguments):
        result = whole(x, *arguments)
        seen.append((x.ctypes.data, result.y.ctypes.data, arguments[0].running_mean.ctypes.data))
        return result

    monkeypatch.setattr(interop.functional, "forward", forward)
    layer, x = SyncBatchNorm(3), torch.randn(4, 3)
    y = layer(x)
    assert seen == [(x.data_ptr(), y.data_ptr(), layer.running_mean.data_ptr())]


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_wrong_sizes(name):
    layer = SyncBatchNorm(3)
    wrong = torch.ones(2)
    setattr(layer, name, nn.Parameter(wrong) if name in ("weight", "bias") else wrong)
    with pytest.raises(ValueError, match=f"expected {name} of shape"):
        layer(torch.ones(2, 3))


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1)], ids=str)
def test_one_value_per_channel(shape):
    layer, x = SyncBatchNorm(3), torch.ones(shape)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        layer(x)
    layer.eval()(x)


@pytest.mark.parametrize("shape", [(3,), ()], ids=str)
def test_too_few_axes(shape):
    with pytest.raises(ValueError, match="expected at least 2D input"):
        SyncBatchNorm(3)(torch.ones(shape))


@pytest.mark.parametrize(
    ("argument", "value", "kind"),
    [("eps", -1.0, ValueError), ("momentum", "a", TypeError), ("activation", "gelu", ValueError),
     ("grad_reduction", "all", ValueError), ("process_group", 3, TypeError)],
)  # fmt: skip
def test_wrong_settings(argument, value, kind):
    with pytest.raises(kind, match=argument):
        SyncBatchNorm(3, **{argument: value})


def test_buffers_stay_where_they_are_not_tracked():
    layer = SyncBatchNorm(3)
    before = copy.deepcopy(layer.state_dict())
    layer.track_running_stats = False
    layer(torch.randn(4, 3))
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    layer.track_running_stats = True
    layer(torch.randn(4, 3))
    assert int(layer.num_batches_tracked) == 1


def test_state_dicts_go_both_ways():
    torch.manual_seed(0)
    ours, theirs = SyncBatchNorm(3), nn.SyncBatchNorm(3)
    ours(torch.randn(4, 3))
    theirs.load_state_dict(ours.state_dict())
    again = SyncBatchNorm(3)
    again.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in ours.state_dict().items())
    assert ours.state_dict().get("weight").data_ptr() == ours.weight.data_ptr()
    with pytest.raises(RuntimeError, match="size mismatch"):
        again.load_state_dict(SyncBatchNorm(4).state_dict())


def test_state_dict_without_a_counter():
    """Of torch before 0.4.1: the present one stays."""
    layer, old = SyncBatchNorm(3), nn.BatchNorm1d(3).state_dict()
    layer(torch.randn(4, 3))
    del old["num_batches_tracked"]
    old._metadata = {"": {"version": 1}}
    layer.load_state_dict(old)
    assert int(layer.num_batches_tracked) == 1


def _saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), _saved],
    ids=["copy", "deepcopy", "pickle", "torch.save"],
)  # fmt: skip
def test_copies(copied):
    torch.manual_seed(0)
    layer = SyncBatchNorm(
        3, process_group=SingleProcessGroup(), activation="relu", name="bn", dtype=torch.float64
    )
    x = torch.randn(4, 3, dtype=torch.float64)
    layer(x)
    other = copied(layer)
    assert (other.name, other.activation, other.process_group.size) == ("bn", "relu", 1)
    assert torch.equal(other(x), layer(x))
    assert list(other.state_dict()) == list(layer.state_dict())


def test_no_grad_and_inference_mode():
    x, layer = torch.randn(4, 3), SyncBatchNorm(3)
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        assert layer(x).is_inference()
    assert int(layer.num_batches_tracked) == 2
    assert layer(x).requires_grad


def test_frozen_parameters():
    layer = SyncBatchNorm(3).requires_grad_(False)
    x = torch.randn(4, 3, requires_grad=True)
    layer(x).square().sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None
    layer.weight.requires_grad_(True)
    layer(x.detach()).square().sum().backward()
    assert layer.weight.grad is not None
    assert layer.bias.grad is None


def test_second_derivative_is_an_error():
    layer, x = SyncBatchNorm(3), torch.randn(4, 3, requires_grad=True)
    for loss in layer(x).sum(), layer(x).square().sum():  # whose dy has a graph in the second only
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="has no second derivative"):
            gradient.square().sum().backward()


def test_hooks():
    layer, x, seen = SyncBatchNorm(3), torch.randn(4, 3, requires_grad=True), []
    layer.register_forward_hook(lambda module, inputs, output: seen.append("forward"))
    layer.register_full_backward_hook(lambda module, inputs, outputs: seen.append("backward"))
    layer(x).sum().backward()
    assert seen == ["forward", "backward"]


def test_compiled_by_torch():
    """Which leaves the layer to Python."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), SyncBatchNorm(4), nn.ReLU())
    plain, x = copy.deepcopy(network), torch.randn(5, 3)
    compiled = torch.compile(network, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dynamo's, of what it does not know
        compiled(x).square().sum().backward()
    plain(x).square().sum().backward()
    for ours, theirs in zip(network.parameters(), plain.parameters(), strict=True):
        close(ours.grad, theirs.grad)
    assert int(network[1].num_batches_tracked) == 1


def test_repr():
    layer = SyncBatchNorm(3, activation="relu", grad_reduction="sum")
    assert repr(layer).startswith("SyncBatchNorm(3, eps=1e-05, momentum=0.1, affine=True")
    assert repr(layer).endswith("track_running_stats=True, activation='relu', grad_reduction='sum')")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4, eps=1e-3, momentum=None, dtype=torch.float64)
        self.branches = nn.ModuleDict(
            {"a": nn.Sequential(nn.BatchNorm2d(4, affine=False)), "b": nn.Identity()}
        )
        self.again = self.bn
        self.norm = nn.InstanceNorm2d(4)


def test_convert(caplog):
    block = Block()
    block.bn.eval()
    block.bn.weight.requires_grad_(False)
    block.bn.register_forward_hook(lambda module, inputs, output: output + 1)
    before = copy.copy(dict(block.named_parameters())) | dict(block.named_buffers())
    old = block.bn
    with caplog.at_level(logging.INFO, "cupy_syncbn"):
        assert convert_sync_batchnorm(block) is block
    assert "SyncBatchNorm now: bn, branches.a.0, again" in caplog.text
    after = dict(block.named_parameters()) | dict(block.named_buffers())
    assert after.keys() == before.keys()
    assert all(after[name] is tensor for name, tensor in before.items())
    new = block.bn
    assert (type(new), new.name, new.eps, new.momentum, new.training) == (
        SyncBatchNorm,
        "bn",
        1e-3,
        None,
        False,
    )
    assert block.again is new
    assert type(block.branches["a"][0]) is SyncBatchNorm
    assert type(block.norm) is nn.InstanceNorm2d
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    close(new(x), old(x))
    old.float()  # is a layer of its own still, but for the parameters
    assert new.running_mean.dtype == torch.float64


def test_convert_a_layer_and_one_of_its_own():
    layer = SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm1d(3))
    assert (type(layer), layer.name) == (SyncBatchNorm, None)
    assert convert_sync_batchnorm(layer) is layer
    group = SingleProcessGroup()
    other = convert_sync_batchnorm(nn.Sequential(layer), group)[0]
    assert (other.process_group, layer.process_group) == (group, None)
    assert type(convert_sync_batchnorm(nn.SyncBatchNorm(3))) is SyncBatchNorm


def test_convert_refuses():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module \(got list\)"):
        convert_sync_batchnorm([nn.BatchNorm1d(3)])
    network = nn.Sequential(nn.BatchNorm1d(3), nn.LazyBatchNorm1d())
    with pytest.raises(TypeError, match="after a first batch"):
        convert_sync_batchnorm(network)
    assert type(network[0]) is nn.BatchNorm1d
    network(torch.randn(4, 3))
    assert type(convert_sync_batchnorm(network)[1]) is SyncBatchNorm


class NormAct(nn.BatchNorm2d):
    def forward(self, x):
        return torch.relu(super().forward(x))


def test_convert_warns():
    with pytest.warns(UserWarning, match="found no batch normalization of torch in torch.*Linear"):
        convert_sync_batchnorm(nn.Linear(3, 4))
    with pytest.warns(UserWarning, match="NormAct becomes SyncBatchNorm, and loses .* its own: forward"):
        convert_sync_batchnorm(nn.Sequential(NormAct(3)))


def test_conversion_of_torch_takes_ours_too():
    """It has the layer back, as a layer of torch's."""
    back = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(SyncBatchNorm(3)))
    assert type(back[0]) is nn.SyncBatchNorm


def test_gpu_of_a_tensor_and_stream_of_torch(monkeypatch, cupy):
    """As far as it goes without a GPU: no tensor of torch is on the emulated one."""
    stream = cupy.cuda.Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=stream.ptr))
    before = cupy.cuda.get_current_stream().ptr
    with interop._on_device_of(SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=0))):
        assert cupy.cuda.get_current_stream().ptr == stream.ptr != before
    assert cupy.cuda.get_current_stream().ptr == before


def test_arrays_of_cupy_within_autograd(monkeypatch, cupy):
    """The same, with copies between the tensors and the emulated GPU."""
    monkeypatch.setattr(interop, "_array_of", lambda tensor: cupy.asarray(tensor.detach().numpy().copy()))
    monkeypatch.setattr(interop, "_as_tensor", lambda array: torch.from_numpy(array.get()))
    torch.manual_seed(0)
    ours, theirs = SyncBatchNorm(3, activation="relu"), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    x = torch.randn(4, 3, 2, 2)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for layer, x in zip((ours, theirs), leaves, strict=True):
        layer(x).square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.weight.grad, theirs[0].weight.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("level", "granted"), [("SERIALIZED", True), ("MULTIPLE", False)])
def test_threads(monkeypatch, level, granted):
    monkeypatch.setattr(MPI, "Query_thread", lambda: MPI.THREAD_SERIALIZED)
    check_threads(SingleProcessGroup(), level, "alone")
    if granted:
        check_threads(SimpleNamespace(size=2), level, "two")
    else:
        with pytest.raises(RuntimeError, match="two, for which MPI must grant MPI_THREAD_MULTIPLE"):
            check_threads(SimpleNamespace(size=2), level, "two")
