"""DistributedDataParallel: equal parameters to begin with, averaged gradients after a backward."""

import tracemalloc

import numpy as np
import pytest

from cupy_syncbn import (
    BatchNorm1d,
    DistributedDataParallel,
    Module,
    Parameter,
    RankMismatchError,
    RemoteRankError,
    Sequential,
    SingleProcessGroup,
    SyncBatchNorm,
    new_group,
    split_group,
)
from support.arrays import random_array, random_batch
from support.compare import assert_close, assert_identical, assert_unchanged, snapshot
from support.reference import BatchNorm


class Weights(Module):
    """Parameters of several types, with no forward of interest."""

    def __init__(self):
        super().__init__()
        self.large = Parameter(np.ones((300, 100), "f4"))
        self.double = Parameter(np.ones(7))
        self.half = Parameter(np.ones((2, 3), "f2"))
        self.small = [Parameter(np.ones(i, "f4")) for i in range(5)]
        self.fortran = Parameter(np.ones((4, 6), "f4", order="F"))
        self.norm = BatchNorm1d(3)

    def forward(self, x):
        return 2 * x

    def randomize(self, rng):
        for array in self.state_dict().values():
            array[...] = rng.integers(1, 100, array.shape)


def test_construction_broadcasts_parameters_and_buffers(world):
    model, expected = Weights(), Weights()
    expected.randomize(np.random.default_rng(0))
    model.randomize(np.random.default_rng(world.rank))
    arrays = model.state_dict()
    DistributedDataParallel(model)
    for name, array in model.state_dict().items():
        assert array is arrays[name]
        assert_identical(array, expected.state_dict()[name])


@pytest.mark.parametrize("bucket_cap_mb", [25, 0.01, 1e-6])
def test_gradients_are_averaged(world, bucket_cap_mb):
    model = Weights()
    ddp = DistributedDataParallel(model, bucket_cap_mb=bucket_cap_mb)
    parameters = dict(model.named_parameters())
    for step in range(2):
        grads = [np.random.default_rng((step, rank)) for rank in range(world.size)]
        for name, parameter in parameters.items():
            everyones = [rng.integers(-8, 8, parameter.data.shape).astype("f8") for rng in grads]
            parameter.grad = everyones[world.rank].astype(parameter.data.dtype, order="K")
            parameters[name].expected = np.mean(everyones, axis=0)
        ddp.reduce_gradients()
        for parameter in parameters.values():
            assert parameter.grad.dtype == parameter.data.dtype
            assert_close(parameter.grad, parameter.expected)
            world.assert_same(parameter.grad)


def test_parameters_without_gradient_stay_so(world):
    model = Weights()
    ddp = DistributedDataParallel(model)
    model.large.grad = np.full_like(model.large.data, world.rank)
    ddp.reduce_gradients()
    assert_close(model.large.grad, np.full((300, 100), (world.size - 1) / 2))
    assert model.double.grad is None
    assert model.norm.weight.grad is None


def test_gradient_of_one_rank_counts_as_zero_on_the_others(world):
    model = Weights()
    ddp = DistributedDataParallel(model)
    last = world.size - 1
    if world.rank == last:
        model.double.grad = np.full(7, 3.0)
    ddp.reduce_gradients()
    assert_close(model.double.grad, np.full(7, 3 / world.size))


@pytest.mark.parametrize(
    ("gradient", "error"),
    [(np.zeros((100, 300), "f4"), ValueError), (np.zeros((300, 100), int), TypeError), ([0.0], TypeError)],
    ids=["shape", "dtype", "list"],
)
def test_bad_gradient_of_one_rank(world, gradient, error):
    model = Weights()
    ddp = DistributedDataParallel(model)
    model.double.grad = np.full(7, float(world.rank))
    last = world.size - 1
    if world.rank == last:
        model.large.grad = gradient
        expected = pytest.raises(error, match="large")
    else:
        expected = pytest.raises(RemoteRankError, match=rf"rank {last}\b")
    with expected:
        ddp.reduce_gradients()
    assert_identical(model.double.grad, np.full(7, float(world.rank)))
    model.large.grad = None
    ddp.reduce_gradients()
    assert_close(model.double.grad, np.full(7, (world.size - 1) / 2))


def test_read_only_gradients(world):
    """As NumPy's view of a JAX array is."""
    model = Weights()
    ddp = DistributedDataParallel(model)
    model.large.grad = np.broadcast_to(np.float32(world.rank), model.large.data.shape)
    ddp.reduce_gradients()
    assert_close(model.large.grad, np.full((300, 100), (world.size - 1) / 2))


def test_gradient_that_is_a_number(world):
    """As NumPy's sums are, for a parameter without axes."""
    model = Holder(np.ones((), "f4"))
    ddp = DistributedDataParallel(model)
    model.weight.grad = np.full(3, world.rank, "f4").sum()
    ddp.reduce_gradients()
    assert model.weight.grad == 3 * (world.size - 1) / 2


def test_parameters_in_other_byte_order(world):
    model = Holder(np.ones(3, ">f4"))
    ddp = DistributedDataParallel(model)
    model.weight.grad = np.full(3, world.rank, ">f4")
    ddp.reduce_gradients()
    assert_close(model.weight.grad.astype("f4"), np.full(3, (world.size - 1) / 2))


def test_goes_on_after_ranks_were_in_different_calls(world, rng):
    layer = SyncBatchNorm(4, name="stem")
    model = DistributedDataParallel(layer)
    x = random_batch(rng, (12, 4))
    model(x)
    if world.size > 1:
        with pytest.raises(RankMismatchError):
            model.reduce_gradients() if world.rank == 0 else model.backward(x)
    model.backward(x)
    model.reduce_gradients()
    world.assert_same(layer.weight.grad)


@pytest.mark.parametrize("reductions", [("mean", "none"), ("none", "mean"), ("mean", "mean")])
def test_weights_shared_by_layers_that_reduce_and_do_not(world, rng, reductions):
    a, b = (SyncBatchNorm(4, grad_reduction=reduction, dtype="float64") for reduction in reductions)
    b.weight, b.bias = a.weight, a.bias
    model = DistributedDataParallel(Sequential(a, b))
    x, dy = (random_batch(rng, (4 * world.size, 4), "f8") for _ in "12")
    part = world.part(len(x))
    model(x[part])
    model.backward(dy[part])
    model.reduce_gradients()
    world.assert_same(a.weight.grad, a.bias.grad)
    alone = Sequential(*(SyncBatchNorm(4, dtype="float64", process_group=SingleProcessGroup()) for _ in "ab"))
    alone(x)
    alone.backward(dy / world.size)
    assert_close(a.weight.grad, alone[0].weight.grad + alone[1].weight.grad, tolerance=1e-11)


@pytest.mark.parametrize("difference", ["shape", "dtype", "byte order", "number", "sharing", "bucket_cap_mb"])
def test_ranks_with_different_modules(world, difference):
    """Messages of different lengths would hang or overwrite memory."""
    last = world.size - 1
    odd = world.rank == last
    swapped = np.dtype("f4").newbyteorder() if odd else np.dtype("f4")
    layers = {
        "shape": lambda: [BatchNorm1d(4 if odd else 3)],
        "dtype": lambda: [BatchNorm1d(3, dtype="float64" if odd else "float32")],
        "byte order": lambda: [Holder(np.ones(3, swapped))],
        "number": lambda: [BatchNorm1d(3) for _ in range(1 + odd)],
        "sharing": lambda: [BatchNorm1d(3), BatchNorm1d(3)] if odd else [BatchNorm1d(3)] * 2,
        "bucket_cap_mb": lambda: [BatchNorm1d(3)],
    }
    model = Sequential(*layers[difference]())
    before = snapshot(model)
    bucket_cap_mb = 0.1 if odd and difference == "bucket_cap_mb" else 25
    if world.size == 1:
        DistributedDataParallel(model, bucket_cap_mb=bucket_cap_mb)
    else:
        expected = {
            "shape": r"0\.weight: shape \(4,\), .* here, 0\.weight: shape \(3,\), .* there",
            "number": r"1\.weight: .* here",
            "sharing": r"0\.weight: .* here, 1\.weight: .* there",
            "bucket_cap_mb": "bucket_cap_mb: 0.1 here, bucket_cap_mb: 25.0 there",
        }.get(difference, "type")
        match = f"rank {last} has another module than rank 0" + (f": .*{expected}" if odd else "")
        with pytest.raises(RankMismatchError, match=match):
            DistributedDataParallel(model, bucket_cap_mb=bucket_cap_mb)
    assert_unchanged(model, before)


class Holder(Module):
    """One parameter."""

    def __init__(self, data):
        self.weight = Parameter(data)


def test_different_modules_do_not_pass_for_each_other(world):
    """Whatever a short hash of their shapes may be."""
    for size in range(1, 200):
        if world.size > 1:
            with pytest.raises(RankMismatchError):
                DistributedDataParallel(Holder(np.ones(size + 1000 * (world.rank == 0), "f4")))


@pytest.mark.parametrize("fault", ["read-only", "list"])
def test_array_that_cannot_be_broadcast_to(world, fault):
    good, bad = Holder(np.full(3, world.rank, "f4")), Holder(np.ones(3, "f4"))
    last = world.size - 1
    expected = pytest.raises(RemoteRankError, match=f"rank {last} failed before construction")
    if world.rank == last:
        bad.weight.data = [1.0] * 3 if fault == "list" else np.broadcast_to(np.float32(1), 3)
        expected = pytest.raises(TypeError if fault == "list" else ValueError, match=r"1\.weight")
    with expected:
        DistributedDataParallel(Sequential(good, bad))
    assert (good.weight.data == world.rank).all()


def test_layers_get_names(world, rng):
    """By them ranks find out that they call layers of one size in different orders."""
    model = Module()
    model.stem = SyncBatchNorm(4)
    model.blocks = [SyncBatchNorm(4), SyncBatchNorm(4, name="own")]
    DistributedDataParallel(model)
    stem, first, own = model.stem, *model.blocks
    assert [layer.name for layer in (stem, first, own)] == ["stem", "blocks.0", "own"]
    x = random_batch(rng, (12, 4))
    for layer in stem, first:
        layer(x)
    if world.size > 1:
        called = first if world.rank == 1 else stem
        with pytest.raises(RankMismatchError, match=f"forward 1 of {called.name} "):
            called(x)
    alone = SyncBatchNorm(4)
    DistributedDataParallel(alone)
    assert alone.name is None


def test_counts_calls_from_its_construction(world, rng):
    """A rank may have loaded its layer from a pickle, where others made theirs anew."""
    layer, x = SyncBatchNorm(4), random_batch(rng, (12, 4))
    layer(x)
    layer = layer if world.rank == 0 else SyncBatchNorm(4)
    model = DistributedDataParallel(layer)
    assert model.process_group.size == world.size
    layer.backward(layer(x))


def test_calls_forward_through():
    ddp = DistributedDataParallel(Weights())
    assert ddp(21) == 42
    assert isinstance(ddp.module, Weights)


@pytest.mark.parametrize("grad_reduction", ["none", "sum", "mean"])
def test_reduced_gradients_are_left_alone(world, rng, grad_reduction):
    x, dy = random_batch(rng, (12, 4)), random_array(rng, (12, 4))
    layer, reference = SyncBatchNorm(4, grad_reduction=grad_reduction), BatchNorm(4)
    model = DistributedDataParallel(Sequential(layer))
    part = world.part(12, "uneven")
    assert_close(model(x[part]), reference(x), part)
    assert_close(model.backward(dy[part]), reference.backward(dy), part)
    model.reduce_gradients()
    share = 1 if grad_reduction == "sum" else world.size
    assert_close(layer.weight.grad, reference.weight_grad / share)
    assert_close(layer.bias.grad, reference.bias_grad / share)
    world.assert_same(layer.weight.grad, layer.bias.grad)


@pytest.mark.parametrize("grad_reduction", ["none", "sum", "mean"])
def test_gradients_reduced_over_another_group(world, rng, grad_reduction):
    """What was reduced in groups of one must still be averaged over the world."""
    x, dy = random_batch(rng, (4 * world.size, 4)), random_array(rng, (4 * world.size, 4))
    layer = SyncBatchNorm(4, process_group=split_group(1), grad_reduction=grad_reduction)
    model = DistributedDataParallel(layer)
    part = world.part(len(x))
    model(x[part])
    layer.backward(dy[part])
    local = layer.weight.grad.copy()
    model.reduce_gradients()
    assert_close(layer.weight.grad, world.sum(local) / world.size)


def test_gradients_reduced_over_other_ranks_of_as_many(world, rng):
    """Two groups of the same size are not the same group."""
    pair = 2 if world.size % 2 == 0 else 1
    pairs = world.size // pair
    neighbours = split_group(pair)
    apart = world.comm.Split(world.rank % pairs, world.rank)
    layer = SyncBatchNorm(4, process_group=neighbours, grad_reduction="mean")
    model = DistributedDataParallel(layer, process_group=apart)
    x, dy = random_batch(rng, (4 * world.size, 4)), random_array(rng, (4 * world.size, 4))
    part = world.part(len(x))
    model(x[part])
    layer.backward(dy[part])
    neighbours_mean = layer.weight.grad.copy()
    model.reduce_gradients()
    assert_close(layer.weight.grad, apart.allreduce(neighbours_mean.astype("f8")) / pair)


def test_group_of_the_gradients(world):
    """Averages over a part of the ranks reach these alone."""
    halves = 2 if world.size % 2 == 0 else 1
    group = split_group(world.size // halves)
    model = Weights()
    ddp = DistributedDataParallel(model, process_group=group)
    model.double.grad = np.full(7, float(world.rank))
    ddp.reduce_gradients()
    first = world.rank // group.size * group.size
    assert_close(model.double.grad, np.full(7, first + (group.size - 1) / 2))


def test_training_equals_one_process(world, rng):
    """The mean of the ranks' gradients of their mean losses is the gradient of the batch's mean loss."""
    n = 6 * world.size
    layer, reference = SyncBatchNorm(4, dtype="float64"), BatchNorm(4)
    model = DistributedDataParallel(layer)
    for _ in range(5):
        x, dy = random_batch(rng, (n, 4), "f8"), random_array(rng, (n, 4), "f8")
        part = world.part(n)
        model(x[part])
        layer.backward(dy[part] / 6)
        model.reduce_gradients()
        reference(x)
        reference.backward(dy / n)
        for name in "weight", "bias":
            assert_close(getattr(layer, name).grad, getattr(reference, f"{name}_grad"), tolerance=1e-11)
            getattr(layer, name).data[...] -= 0.1 * getattr(layer, name).grad
            setattr(reference, name, getattr(reference, name) - 0.1 * getattr(reference, f"{name}_grad"))
        layer.zero_grad()
    assert_close(layer.weight.data, reference.weight, tolerance=1e-11)
    assert_close(layer.running_var, reference.running_var)


def test_bad_arguments():
    with pytest.raises(TypeError, match="Module"):
        DistributedDataParallel(lambda x: x)
    with pytest.raises(TypeError, match="process_group"):
        DistributedDataParallel(Weights(), process_group="world")
    for bucket_cap_mb in 0, -1:
        with pytest.raises(ValueError, match="bucket_cap_mb"):
            DistributedDataParallel(Weights(), bucket_cap_mb=bucket_cap_mb)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("bucket", [1 << 18, 1 << 20])
def test_memory_of_reduce_gradients(world, bucket):
    """A copy of the gradients and two buckets, and little else."""
    model = Sequential(*[SyncBatchNorm(100_000) for _ in range(4)])
    ddp = DistributedDataParallel(model, bucket_cap_mb=bucket / 2**20)
    for step in range(2):
        for parameter in model.parameters():
            parameter.grad = np.full(parameter.data.size, step + world.rank, "f4")
        nbytes = sum(parameter.grad.nbytes for parameter in model.parameters())
        largest = max(bucket, *(parameter.grad.nbytes for parameter in model.parameters()))
        tracemalloc.start()
        ddp.reduce_gradients()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert nbytes < peak < nbytes + 2 * largest
        for parameter in model.parameters():
            assert (parameter.grad == step + (world.size - 1) / 2).all()


@pytest.mark.mpi(min_size=2)
def test_memory_of_construction(world):
    model = Sequential(*[SyncBatchNorm(100_000) for _ in range(4)])
    nbytes = sum(array.nbytes for array in model.state_dict().values())
    tracemalloc.start()
    DistributedDataParallel(model)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.1 * nbytes


class Mixed(Module):
    """Buffers that ranks share, and those that a local layer or the program makes of each rank's own data."""

    def __init__(self, group, dtype="float32"):
        self.shared = SyncBatchNorm(4, process_group=group, dtype=dtype)
        self.local = BatchNorm1d(4, dtype=dtype)
        self.register_buffer("seen", np.zeros((), np.int64))
        self.register_buffer("table", np.arange(6, dtype=np.float16).reshape(2, 3).T)
        self.register_buffer("nothing", None)

    def forward(self, x):
        self.found = {name: buffer.copy() for name, buffer in self.named_buffers()}
        self.seen += len(x)
        return self.local(self.shared(x))

    def backward(self, dy):
        return self.shared.backward(self.local.backward(dy))


def copies(module):
    return {name: buffer.copy() for name, buffer in module.named_buffers()}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_buffers_of_rank_0_before_each_training_forward(world, rng, dtype):
    """As in torch: what a rank's own data made of a buffer in the last step is overwritten."""
    model = DistributedDataParallel(Mixed(None, dtype))
    net = model.module
    for step in range(3):
        before = copies(net)
        expected = world.comm.bcast(before)
        x = random_batch(rng, (9, 4), dtype)[world.rank % 4 :]
        model(x)
        for name, buffer in net.found.items():
            assert_identical(buffer, expected[name])
        if step and world.rank % 4:
            assert net.found["local.running_mean"].tobytes() != before["local.running_mean"].tobytes()
        model.backward(x)
    found = copies(net)
    model.eval()(x)
    assert all(np.array_equal(buffer, found[name]) for name, buffer in net.found.items())  # no message


def test_buffers_of_other_groups(world, rng):
    """A layer whose group is not the wrapper's has its own statistics; one over the same ranks has theirs."""
    alone, together = (
        SyncBatchNorm(4, process_group=SingleProcessGroup()),
        SyncBatchNorm(4, process_group=new_group()),
    )
    model = DistributedDataParallel(Sequential(together, alone))
    for _ in range(2):
        model.module.forget()
        model(random_batch(rng, (9, 4)))
        world.assert_same(together.running_mean)
    assert model._broadcasts == 2 * (world.size > 1)
    only = DistributedDataParallel(Sequential(together))
    only(np.ones((4, 4), "f4"))
    assert only._broadcasts == 0  # no message


def test_buffers_stay_each_ranks_own_if_asked(world, rng):
    model = DistributedDataParallel(Mixed(SingleProcessGroup()), broadcast_buffers=False)
    model(random_batch(rng, (3, 4)) + world.rank)
    before = copies(model)
    model(random_batch(rng, (3, 4)))
    for name, buffer in model.module.found.items():
        assert_identical(buffer, before[f"module.{name}"])


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("fault", ["read-only", "another shape", "not an array"])
def test_buffer_that_cannot_be_broadcast(world, rng, fault):
    """All ranks raise an error, and no buffer has changed."""
    model = DistributedDataParallel(Mixed(None))
    net = model.module
    net.local.running_mean[...] = world.rank
    last = world.rank == world.size - 1
    if last and fault == "read-only":
        net.local.running_var.flags.writeable = False
    elif last:
        vars(net)["table"] = np.zeros(7, np.float16) if fault == "another shape" else "table"
    expected = {"read-only": ValueError, "another shape": RankMismatchError, "not an array": TypeError}[fault]
    with pytest.raises(expected if last or fault == "another shape" else RemoteRankError):
        model(random_batch(rng, (3, 4)))
    assert_identical(net.local.running_mean, np.full(4, world.rank, "f4"))
    assert net.seen == 0


def test_model_without_parameters(world):
    for module in Module(), SyncBatchNorm(3, affine=False), Sequential(BatchNorm1d(3, affine=False)):
        with pytest.raises(ValueError, match="parameters to train"):
            DistributedDataParallel(module)
