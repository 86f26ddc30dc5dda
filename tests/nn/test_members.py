"""Parameters as arrays, assignments to parameters and buffers, and the names of members."""

import copy
import io
import pickle

import numpy as np
import pytest

from cupy_syncbn import BatchNorm1d, BatchNorm2d, Module, Parameter, SyncBatchNorm, convert_sync_batchnorm
from support.arrays import BFLOAT16, on_host, random_batch
from support.compare import assert_close, assert_identical, assert_unchanged, snapshot

C = 3


class Net(Module):
    """A module of someone's own, with a parameter and buffers."""

    def __init__(self, xp):
        self.scale = Parameter(xp.ones((2, C), "f4"))
        self.register_buffer("mean", xp.zeros(C, "f4"))
        self.register_buffer("steps", xp.zeros((), np.int64))
        self.register_buffer("later", None)
        self.norm = BatchNorm1d(C, device="cpu" if xp is np else "cuda")
        self.table = [1, 2]


def test_a_parameter_tells_of_its_data(xp):
    parameter = Parameter(xp.ones((2, 3), "f2"))
    assert (parameter.shape, parameter.dtype, parameter.size, parameter.ndim) == ((2, 3), np.float16, 6, 2)


def test_numpy_takes_a_parameter():
    parameter = Parameter(np.arange(6.0).reshape(2, 3))
    assert np.asarray(parameter) is parameter.data
    assert_identical(np.array(parameter), parameter.data)
    assert not np.shares_memory(np.array(parameter), parameter.data)
    assert np.asarray(parameter, "f4").dtype == np.float32
    assert np.sum(parameter) == 15
    assert_identical(np.zeros_like(parameter), np.zeros((2, 3)))
    assert_identical(2 * parameter.data - parameter, parameter.data)
    assert np.array(parameter, copy=False) is not parameter
    with pytest.raises(ValueError, match="copy"):
        np.array(parameter, "f4", copy=False)
    file = io.BytesIO()
    np.savez(file, weight=parameter)
    file.seek(0)
    assert_identical(np.load(file, allow_pickle=False)["weight"], parameter.data)


def test_other_types_come_out_as_they_are():
    parameter = Parameter(np.ones(3, BFLOAT16))
    assert np.asarray(parameter).dtype == BFLOAT16
    torch = pytest.importorskip("torch", reason="converts to torch, which is not installed")
    assert torch.as_tensor(np.asarray(Parameter(np.ones(2, "f4")))).tolist() == [1, 1]


@pytest.mark.parametrize(
    "convert", [np.asarray, np.sum, lambda p: np.array(p, "f8"), lambda p: np.ones(2) + p]
)
def test_numpy_refuses_a_parameter_of_cupy(cupy, convert):
    """As CuPy refuses for its arrays: no copy from a GPU that nobody asked for."""
    parameter = Parameter(cupy.ones(2, "f4"))
    with pytest.raises(TypeError, match=r"\.data\.get\(\)"):
        convert(parameter)
    assert np.asarray(parameter.data.get()).tolist() == [1, 1]


def test_an_array_is_copied_into_a_parameter(xp, device, rng):
    layer = SyncBatchNorm(C, device=device)
    weight, data, values = layer.weight, layer.weight.data, xp.arange(C).astype("f4")
    layer.weight = values
    layer.bias = xp.full(C, 0.1)  # of another type
    assert layer.weight is weight
    assert layer.weight.data is data
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    values[...] = 7
    assert_identical(on_host(layer.weight.data), np.arange(C, dtype="f4"))
    assert_identical(on_host(layer.bias.data), np.full(C, 0.1, "f4"))
    layer.weight = layer.weight.data[::-1]  # which overlap
    assert_identical(on_host(layer.weight.data), np.arange(C, dtype="f4")[::-1])
    y = layer.eval()(xp.asarray(random_batch(rng, (4, C))))
    assert y.shape == (4, C)


def test_assignments_by_name(xp):
    net = Net(xp)
    before = net.state_dict()
    net.scale = 2 * net.scale.data
    net.mean = xp.full(C, 3, "f8")
    net.steps = net.steps + 1  # of NumPy a scalar
    net.later = xp.ones(2, "f4")
    after = net.state_dict()
    assert all(after[name] is array for name, array in before.items())
    assert (on_host(net.scale.data) == 2).all()
    assert on_host(net.mean).tolist() == [3] * C
    assert int(net.steps) == 1
    assert after["later"] is net.later
    net.later = net.mean = None
    assert {"later", "mean"}.isdisjoint(net.state_dict())


def test_other_parameters_and_none(xp):
    net = Net(xp)
    other = Parameter(xp.zeros(5, "f4"))
    net.scale = other
    assert next(net.parameters()) is other
    net.norm.bias = None
    assert "norm.bias" not in net.state_dict()
    net.scale = None
    assert "scale" not in net.state_dict()


# What is assigned to what, the error, and what it says.
WRONG = {
    "shape": ("norm.weight", lambda xp: xp.ones(C + 1, "f4"), ValueError, "weight of shape"),
    "scalar": ("norm.weight", lambda xp: np.float32(2), (TypeError, ValueError), "weight"),
    "type": ("norm.weight", lambda xp: xp.ones(C, "c8"), TypeError, "float32"),
    "list": ("norm.weight", lambda xp: [1.0] * C, TypeError, r"\.weight\.data\[\.\.\.\]"),
    "number": ("scale", lambda xp: 3.0, TypeError, r"\.scale\.data\[\.\.\.\] = value"),
    "text": ("scale", lambda xp: "ones", TypeError, r"\.scale\.data"),
    "buffer, shape": ("mean", lambda xp: xp.ones((C, 1), "f4"), ValueError, "mean of shape"),
    "buffer, type": ("norm.running_var", lambda xp: xp.ones(C, "c8"), TypeError, "running_var"),
    "buffer, number": ("mean", lambda xp: 2.0, TypeError, "buffer mean to be an array"),
    "buffer, list": ("mean", lambda xp: [0.0] * C, TypeError, r"numpy\.asarray"),
    "buffer, parameter": ("mean", lambda xp: Parameter(xp.ones(C, "f4")), TypeError, "a Parameter"),
    "buffer, not a number": ("steps", lambda xp: xp.full((), np.nan), TypeError, "steps to be int64"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_assignment_changes_nothing(xp, name):
    path, value, error, message = WRONG[name]
    net = Net(xp)
    before, arrays = net.state_dict(), {n: on_host(a).copy() for n, a in net.state_dict().items()}
    *owner, attribute = path.split(".")
    with pytest.raises(error, match=message):
        setattr(getattr(net, *owner) if owner else net, attribute, value(xp))
    after = net.state_dict()
    assert after.keys() == before.keys()
    for key, array in arrays.items():
        assert after[key] is before[key]
        assert_identical(on_host(after[key]), array)


@pytest.mark.parametrize("name", ["weight", "running_mean"])
def test_the_device_must_be_the_same(cupy, name):
    here, there = BatchNorm2d(C, device="cpu"), BatchNorm2d(C, device="cuda")
    values = np.arange(C, dtype="f4")
    with pytest.raises(TypeError, match=r"cupy\.asarray"):
        setattr(there, name, values)
    setattr(there, name, cupy.asarray(values))
    with pytest.raises(TypeError, match=r"\.get\(\)"):
        setattr(here, name, cupy.asarray(values))
    setattr(here, name, cupy.asarray(values).get())
    for layer in here, there:
        assert on_host(layer.state_dict()[name]).tolist() == values.tolist()


def test_a_layer_without_parameters():
    layer = SyncBatchNorm(C, affine=False)
    with pytest.raises(TypeError, match=r"use Parameter\(array\)"):
        layer.weight = np.ones(C, "f4")
    layer.weight = Parameter(np.full(C, 2, "f4"))
    assert list(layer.state_dict())[:1] == ["weight"]


def test_a_read_only_parameter_stays():
    layer = SyncBatchNorm(C)
    layer.weight.data.flags.writeable = False
    with pytest.raises(ValueError, match="writeable array as weight"):
        layer.weight = np.zeros(C, "f4")


def test_arrays_of_other_libraries():
    torch = pytest.importorskip("torch", reason="assigns tensors of torch, which is not installed")
    layer = SyncBatchNorm(C)
    layer.weight = torch.full((C,), 2.0)
    layer.running_mean = torch.full((C,), 3.0)
    assert layer.weight.data.tolist() == [2] * C
    assert layer.running_mean.tolist() == [3] * C


def test_converted_layers_share_what_is_assigned(rng):
    old = BatchNorm1d(C)
    new = convert_sync_batchnorm(old)
    new.weight = np.full(C, 4, "f4")
    new.running_mean = np.full(C, 5, "f4")
    assert old.weight.data.tolist() == [4] * C
    assert old.running_mean.tolist() == [5] * C


class Named(Net):
    fixed = None
    setting = 3

    def method(self):
        """Do nothing."""

    @property
    def view(self):
        """A property."""
        return 1


@pytest.mark.parametrize(
    ("name", "error"),
    [
        (3, TypeError), (None, TypeError), (b"a", TypeError), ("", KeyError), ("a.b", KeyError),
        (".", KeyError), ("scale", KeyError), ("norm", KeyError), ("method", KeyError), ("forward", KeyError),
        ("view", KeyError), ("training", KeyError), ("table", KeyError), ("setting", KeyError),
        ("_buffer_names", KeyError),
    ],
)  # fmt: skip
def test_names_of_buffers_that_cannot_work(name, error):
    net = Named(np)
    before = snapshot(net)
    with pytest.raises(error, match="name of a buffer"):
        net.register_buffer(name, np.ones(2))
    assert_unchanged(net, before)
    assert net._buffer_names == ("mean", "steps", "later")


@pytest.mark.parametrize("name", ["weight", "bias", "affine", "process_group"])
def test_names_of_buffers_that_are_a_layers(name):
    layer = SyncBatchNorm(C, bias=False)  # None is a parameter too
    with pytest.raises(KeyError, match=name):
        layer.register_buffer(name, np.ones(C))
    assert layer._buffer_names == SyncBatchNorm._buffer_names


@pytest.mark.parametrize("name", ["new", "fixed", "mean", "later", "array", "nothing"])
def test_names_of_buffers_that_work(name):
    net, array = Named(np), np.ones(2)
    net.array, net.nothing = np.zeros(4), None
    net.register_buffer(name, array)
    assert net.state_dict()[name] is array
    assert [each for each, _ in net.named_buffers()].count(name) == 1


@pytest.mark.parametrize("value", [3.0, "ones", [1.0], Parameter(np.ones(2)), BatchNorm1d(2)])
def test_a_buffer_that_is_no_array(value):
    net = Net(np)
    with pytest.raises(TypeError, match="buffer more to be an array"):
        net.register_buffer("more", value)
    assert not hasattr(net, "more")


def test_a_scalar_becomes_an_array():
    net = Net(np)
    net.register_buffer("more", np.float32(2))
    net.load_state_dict({"more": 5}, strict=False)
    assert_identical(net.more, np.array(5, "f4"))


TWICE = {
    "number and text": ({1: Parameter(np.ones(1)), "1": Parameter(np.ones(2))}, "table.1"),
    "layers": ({1: BatchNorm1d(1), "1": BatchNorm1d(2)}, "table.1"),
    "layer and parameter": ({0: BatchNorm1d(1), "0": Parameter(np.ones(1))}, "table.0"),
    "dot": ({"a.weight": Parameter(np.ones(1)), "a": BatchNorm1d(1)}, "table.a.weight"),
    "lists": ({True: [Parameter(np.ones(1))], "True": [BatchNorm1d(1)]}, "table.True.0"),
    "in a list": ([BatchNorm1d(1), {"0": Parameter(np.ones(1)), 0: BatchNorm1d(2)}], "table.1.0"),
}  # fmt: skip


@pytest.mark.parametrize("case", TWICE)
@pytest.mark.parametrize(
    "use",
    [
        lambda net: list(net.named_parameters()),
        lambda net: list(net.named_modules()),
        lambda net: net.state_dict(),
        lambda net: net.eval(),
        lambda net: net.zero_grad(),
    ],
)
def test_two_members_of_one_name(case, use):
    members, name = TWICE[case]
    net = Module()
    net.table = members
    with pytest.raises(ValueError, match=f"two by '{name}'"):
        use(net)


def test_one_member_in_two_places_has_one_name():
    net, shared = Module(), Parameter(np.ones(2))
    net.table = {1: shared, "1": shared, "other": shared}
    assert [name for name, _ in net.named_parameters()] == ["table.1"]
    assert list(net.state_dict()) == ["table.1", "table.other"]


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_as_their_originals(duplicate, rng):
    net = Net(np)
    net.norm.weight = np.full(C, 2, "f4")
    other = duplicate(net)
    other.mean = np.full(C, 4, "f4")
    x = random_batch(rng, (6, C))
    assert_close(other.norm(x), net.norm(x))
    assert other.mean.tolist() == [4] * C
