"""State that leaves the program, or is copied: files, torch, pickles, other numbers of ranks."""

import copy
import gc
import io
import pickle
import subprocess
import sys

import numpy as np
import pytest

from cupy_syncbn import (
    BatchNorm2d,
    DistributedDataParallel,
    Module,
    MPIProcessGroup,
    Parameter,
    Sequential,
    SingleProcessGroup,
    SyncBatchNorm,
    default_group,
    new_group,
)
from support.arrays import BFLOAT16, DTYPES, random_array, random_batch
from support.compare import assert_close, assert_identical, assert_unchanged, relative_error, snapshot
from support.launcher import REPOSITORY, clean_environment, launch
from support.reference import BatchNorm

C = 5
TYPES = sorted({str(parameters) for _, parameters in DTYPES.values()})


class Tree(Module):
    """Layers in an attribute, a list and a dict, as torch names them in ModuleList and ModuleDict."""

    def __init__(self, dtype, make=BatchNorm2d):
        self.stem = make(C, dtype=dtype)
        self.blocks = [make(C, dtype=dtype), Sequential(make(C, affine=False, dtype=dtype))]
        self.heads = {"a": make(C, track_running_stats=False, dtype=dtype)}


MAKE = {"layer": BatchNorm2d, "sequential": Sequential, "tree": Tree}


def make_model(kind, dtype):
    if kind == "layer":
        return BatchNorm2d(C, dtype=dtype)
    if kind == "sequential":
        return Sequential(BatchNorm2d(C, dtype=dtype), Sequential(BatchNorm2d(C, dtype=dtype)))
    return Tree(dtype)


def torch_model(torch, kind, dtype):
    def make(**arguments):
        return torch.nn.BatchNorm2d(C, dtype=getattr(torch, dtype), **arguments)

    if kind == "layer":
        return make()
    if kind == "sequential":
        return torch.nn.Sequential(make(), torch.nn.Sequential(make()))
    tree = torch.nn.Module()
    tree.stem = make()
    tree.blocks = torch.nn.ModuleList([make(), torch.nn.Sequential(make(affine=False))])
    tree.heads = torch.nn.ModuleDict({"a": make(track_running_stats=False)})
    return tree


def randomized(model, rng):
    for array in model.state_dict().values():
        array[...] = 3 if array.ndim == 0 else random_array(rng, C, array.dtype)
    return model


def assert_same_state(model, other):
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, array in expected.items():
        assert_identical(state[name], array)
        assert not np.shares_memory(state[name], array)


@pytest.mark.mpi_skip
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", MAKE)
def test_npz(rng, kind, dtype):
    """Also bfloat16, of which NumPy's files keep the bits alone."""
    model = randomized(make_model(kind, dtype), rng)
    file = io.BytesIO()
    np.savez(file, **model.state_dict())
    other = make_model(kind, dtype)
    with np.load(io.BytesIO(file.getvalue())) as state:
        assert other.load_state_dict(state) == ([], [])
    assert_same_state(other, model)


@pytest.mark.mpi_skip
def test_only_bfloat16_layers_take_bits(rng):
    layer = BatchNorm2d(C)
    state = layer.state_dict() | {"weight": np.ones(C, "V2")}
    before = snapshot(layer)
    with pytest.raises(TypeError, match=r"weight to be float32 \(got \|V2\)"):
        layer.load_state_dict(state)
    assert_unchanged(layer, before)


@pytest.mark.mpi_skip
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("kind", MAKE)
def test_safetensors(rng, tmp_path, kind, dtype):
    """The counter stays 0-dimensional. safetensors.numpy writes bfloat16, and cannot read it."""
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    model = randomized(make_model(kind, dtype), rng)
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = make_model(kind, dtype)
    assert other.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors")) == ([], [])
    assert_same_state(other, model)


def as_tensor(torch, array):
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view("i2")).view(torch.bfloat16)
    return torch.from_numpy(array)


@pytest.mark.mpi_skip
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", MAKE)
def test_torch_in_both_directions(rng, kind, dtype):
    torch = pytest.importorskip("torch", reason="exchanges state with torch, which is not installed")
    model, theirs = randomized(make_model(kind, dtype), rng), torch_model(torch, kind, dtype)
    theirs.load_state_dict({name: as_tensor(torch, array) for name, array in model.state_dict().items()})
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, as_tensor(torch, model.state_dict()[name]))

    for state in theirs.state_dict(), theirs.state_dict(keep_vars=True):  # of tensors, of Parameters
        other = make_model(kind, dtype)
        assert other.load_state_dict(state) == ([], [])
        assert_same_state(other, model)


class Shared(Module):
    """Layers, a list and a parameter with several names, and its own arrays after layers."""

    def __init__(self):
        layer = BatchNorm2d(C)
        self.first = layer
        self.blocks = [layer, Sequential(BatchNorm2d(C, affine=False), layer)]
        self.again = self.blocks
        self.heads = {"a": BatchNorm2d(C), "b": layer}
        self.heads["a"].weight = layer.weight
        self.scales = [Parameter(np.ones(C, "f4")), layer.bias]
        self.register_buffer("step", np.array(0))
        self.register_buffer("nothing", None)
        self.scale = self.scales[0]


def torch_shared(torch):
    nn, module = torch.nn, torch.nn.Module()
    module.first = layer = nn.BatchNorm2d(C)
    module.blocks = nn.ModuleList([layer, nn.Sequential(nn.BatchNorm2d(C, affine=False), layer)])
    module.again = module.blocks
    module.heads = nn.ModuleDict({"a": nn.BatchNorm2d(C), "b": layer})
    module.heads["a"].weight = layer.weight
    module.scales = nn.ParameterList([nn.Parameter(torch.ones(C)), layer.bias])
    module.register_buffer("step", torch.tensor(0))
    module.register_buffer("nothing", None)
    module.scale = module.scales[0]
    return module


@pytest.mark.mpi_skip
def test_torch_names_of_what_is_shared(rng):
    torch = pytest.importorskip("torch", reason="exchanges state with torch, which is not installed")
    model, theirs = randomized(Shared(), rng), torch_shared(torch)
    state = model.state_dict()
    assert list(state) == list(theirs.state_dict())
    assert state["again.1.1.weight"] is state["heads.a.weight"] is model.first.weight.data
    assert len(list(model.parameters())) == 4

    theirs.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    other = Shared()
    assert other.load_state_dict(theirs.state_dict()) == ([], [])
    assert_same_state(other, model)

    # Where the names of one array have several values, the last one stays.
    state = {name: torch.full(array.shape, i) for i, (name, array) in enumerate(state.items())}
    theirs.load_state_dict(state)
    model.load_state_dict(state)
    for name, tensor in theirs.state_dict().items():
        np.testing.assert_array_equal(model.state_dict()[name], tensor.numpy())


def test_state_of_modules_within_themselves():
    model = Sequential(BatchNorm2d(C))
    model[0].model, model[0].siblings = model, [model[0]]
    model[0].siblings.append(model[0].siblings)
    assert list(model.state_dict()) == [f"0.{name}" for name in BatchNorm2d(C).state_dict()]
    assert model.load_state_dict(model.state_dict()) == ([], [])


@pytest.mark.mpi_skip
@pytest.mark.parametrize("target", TYPES)
@pytest.mark.parametrize("source", TYPES)
def test_torch_state_of_another_type_is_rounded(rng, source, target):
    torch = pytest.importorskip("torch", reason="exchanges state with torch, which is not installed")
    theirs = torch_model(torch, "layer", source)
    with torch.no_grad():
        theirs.weight.copy_(torch.from_numpy(rng.normal(size=C)))
    layer, expected = BatchNorm2d(C, dtype=target), torch_model(torch, "layer", target)
    layer.load_state_dict(theirs.state_dict(keep_vars=True))
    expected.load_state_dict(theirs.state_dict())
    assert_identical(layer.weight.data.astype("f8"), expected.weight.detach().double().numpy())


@pytest.mark.mpi_skip
def test_older_torch_states_without_the_counter(rng):
    torch = pytest.importorskip("torch", reason="exchanges state with torch, which is not installed")
    model = randomized(make_model("tree", "float32"), rng)
    for layer in model.stem, model.blocks[0]:
        layer.num_batches_tracked[...] = 7
    state = {
        n: t for n, t in torch_model(torch, "tree", "float32").state_dict().items() if "tracked" not in n
    }
    assert model.load_state_dict(state) == ([], [])
    assert model.stem.num_batches_tracked == model.blocks[0].num_batches_tracked == 7
    np.testing.assert_array_equal(model.blocks[1][0].running_var, np.ones(C, "f4"))


@pytest.mark.mpi_skip
def test_evaluation_equals_torchs(rng):
    torch = pytest.importorskip("torch", reason="exchanges state with torch, which is not installed")
    theirs = torch_model(torch, "sequential", "float64")
    x = random_batch(rng, (6, C, 4, 3), "float64")
    for _ in range(3):
        theirs(torch.from_numpy(x) + 1)
    model = make_model("sequential", "float64")
    model.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        assert_close(model.eval()(x), theirs.eval()(torch.from_numpy(x)).numpy())


STEPS, N, RATE = 8, 12, 0.005


def train(model, group, data, part):
    """Take steps by the gradients of the whole batch."""
    for x, target in data:
        y = model(x[part])
        model.backward(y - target[part])
        for parameter in model.parameters():
            group.allreduce(parameter.grad)
            parameter.data -= RATE * parameter.grad
        model.zero_grad()
    return model


def train_reference(data):
    layers = [BatchNorm(C, activation="relu"), BatchNorm(C)]
    for x, target in data:
        dy = layers[1](layers[0](x)) - target
        for layer in layers[::-1]:
            dy = layer.backward(dy)
        for layer in layers:
            layer.weight = layer.weight - RATE * layer.weight_grad
            layer.bias = layer.bias - RATE * layer.bias_grad
    return layers


def test_resuming_under_another_number_of_ranks(world, rng):
    """Taken up by one rank, by half of them, by all: the numbers of uninterrupted training."""
    data = [tuple(random_batch(rng, (N, C, 4), "float64") for _ in "xt") for _ in range(STEPS)]

    def network(group):
        arguments = {"process_group": group, "dtype": "float64"}
        return Sequential(SyncBatchNorm(C, activation="relu", **arguments), SyncBatchNorm(C, **arguments))

    everyone = default_group()
    model = train(network(None), everyone, data[: STEPS // 2], world.part(N, "uneven"))
    file = io.BytesIO()
    np.savez(file, **model.state_dict())
    saved = world.comm.bcast(file.getvalue())  # by rank 0

    def resumed(group, part):
        with np.load(io.BytesIO(saved)) as state:
            other = network(group)
            other.load_state_dict(state)
        return train(other, group, data[STEPS // 2 :], part)

    results = [train(model, everyone, data[STEPS // 2 :], world.part(N, "uneven"))]
    results.append(resumed(SingleProcessGroup(), slice(None)))
    results.append(resumed(everyone, world.part(N)))
    half = (world.size + 1) // 2
    group = new_group(range(half))
    if world.rank < half:
        results.append(resumed(group, slice(N * world.rank // half, N * (world.rank + 1) // half)))
    expected = train_reference(data)
    for result in results:
        for layer, reference in zip(result, expected, strict=True):
            for name in "weight", "bias", "running_mean", "running_var":
                actual = getattr(layer, name)
                actual = actual.data if name in ("weight", "bias") else actual
                assert relative_error(actual, getattr(reference, name)) <= 1e-12
            assert layer.num_batches_tracked == STEPS
    assert relative_error(results[0][0].weight.data, np.ones(C)) > 1e-3  # it has learnt


def copies(value):
    return [copy.deepcopy(value), pickle.loads(pickle.dumps(value))]


def test_copies_are_independent(world, rng):
    part = world.part(18, "uneven")
    x = random_batch(rng, (18, C, 2, 3))[part]
    model = DistributedDataParallel(Tree("float32", SyncBatchNorm))
    layer = model.module.stem
    layer.backward(layer(x))
    others = copies(model)
    before = snapshot(model)
    for other in others:
        assert_unchanged(other, before)
        assert other.process_group.has_same_ranks(model.process_group)
        twin = other.module.stem
        assert twin.process_group is None
        assert twin.name == "stem"
        twin.weight.data[...] = 3
        twin(x)
        assert_unchanged(model, before)
        assert twin.num_batches_tracked == 2
    shallow = copy.copy(layer)
    assert shallow.weight is layer.weight


def test_trained_copies_go_on_alike(world, rng):
    x = random_batch(rng, (18, C, 4))[world.part(18, "empty")]
    layer = SyncBatchNorm(C, activation="relu")
    layer.backward(layer(x))
    others = copies(layer)
    expected = layer(x), layer.backward(x)
    for other in others:
        for actual, wanted in zip((other(x), other.backward(x)), expected, strict=True):
            assert_identical(actual, wanted)
        assert_unchanged(other, snapshot(layer))


def test_pending_backward_is_not_copied(world, rng):
    x = random_batch(rng, (18, C, 4))[world.part(18)]
    layer = SyncBatchNorm(C)
    y = layer(x)
    for other in *copies(layer), copy.copy(layer):
        with pytest.raises(RuntimeError, match="call the forward of"):
            other.backward(y)
    layer.backward(y)


def test_groups_are_bound_again(world):
    """None stays None, all ranks are those of the program that loads, one process is itself."""
    assert pickle.loads(pickle.dumps(SyncBatchNorm(C))).process_group is None
    assert isinstance(pickle.loads(pickle.dumps(SingleProcessGroup())), SingleProcessGroup)
    assert isinstance(pickle.loads(pickle.dumps(BatchNorm2d(C))).process_group, SingleProcessGroup)
    x = np.ones((4, C), "f4")
    for group in default_group(), MPIProcessGroup(world.comm.Dup()), new_group(timeout=5):
        assert pickle.loads(pickle.dumps(group)) is default_group() or world.size == 1
    for comm in world.comm, world.comm.Dup():
        layer = SyncBatchNorm(C)
        layer.process_group = comm
        for other in copies(layer):
            assert other.process_group.size == world.size
            other(x)


@pytest.mark.mpi(min_size=2)
def test_some_ranks_are_themselves_where_they_were_pickled(world, rng):
    """On another rank, or once they are gone, they are an error that says what to do."""
    group = new_group(range(1, world.size))
    layer = SyncBatchNorm(C, process_group=group)
    others = copies(layer)
    for other in others:
        if world.rank == 0:
            with pytest.raises(RuntimeError, match="not a member of the group of ranks"):
                other(random_batch(rng, (4, C)))
        else:
            assert other.process_group is group
            other(random_batch(rng, (4, C)))

    text = pickle.dumps(group)
    for elsewhere in world.comm.bcast(text, root=1), text:
        if elsewhere is text:
            others = layer = other = group = None
            gc.collect()
        if world.rank != 1 or elsewhere is text:
            lost = SyncBatchNorm(C, process_group=pickle.loads(elsewhere))
            with pytest.raises(RuntimeError, match=r"assign layer\.process_group|not a member"):
                lost(random_batch(rng, (4, C)))
            lost.process_group = SingleProcessGroup()
            lost(random_batch(rng, (4, C)))
    world.comm.barrier()


PICKLING = """
import pickle, sys
import numpy as np
from mpi4py import MPI
from cupy_syncbn import MPIProcessGroup, SyncBatchNorm, split_group
x = np.arange(8, dtype="f4").reshape(4, 2)
layers = [SyncBatchNorm(2, process_group=group) for group in (None, MPI.COMM_WORLD, split_group(1))]
for layer in layers:
    layer.backward(layer(x * MPI.COMM_WORLD.rank))
    layer(x)
if MPI.COMM_WORLD.rank == 0:
    with open(sys.argv[1], "wb") as file:
        pickle.dump(layers, file)
"""

LOADING = """
import pickle, sys
import numpy as np
with open(sys.argv[1], "rb") as file:
    layers = pickle.load(file)
x = np.ones((4, 2), "f4")
for layer in layers[:2]:
    assert layer.num_batches_tracked == 2 and layer.weight.grad is not None
    assert layer._waiting is type(layer)._waiting
    assert layer(x).shape == x.shape and not layer.running_mean is layers[2].running_mean
assert layers[0].process_group is None and layers[1].process_group is None
with open(sys.argv[1], "wb") as file:
    pickle.dump(layers[:2], file)
try:
    layers[2](x)
except RuntimeError as error:
    assert "assign layer.process_group" in str(error), error
    assert layers[2].num_batches_tracked == 2
else:
    raise AssertionError("it computes")
layers[2].process_group = None
layers[2].backward(layers[2](x))
assert "mpi4py" not in sys.modules
"""


LOADING_ON_RANKS = """
import pickle, sys
import numpy as np
from cupy_syncbn import default_group
group = default_group()
with open(sys.argv[1], "rb") as file:
    layers = pickle.load(file)
for layer in layers:
    layer.process_group = None
    layer.reset_running_stats()
    layer(np.full((4, 2), group.rank, "f4"))
    assert abs(layer.running_mean - 0.1 * (group.size - 1) / 2).max() < 1e-6, layer.running_mean
"""

# A layer goes to another process, which multiprocessing starts and MPI knows nothing of.
SPAWNING = """
import multiprocessing
import numpy as np
from cupy_syncbn import SyncBatchNorm, default_group

def work(layer, queue):
    queue.put(layer.eval()(np.ones((4, 2), "f4")).shape)

if __name__ == "__main__":
    group = default_group()
    if group.rank == 0:
        context = multiprocessing.get_context("spawn")
        for layer in SyncBatchNorm(2, process_group=group), SyncBatchNorm(2):
            queue = context.Queue()
            process = context.Process(target=work, args=(layer, queue))
            process.start()
            assert queue.get(timeout=30) == (4, 2)
            process.join()
    group.allreduce(np.zeros(1))
"""


@pytest.mark.launch
@pytest.mark.mpi_skip
def test_evaluation_in_a_process_that_a_rank_starts(tmp_path):
    program = tmp_path / "spawning.py"
    program.write_text(SPAWNING)
    command, status, output = launch(sys.executable, 2, ["-m", "mpi4py", str(program)], 60)
    assert status == 0, f"{command}\n{output}"


@pytest.mark.launch
@pytest.mark.mpi_skip
def test_loading_in_a_program_without_ranks(tmp_path):
    path = str(tmp_path / "layers.pickle")
    command, status, output = launch(sys.executable, 2, ["-m", "mpi4py", "-c", PICKLING, path], 60)
    assert status == 0, f"{command}\n{output}"
    environment = clean_environment(PYTHONPATH=str(REPOSITORY))
    subprocess.run([sys.executable, "-c", LOADING, path], check=True, timeout=60, env=environment)
    command, status, output = launch(sys.executable, 2, ["-m", "mpi4py", "-c", LOADING_ON_RANKS, path], 60)
    assert status == 0, f"{command}\n{output}"


class Slotted(SyncBatchNorm):
    __slots__ = ("threshold",)


def test_slots_of_subclasses(world):
    layer = Slotted(C)
    layer.threshold = 7
    for other in copies(layer):
        assert other.threshold == 7
        assert other.num_features == C
    converted = SyncBatchNorm.convert_sync_batchnorm(layer, SingleProcessGroup())
    assert converted.num_features == C


def test_counter_that_a_partial_state_does_not_have():
    """It stays. With running statistics of before there was one it is not missing, as in torch since 2.2."""
    layer = BatchNorm2d(C)
    layer.num_batches_tracked[...] = 5
    state = {"weight": np.full(C, 2.0, "f4")}
    assert "num_batches_tracked" in layer.load_state_dict(state, strict=False).missing_keys
    assert layer.num_batches_tracked == 5
    state |= {"running_mean": np.ones(C, "f4"), "running_var": np.ones(C, "f4")}
    assert layer.load_state_dict(state, strict=False).missing_keys == ["bias"]
    assert layer.num_batches_tracked == 5
