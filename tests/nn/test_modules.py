"""What modules do as torch's: their parts, types, parameters that are alone, Sequential, what they print."""

import copy
import pickle

import numpy as np
import pytest

from cupy_syncbn import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    DistributedDataParallel,
    Module,
    Parameter,
    RankMismatchError,
    Sequential,
    SingleProcessGroup,
    SyncBatchNorm,
    convert_sync_batchnorm,
)
from support.arrays import BFLOAT16, on_host, random_array, random_batch, random_channels
from support.compare import assert_close, assert_identical
from support.reference import BatchNorm

C, SHAPE = 4, (12, 4, 3, 2)
TYPES = {"float16": "f2", "bfloat16": BFLOAT16, "float32": "f4", "float64": "f8"}
SHORT = {"float16": "half", "bfloat16": "bfloat16", "float32": "float", "float64": "double"}


class Block(Module):
    def __init__(self, make=BatchNorm1d):
        self.stem = make(1)
        self.branches = [Sequential(make(2), make(3)), {"t": make(4)}]
        self.again = self.stem


def torch_block(torch):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            make = torch.nn.BatchNorm1d
            self.stem = make(1)
            self.branches = torch.nn.Sequential(make(2), make(3))
            self.head = make(4)
            self.again = self.stem

    return Net()


def sizes(modules):
    return [getattr(module, "num_features", type(module).__name__) for module in modules]


def test_modules_and_children():
    net = Block()
    assert sizes(net.modules()) == ["Block", 1, "Sequential", 2, 3, 4]
    assert sizes(net.children()) == [1, "Sequential", 4]
    assert [name for name, _ in net.named_children()] == ["stem", "branches.0", "branches.1.t"]
    assert [name for name, _ in net.branches[0].named_children()] == ["0", "1"]
    assert list(net.stem.children()) == []
    assert next(net.modules()) is net


def test_they_are_torchs():
    torch = pytest.importorskip("torch", reason="compares with torch, which is not installed")
    net, theirs = Block(), torch_block(torch)
    assert sizes(net.children()) == sizes(theirs.children())
    seen, theirs_seen = [], []
    assert net.apply(seen.append) is net
    theirs.apply(theirs_seen.append)
    assert sizes(seen)[:-1] == sizes(theirs_seen)[:-1] == [1, 2, 3, "Sequential", 4]
    assert seen[-1] is net


def test_apply_meets_each_once():
    """One that is shared too, and modules in a circle; a function may change the module."""
    net, seen = Block(), []
    net.stem.parent = net
    net.apply(lambda module: seen.append(module) or vars(module).pop("again", None))
    assert len(seen) == len(set(map(id, seen))) == 6
    assert "again" not in vars(net)


def test_apply_initializes():
    def initialize(module):
        if isinstance(module, BatchNorm1d):
            module.weight.data[...] = 2

    net = Block().apply(initialize)
    assert all((p.data == 2).all() for name, p in net.named_parameters() if name.endswith("weight"))


def test_zero_grad(xp, device, rng):
    layer = SyncBatchNorm(C, device=device, process_group=SingleProcessGroup())
    x = xp.asarray(random_batch(rng, SHAPE))
    layer.backward(layer(x))
    grad = layer.weight.grad
    layer.bias.grad = None
    layer.zero_grad(set_to_none=False)
    assert layer.weight.grad is grad
    assert on_host(grad).tolist() == [0] * C
    assert layer.bias.grad is None
    layer.zero_grad(set_to_none=True)
    assert layer.weight.grad is None


@pytest.mark.parametrize("grad", [np.float32(3), np.broadcast_to(np.float32(3), 2), np.full(2, np.nan, "f4")])
def test_zero_grad_of_other_gradients(grad):
    """Of NumPy's sums over all axes, read-only ones, and not a number."""
    net = Module()
    net.scale = Parameter(np.ones(np.shape(grad), "f4"))
    net.scale.grad = grad
    net.zero_grad(False)
    assert_identical(net.scale.grad, np.zeros(np.shape(grad), "f4"))
    net.scale.accumulate(np.ones(np.shape(grad), "f4"))
    assert (net.scale.grad == 1).all()


@pytest.mark.parametrize("mode", ["eval", "train", 1, 0, None, np.float32(1), []])
def test_train_takes_a_bool(mode):
    net = Block()
    with pytest.raises(ValueError, match="True or False"):
        net.train(mode)
    assert all(module.training is True for module in net.modules())
    net.train(np.bool_(False))
    assert all(module.training is False for module in net.modules())


# Types


def filled(dtype, device, rng, xp):
    layer = SyncBatchNorm(C, dtype=dtype, device=device, process_group=SingleProcessGroup())
    for name, values in zip(("weight", "bias"), random_channels(rng, C, "f8"), strict=True):
        layer.load_state_dict({name: values}, strict=False)
        getattr(layer, name).grad = xp.asarray(rng.normal(size=C).astype(TYPES[dtype]))
    layer.load_state_dict(
        {"running_mean": rng.normal(size=C), "num_batches_tracked": 2**40 + 1}, strict=False
    )
    return layer


@pytest.mark.parametrize("way", ["keyword", "argument", "name"])
@pytest.mark.parametrize("new", TYPES)
@pytest.mark.parametrize("old", ["float32", "float64", "bfloat16"])
def test_types_are_changed(device, xp, rng, old, new, way):
    layer = filled(old, device, rng, xp)
    other = SyncBatchNorm(C, dtype=new, device=device, process_group=SingleProcessGroup())
    other.load_state_dict(layer.state_dict())
    grads = [on_host(parameter.grad).astype(TYPES[new]) for parameter in layer.parameters()]
    x = xp.asarray(random_batch(rng, SHAPE, TYPES[old]))
    layer.backward(layer.eval()(x))  # with the old type, whose plan is known
    layer.train()
    for parameter, grad in zip(layer.parameters(), grads, strict=True):
        parameter.grad = xp.asarray(grad.astype(TYPES[old]))
    ways = {
        "keyword": lambda: layer.to(dtype=TYPES[new]),
        "argument": lambda: layer.to(new),
        "name": getattr(layer, SHORT[new]),
    }
    assert ways[way]() is layer
    assert layer.dtype == np.dtype(TYPES[new])
    for name, array in layer.state_dict().items():
        assert isinstance(array, xp.ndarray)
        assert_identical(on_host(array), on_host(other.state_dict()[name]))
    assert int(layer.num_batches_tracked) == 2**40 + 1
    for parameter, grad in zip(layer.parameters(), grads, strict=True):
        assert_identical(on_host(parameter.grad), grad)
    x, dy = (xp.asarray(random_array(rng, SHAPE, TYPES[new])) for _ in "12")
    assert_identical(on_host(layer(x)), on_host(other(x)))
    assert_identical(on_host(layer.backward(dy)), on_host(other.backward(dy)))
    assert layer.weight.grad.dtype == np.dtype(TYPES[new])
    with pytest.raises(TypeError):
        layer(xp.asarray(random_batch(rng, SHAPE, "f4" if new == "float64" else "f8")))


def test_device_and_type_at_once(cupy, rng):
    net = Sequential(BatchNorm2d(C), BatchNorm2d(C, affine=False))
    assert net.to("cuda", "float64") is net
    for name, array in net.state_dict().items():
        assert isinstance(array, cupy.ndarray)
        assert array.dtype == (np.int64 if "tracked" in name else np.float64)
    net.to(device="cpu", dtype=np.float16)
    assert {array.dtype for array in net.state_dict().values()} == {np.dtype("f2"), np.dtype("i8")}
    assert all(isinstance(array, np.ndarray) for array in net.state_dict().values())


class Odd(Module):
    """Arrays of types that stay, and arrays in several places."""

    def __init__(self, xp):
        self.scale = Parameter(xp.ones(2, "f4"))
        self.counts = Parameter(xp.arange(3))
        self.phase = Parameter(xp.ones(2, "c8"))
        self.register_buffer("mask", xp.ones(2, bool))
        self.register_buffer("mean", xp.ones(2, "f4"))
        self.register_buffer("same", self.mean)
        self.register_buffer("nothing", None)
        self.tied = Parameter(self.scale.data)


def test_other_types_stay(xp):
    net = Odd(xp)
    arrays = net.state_dict()
    net.double()
    for name in "counts", "phase", "mask":
        assert net.state_dict()[name] is arrays[name]
    for name in "scale", "mean":
        assert net.state_dict()[name].dtype == np.float64
    assert net.mean is net.same
    assert net.scale.data is net.tied.data
    assert net.nothing is None
    assert net.to(np.float64).mean is net.mean


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("tpu",), ValueError, "'cpu' or 'cuda', or a type"), (("fp8",), ValueError, "'float16'"),
        ((), TypeError, "neither"), ((None,), TypeError, "neither"), (("cpu", "int32"), TypeError, "float16"),
        ((np.int64,), TypeError, "float16"), (("cpu", "complex64"), TypeError, "float16"),
        (("float32", "float32"), ValueError, "device"),
    ],
)  # fmt: skip
def test_targets_that_there_are_not(arguments, error, message):
    net = Sequential(BatchNorm1d(2))
    arrays = net.state_dict()
    with pytest.raises(error, match=message):
        net.to(*arguments)
    assert all(net.state_dict()[name] is array for name, array in arrays.items())


@pytest.mark.filterwarnings("error")
def test_values_beyond_a_type_are_infinite():
    layer = BatchNorm1d(2)
    layer.weight = np.array([1e30, -1e30])
    with np.errstate(all="raise"):
        assert layer.half().weight.data.tolist() == [np.inf, -np.inf]


@pytest.mark.mpi(min_size=2)
def test_ranks_compare_types_again(world, rng):
    layer = SyncBatchNorm(C)
    layer.backward(layer(random_batch(rng, SHAPE)))
    layer.double()
    layer(random_batch(rng, SHAPE, "f8"))
    layer.backward(random_array(rng, SHAPE, "f8"))
    if world.rank == 0:
        layer.float()
    x = random_batch(rng, SHAPE, "f4" if world.rank == 0 else "f8")
    with pytest.raises(RankMismatchError, match=r"first call of .* with float32"):
        layer(x)


# Weight or bias alone


@pytest.mark.parametrize("present", ["weight", "bias"])
@pytest.mark.parametrize("training", [True, False])
def test_one_parameter_alone(world, rng, device, xp, present, training):
    layer = SyncBatchNorm(C, device=device, bias=present == "bias", activation="relu").train(training)
    reference = BatchNorm(C, activation="relu")
    reference.training = training
    values = dict(zip(("weight", "bias"), random_channels(rng, C), strict=True))
    if present == "bias":
        layer.weight = None
    reference.weight, reference.bias = np.ones(C), np.zeros(C)
    getattr(layer, present).data[...] = xp.asarray(values[present])
    setattr(reference, present, values[present].astype("f8"))
    assert [name for name, _ in layer.named_parameters()] == [present]
    part = world.part(SHAPE[0])
    x, dy = random_batch(rng, SHAPE), random_array(rng, SHAPE)
    assert_close(on_host(layer(xp.asarray(x[part]))), reference(x), part)
    assert_close(on_host(layer.backward(xp.asarray(dy[part]))), reference.backward(dy), part)
    total = world.sum(on_host(getattr(layer, present).grad))
    assert_close(total.astype("f4"), getattr(reference, f"{present}_grad"))


@pytest.mark.parametrize("make", [SyncBatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d])
def test_without_bias(make, rng):
    layer = make(C, bias=False)
    assert layer.bias is None
    assert list(layer.state_dict()) == ["weight", "running_mean", "running_var", "num_batches_tracked"]
    layer.weight.data[...] = 5
    layer.reset_parameters()
    assert layer.weight.data.tolist() == [1] * C
    other = make(C)
    with pytest.raises(KeyError, match="bias"):
        other.load_state_dict(layer.state_dict())
    with pytest.raises(KeyError, match="bias"):
        layer.load_state_dict(other.state_dict())
    assert make(C, affine=False, bias=True).bias is None
    torch = pytest.importorskip("torch", reason="compares with torch, which is not installed")
    if "bias=False" in repr(torch.nn.BatchNorm1d(1)) or torch.__version__ >= "2.13":
        theirs = getattr(torch.nn, make.__name__)(C, bias=False)
        assert list(theirs.state_dict()) == list(layer.state_dict())
        layer.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("gone", ["weight", "bias"])
def test_a_parameter_that_is_taken_away(gone, rng):
    layer = convert_sync_batchnorm(BatchNorm1d(C), SingleProcessGroup())
    kept = "bias" if gone == "weight" else "weight"
    setattr(layer, gone, None)
    getattr(layer, kept).data[...] = 5
    layer.reset_parameters()
    assert getattr(layer, kept).data.tolist() == [1 if kept == "weight" else 0] * C
    assert gone not in layer.state_dict()
    x = random_batch(rng, (6, C))
    layer.backward(layer(x))
    assert getattr(layer, kept).grad.shape == (C,)


# Sequential


def norms(*sizes):
    return [BatchNorm1d(size) for size in sizes]


def test_layers_are_added_and_removed():
    net = Sequential(*norms(1, 2))
    assert net.append(BatchNorm1d(3)) is net
    assert net.insert(0, BatchNorm1d(4)) is net
    assert net.extend(Sequential(*norms(5, 6))) is net
    assert sizes(net) == [4, 1, 2, 3, 5, 6]
    net[1], net[-1] = norms(7, 8)
    assert sizes(net) == [4, 7, 2, 3, 5, 8]
    net[1:3] = norms(9)
    del net[-1], net[:1]
    assert sizes(net) == [9, 3, 5]
    assert len(net) == 3
    assert net[1] in net
    assert [name for name, _ in net.named_parameters()] == [
        f"{i}.{name}" for i in range(3) for name in ("weight", "bias")
    ]
    assert net.extend(net) is net
    assert len(net) == 6


def test_slices_are_sequentials(rng):
    layers = [BatchNorm1d(C) for _ in range(4)]
    net = Sequential(*layers)
    part = net[1:3]
    assert type(part) is Sequential
    assert list(part) == layers[1:3]
    assert next(iter(part.state_dict())) == "0.weight"
    x = random_batch(rng, (6, C))
    assert_identical(part(x), layers[2](layers[1](x)))
    assert list(net[::-2]) == [layers[3], layers[1]]
    part.append(BatchNorm1d(C))  # a list of its own
    assert len(net) == 4
    assert net.eval()[:2].training is False
    assert len(net[4:]) == 0


class Bottleneck(Sequential):
    def __init__(self, channels):
        super().__init__(*norms(channels, channels))


def test_slices_of_subclasses():
    """They need no argument of the subclass."""
    assert sizes(Bottleneck(3)[:1]) == [3]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ([BatchNorm1d(1)], r"got list.*Sequential\(\*layers\)"), (np.tanh, "ufunc.*write a Module"),
        (None, "NoneType"), ("relu", "str"), (BatchNorm1d, "type"), (Parameter(np.ones(1)), "Parameter"),
    ],
)  # fmt: skip
def test_other_objects_are_refused(layer, message):
    net = Sequential(*norms(1, 2))
    uses = [
        lambda: Sequential(BatchNorm1d(1), layer),
        lambda: net.append(layer),
        lambda: net.insert(0, layer),
        lambda: net.extend([BatchNorm1d(3), layer]),
        lambda: net.__setitem__(0, layer),
        lambda: net.__setitem__(slice(0, 1), [layer]),
    ]
    for use in uses:
        with pytest.raises(TypeError, match=f"layers of a Sequential to be Modules .*{message}"):
            use()
    assert sizes(net) == [1, 2]


def test_indices_that_there_are_not():
    net = Sequential(*norms(1))
    for use in (lambda: net[1], lambda: net.__setitem__(1, BatchNorm1d(1)), lambda: net.__delitem__(-2)):
        with pytest.raises(IndexError):
            use()


# What they print


def test_what_modules_print():
    net = Sequential(BatchNorm1d(1), Sequential(BatchNorm2d(2, momentum=None)), Block(), Module())
    assert repr(net).split("\n") == [
        "Sequential(",
        "  (0): BatchNorm1d(1, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)",
        "  (1): Sequential(",
        "    (0): BatchNorm2d(2, eps=1e-05, momentum=None, affine=True, track_running_stats=True)",
        "  )",
        "  (2): Block(",
        "    (stem): BatchNorm1d(1, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)",
        "    (branches.0): Sequential(",
        "      (0): BatchNorm1d(2, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)",
        "      (1): BatchNorm1d(3, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)",
        "    )",
        "    (branches.1.t): BatchNorm1d(4, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)",
        "    (again): BatchNorm1d(1, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)",
        "  )",
        "  (3): Module()",
        ")",
    ]
    assert repr(Sequential()) == "Sequential()"


def test_it_is_what_torch_prints():
    torch = pytest.importorskip("torch", reason="compares with torch, which is not installed")

    def nested(nn):
        shared = nn.BatchNorm1d(3, eps=0.1, affine=False, momentum=None)
        return nn.Sequential(nn.BatchNorm2d(2), nn.Sequential(shared, nn.Sequential()), shared)

    import cupy_syncbn

    theirs = repr(nested(torch.nn)).replace("bias=True, ", "").replace("bias=False, ", "")
    assert repr(nested(cupy_syncbn)) == theirs


def test_a_module_that_tells_of_itself():
    class Linear(Module):
        text = "in=3, out=4"

        def extra_repr(self):
            return self.text

    assert repr(Linear()) == "Linear(in=3, out=4)"
    both = Linear()
    both.norm, both.text = BatchNorm1d(1), "a=1\nb=2"
    lines = repr(both).split("\n")
    assert lines[:3] == ["Linear(", "  a=1", "  b=2"]
    assert lines[3].startswith("  (norm): BatchNorm1d(1, ")
    both.norm.owner = both  # a circle
    assert "..." in repr(both)


def test_data_parallel_prints_its_module():
    model = DistributedDataParallel(Sequential(BatchNorm1d(1)), SingleProcessGroup())
    assert repr(model).split("\n") == [
        "DistributedDataParallel(",
        "  (module): Sequential(",
        "    (0): BatchNorm1d(1, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)",
        "  )",
        ")",
    ]


USUAL = "4, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True"


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"bias": False}, {"dtype": "float16"}, {"channels_last": True}, {"activation": "relu"},
        {"activation": ("leaky_relu", 0.2)}, {"grad_reduction": "mean"}, {"name": "stem"},
        {"bias": False, "dtype": "bfloat16", "activation": "relu", "name": "head"},
    ],
)  # fmt: skip
def test_layers_print_settings(settings):
    shown = "".join(f", {name}={value!r}" for name, value in settings.items())
    assert repr(SyncBatchNorm(4, **settings)) == f"SyncBatchNorm({USUAL}{shown})"
    assert repr(BatchNorm3d(4, **settings)) == f"BatchNorm3d({USUAL}{shown})"
    layer = eval(repr(SyncBatchNorm(4, **settings)))
    assert repr(layer) == f"SyncBatchNorm({USUAL}{shown})"


def test_layers_print_group_and_device(cupy):
    layer = SyncBatchNorm(4, device="cuda", process_group=SingleProcessGroup(), affine=False)
    assert repr(layer).endswith(
        "track_running_stats=True, device='cuda', process_group=SingleProcessGroup())"
    )
    layer.track_running_stats = False
    layer.running_mean = layer.running_var = None
    assert repr(layer.half()).startswith("SyncBatchNorm(4, ")


# Pickles of versions that kept less


NEWER = [
    "channels_last",
    "activation",
    "grad_reduction",
    "name",
    "dtype",
    "_group",
    "_calls_made",
    "_introduced",
]


def without(thing, *names):
    """Return a pickle's copy of an object as a version without some attributes had made it."""
    other = copy.copy(thing)
    for name in names:
        del vars(other)[name]
    return pickle.loads(pickle.dumps(other))


@pytest.mark.parametrize("make", [SyncBatchNorm, BatchNorm2d])
@pytest.mark.parametrize("name", [*NEWER, "_model", "all"])
def test_layers_of_older_versions(world, rng, make, name):
    layer = make(C)
    x = random_batch(rng, SHAPE)
    names = [*NEWER, "_model"] if name == "all" else [name]
    older = without(layer, *names)
    for module in layer, older:
        module.backward(module(x))
    assert repr(older) == repr(layer)
    for key, array in layer.state_dict().items():
        assert_identical(older.state_dict()[key], array)
    assert_identical(older.weight.grad, layer.weight.grad)
    assert type(older.process_group) is type(layer.process_group)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("settings", [{}, {"affine": False}, {"track_running_stats": False}, {"bias": False}])
def test_the_type_of_layers_of_older_versions(dtype, settings):
    assert without(BatchNorm1d(C, dtype=dtype, **settings), "dtype").dtype == np.dtype(TYPES[dtype])


@pytest.mark.parametrize("name", ["num_features", "eps", "momentum", "weight", "running_var"])
def test_layers_that_lack_too_much_say_so(name):
    layer = SyncBatchNorm(C)
    with pytest.raises(RuntimeError, match=rf"without {name}, of another version.*state_dict"):
        without(layer, name)


@pytest.mark.parametrize("name", ["grad", "requires_grad"])
def test_parameters_of_older_versions(name):
    older = without(Parameter(np.ones(2)), name)
    older.accumulate(np.ones(2))
    assert older.grad.tolist() == [1, 1]
    assert older.requires_grad is True


@pytest.mark.parametrize("name", ["_group", "bucket_cap_mb", "_reductions", "_model", "training"])
def test_data_parallel_of_older_versions(world, name):
    model = DistributedDataParallel(Sequential(SyncBatchNorm(C)))
    older = without(model, name)
    for parameter in older.parameters():
        parameter.grad = np.full(C, world.rank, "f4")
    if name == "_model":
        older = DistributedDataParallel(older.module)
    older.reduce_gradients()
    assert older.module[0].weight.grad.tolist() == [(world.size - 1) / 2] * C


class Slotted(SyncBatchNorm):
    __slots__ = ("extra",)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_layers_with_slots(duplicate):
    layer = Slotted(C)
    layer.extra = 5
    assert duplicate(layer).extra == 5
    assert without(layer, "activation").extra == 5


def test_attributes_beside_the_layers_of_a_sequential():
    """A subclass has parameters, buffers and modules of its own, as in torch, behind the layers."""

    class Headed(Sequential):
        def __init__(self):
            super().__init__(BatchNorm1d(3))
            self.head, self.scale = BatchNorm1d(2, affine=False), Parameter(np.ones(1))
            self.register_buffer("seen", np.zeros(()))

    net = Headed()
    assert [name for name, _ in net.named_modules()] == ["", "0", "head"]
    assert [name for name, _ in net.named_parameters()] == ["scale", "0.weight", "0.bias"]
    assert {"seen", "head.running_mean", "0.running_var"} <= net.state_dict().keys()
    assert not net.eval().head.training
    assert len(net) == 1
    assert [type(each) for each in convert_sync_batchnorm(net).children()] == [SyncBatchNorm] * 2
