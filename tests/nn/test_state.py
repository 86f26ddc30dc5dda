"""state_dict and load_state_dict."""

from pathlib import Path

import numpy as np
import pytest

from cupy_syncbn import BatchNorm1d, DistributedDataParallel, Sequential, SingleProcessGroup, SyncBatchNorm
from support.arrays import DTYPES, random_array, random_batch
from support.compare import assert_identical, assert_unchanged, snapshot

NAMES = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def trained_layer(rng, dtype="float32", **arguments):
    layer = SyncBatchNorm(5, dtype=dtype, process_group=SingleProcessGroup(), **arguments)
    for _ in range(3):
        layer(random_batch(rng, (6, 5), dtype))
    for parameter in layer.parameters():
        parameter.data[...] = random_array(rng, 5, dtype)
    return layer


def test_names_shapes_and_types_are_torchs():
    state = SyncBatchNorm(5, dtype="float64").state_dict()
    assert list(state) == NAMES
    for name in NAMES[:4]:
        assert (state[name].shape, state[name].dtype) == ((5,), np.float64)
    assert (state["num_batches_tracked"].shape, state["num_batches_tracked"].dtype) == ((), np.int64)
    assert list(SyncBatchNorm(5, affine=False).state_dict()) == NAMES[2:]
    assert list(SyncBatchNorm(5, track_running_stats=False).state_dict()) == NAMES[:2]
    model = Sequential(SyncBatchNorm(1), BatchNorm1d(2))
    assert list(model.state_dict()) == [f"{i}.{name}" for i in (0, 1) for name in NAMES]


def test_arrays_are_live(rng):
    layer = trained_layer(rng)
    state = layer.state_dict()
    layer(random_batch(rng, (6, 5)))
    assert state["num_batches_tracked"] == 4
    assert_identical(state["running_mean"], layer.running_mean)
    assert state["weight"] is layer.weight.data


@pytest.mark.parametrize("dtypes", DTYPES)
def test_round_trip(rng, dtypes):
    _, dtype = DTYPES[dtypes]
    layer = trained_layer(rng, dtype)
    other = SyncBatchNorm(5, dtype=dtype)
    own = other.state_dict()
    assert other.load_state_dict(layer.state_dict()) == ([], [])
    for name, array in layer.state_dict().items():
        assert_identical(other.state_dict()[name], array)
        assert other.state_dict()[name] is own[name]
        assert not np.shares_memory(own[name], array)


@pytest.mark.mpi_skip
def test_round_trip_through_a_file(rng, tmp_path):
    model = Sequential(trained_layer(rng), Sequential(trained_layer(rng, "float64")))
    np.savez(tmp_path / "model.npz", **model.state_dict())
    other = Sequential(SyncBatchNorm(5), Sequential(SyncBatchNorm(5, dtype="float64")))
    with np.load(tmp_path / "model.npz") as state:
        other.load_state_dict(state)
    for name, array in model.state_dict().items():
        assert_identical(other.state_dict()[name], array)


@pytest.mark.mpi_skip
def test_exchange_with_torch(rng):
    torch = pytest.importorskip("torch", reason="compares with torch, which is not installed")
    layer, theirs = trained_layer(rng), torch.nn.SyncBatchNorm(5)
    theirs.load_state_dict({name: torch.from_numpy(array) for name, array in layer.state_dict().items()})
    for name, tensor in theirs.state_dict().items():
        assert_identical(tensor.numpy(), layer.state_dict()[name])
    other = SyncBatchNorm(5)
    other.load_state_dict(theirs.state_dict())
    for name, array in layer.state_dict().items():
        assert_identical(other.state_dict()[name], array)


def test_values_are_converted(rng):
    layer = SyncBatchNorm(3)
    layer.load_state_dict(
        {
            "weight": [1, 2, 3],
            "bias": np.array([1e-3, 2, 3], ">f8"),
            "running_mean": (4, 5, 6),
            "running_var": np.ones(3, "f2"),
            "num_batches_tracked": 7,
        }
    )
    assert_identical(layer.weight.data, np.array([1, 2, 3], "f4"))
    assert_identical(layer.bias.data, np.array([1e-3, 2, 3], "f4"))
    assert_identical(layer.running_mean, np.array([4, 5, 6], "f4"))
    assert_identical(layer.num_batches_tracked, np.array(7))


@pytest.mark.parametrize("strict", [True, False])
def test_without_num_batches_tracked(rng, strict):
    """States from before there was a counter leave it."""
    layer = trained_layer(rng)
    model = Sequential(layer)
    state = {f"0.{name}": np.full(5, 2.0) for name in NAMES[:4]}
    assert model.load_state_dict(state, strict=strict) == ([], [])
    assert_identical(layer.num_batches_tracked, np.array(3))
    assert_identical(layer.running_var, np.full(5, 2, "f4"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"running_var": None}, KeyError, "running_var"),
        ({"extra": np.ones(5)}, KeyError, "extra"),
        ({"running_var": np.ones(4)}, ValueError, "running_var"),
        ({"running_var": np.ones((5, 1))}, ValueError, "running_var"),
        ({"running_var": 1.0}, ValueError, "running_var"),
        ({"num_batches_tracked": np.zeros(2, "i8")}, ValueError, "num_batches_tracked"),
        ({"num_batches_tracked": "2"}, TypeError, "num_batches_tracked to be int64"),
        ({"num_batches_tracked": np.nan}, TypeError, "num_batches_tracked to be int64"),
        ({"num_batches_tracked": 1e300}, TypeError, "num_batches_tracked to be int64"),
        ({"running_var": ["one"] * 5}, (TypeError, ValueError), "."),
        ({"running_var": [None] * 5}, (TypeError, ValueError), "."),
        ({"running_var": np.ones(5, "c8")}, (TypeError, ValueError), "."),
    ],
    ids=[
        *("missing", "unexpected", "length", "axes", "scalar"),
        *("counters", "text", "nan", "huge", "strings", "objects", "complex"),
    ],
)
def test_nothing_changes_when_it_raises(rng, changes, error, message):
    layer = trained_layer(rng)
    before = snapshot(layer)
    state = {name: np.full_like(array, 9) for name, array in layer.state_dict().items()}
    state = {name: value for name, value in (state | changes).items() if value is not None}
    with pytest.raises(error, match=message):
        layer.load_state_dict(state)
    assert_unchanged(layer, before)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_changes_when_an_array_is_read_only(rng, name):
    layer = trained_layer(rng)
    state = {key: np.full_like(array, 9) for key, array in layer.state_dict().items()}
    before = snapshot(layer)
    layer.state_dict()[name].flags.writeable = False
    with pytest.raises(ValueError, match=f"writeable array as {name}"):
        layer.load_state_dict(state)
    assert_unchanged(layer, before)


@pytest.mark.parametrize("counter", [np.full(1, 7), [7], 7.0, np.float32(7), np.full(1, 7.0, "f2")])
def test_counters_that_torch_takes(rng, counter):
    layer = trained_layer(rng)
    layer.load_state_dict(layer.state_dict() | {"num_batches_tracked": counter})
    assert_identical(layer.num_batches_tracked, np.array(7))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_values_beyond_the_type_are_infinite(rng, dtype):
    layer = SyncBatchNorm(5, dtype=dtype)
    with np.errstate(all="raise"):
        layer.load_state_dict({"weight": np.array([1e300, -1e300, 1e-300, 1, np.nan])}, strict=False)
    np.testing.assert_array_equal(layer.weight.data.astype("f8"), [np.inf, -np.inf, 0, 1, np.nan])


def test_not_strict(rng):
    layer = trained_layer(rng)
    weight = layer.weight.data.copy()
    state = {"bias": np.full(5, 2), "running_mean": np.ones(5), "num_batches_tracked": 3, "other": 4}
    missing, unexpected = result = layer.load_state_dict(state, strict=False)
    assert missing == result.missing_keys == ["weight", "running_var"]
    assert unexpected == result.unexpected_keys == ["other"]
    assert_identical(layer.bias.data, np.full(5, 2, "f4"))
    assert_identical(layer.weight.data, weight)
    assert layer.num_batches_tracked == 3


def test_loaded_values_are_used(rng):
    layer, other = trained_layer(rng), SyncBatchNorm(5)
    other.load_state_dict(layer.state_dict())
    x = random_batch(rng, (6, 5))
    assert_identical(other.eval()(x), layer.eval()(x))


def test_to_cpu(rng):
    layer = trained_layer(rng)
    arrays = layer.state_dict()
    assert layer.to("cpu") is layer
    for name, array in layer.state_dict().items():
        assert array is arrays[name]
    with pytest.raises(ValueError, match="tpu"):
        layer.to("tpu")


@pytest.mark.parametrize("counter", [1.5, np.float32(1.999), np.array([1.25], "f2")])
def test_averages_of_counters_are_cut_off(rng, counter):
    """As torch does, with the states that weight averaging makes."""
    layer = trained_layer(rng)
    layer.load_state_dict({"num_batches_tracked": counter}, strict=False)
    assert_identical(layer.num_batches_tracked, np.array(1))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("model.npz", r"got str.*numpy\.load\(path\)"),
        (Path("model.npz"), r"Path.*numpy\.load\(path\)"),
        (None, "NoneType.*state_dict"),
        ([], "got list.*dict"),
        ([("weight", np.ones(5))], r"got list.*dict\(\.\.\.\)"),
        (SyncBatchNorm(5), r"SyncBatchNorm.*state_dict\(\)"),
    ],
    ids=["text", "path", "nothing", "list", "pairs", "module"],
)
@pytest.mark.parametrize("strict", [True, False])
def test_what_is_no_mapping(rng, state, message, strict):
    layer = trained_layer(rng)
    with pytest.raises(TypeError, match=f"expected a mapping.*{message}"):
        layer.load_state_dict(state, strict=strict)


def test_a_prefix_is_named_as_the_cause(rng):
    net = Sequential(*[trained_layer(rng) for _ in range(3)])
    wrapped = DistributedDataParallel(net, SingleProcessGroup())
    state = {name: array.copy() for name, array in wrapped.state_dict().items()}
    with pytest.raises(KeyError, match=r"and 7 more.*DistributedDataParallel.*'module\.'") as caught:
        net.load_state_dict(state)
    remedy = caught.value.args[0].rpartition("prefix 'module.': ")[2]
    assert net.load_state_dict(eval(remedy, {"state": state})) == ([], [])
    with pytest.raises(KeyError, match=r"\.module"):
        wrapped.load_state_dict(net.state_dict())
    assert wrapped.module.load_state_dict(net.state_dict()) == ([], [])
    with pytest.raises(KeyError) as caught:
        net.load_state_dict({"other": np.ones(5)})
    assert "DistributedDataParallel" not in str(caught.value)
