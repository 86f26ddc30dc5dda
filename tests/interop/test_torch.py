"""The torch layer on ranks: they compute what torch's own layer does with the whole batch in one process."""

import copy
import pickle
import threading
import weakref
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from cupy_syncbn import CollectiveTimeoutError, RankMismatchError, RemoteRankError, default_group, new_group
from support.world import SPLITS

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch.utils.checkpoint import checkpoint  # noqa: E402

from cupy_syncbn.interop import torch as interop  # noqa: E402
from cupy_syncbn.interop.torch import SyncBatchNorm, convert_sync_batchnorm  # noqa: E402

nn, F = torch.nn, torch.nn.functional
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
TOTAL = 11


def deviation(a, b):
    """Return the largest difference of two tensors, in units of the second's largest value."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def largest_deviation(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(deviation(ours[name], theirs[name]) for name in theirs)


def share(world, split, total=TOTAL):
    """Return this rank's slice; all ranks have some of the samples, or none."""
    return world.part(total, split)


def make_network(dtype):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 8, bias=False),
        nn.BatchNorm1d(8), nn.Linear(8, 5),
    ).to(dtype)  # fmt: skip


def make_steps(dtype, total=TOTAL, steps=10):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(steps, total, 3, 9, 9, generator=generator, dtype=torch.float64)
    x += torch.arange(total).view(-1, 1, 1, 1)  # the ranks' batches differ
    return x.to(dtype), torch.randint(5, (steps, total), generator=generator)


def train(network, called, x, target, part, ranks):
    """Train in steps; return losses, gradients of the last step, parameters and buffers."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for batch, labels in zip(x, target, strict=True):
        optimizer.zero_grad()
        loss = F.cross_entropy(called(batch[part]), labels[part], reduction="sum") / len(batch)
        (loss * ranks).backward()  # DistributedDataParallel divides by the number of ranks
        optimizer.step()
        losses.append(loss.detach())
    gradients = {f"{name}.grad": each.grad for name, each in network.named_parameters()}
    return {"losses": torch.stack(losses), **gradients, **network.state_dict()}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_ddp_equals_one_process(world, torch_ranks, dtype, split):
    x, target = make_steps(dtype)
    network = convert_sync_batchnorm(make_network(dtype))
    called = nn.parallel.DistributedDataParallel(network)
    ours = train(network, called, x, target, share(world, split), world.size)
    torch_ranks.all_reduce(ours["losses"])
    plain = make_network(dtype)
    theirs = train(plain, plain, x, target, slice(None), 1)
    assert largest_deviation(ours, theirs) <= TOLERANCE[dtype]
    assert {name for name, _ in network.named_buffers()} == {name for name, _ in plain.named_buffers()}


@pytest.mark.mpi(min_size=2)
def test_local_statistics_differ(world, torch_ranks):
    """The negative control."""
    x, target = make_steps(torch.float64)
    network = make_network(torch.float64)
    called = nn.parallel.DistributedDataParallel(network)
    ours = train(network, called, x, target, share(world, "even"), world.size)
    plain = make_network(torch.float64)
    theirs = train(plain, plain, x, target, slice(None), 1)
    torch_ranks.all_reduce(ours["losses"])
    assert largest_deviation(ours, theirs) > 1e-3


def results_of(y, leaves, layer, total=lambda gradient: gradient):
    """Return what a forward and a backward have left."""
    results = {"y": y.detach(), "dx": leaves[0].grad}
    if len(leaves) > 1:
        results["dresidual"] = leaves[1].grad
    gradients = {f"{name}.grad": total(each.grad) for name, each in layer.named_parameters()}
    return results | gradients | layer.state_dict()


def one_process(layer, x, dy, residual=None):
    """Return what torch makes of the whole batch, with the layer's settings."""
    plain = nn.BatchNorm2d(x.shape[1], layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
    plain.to(x.dtype).load_state_dict(layer.state_dict())
    leaves = [each.detach().clone().requires_grad_() for each in (x, residual) if each is not None]
    y = plain(leaves[0])
    if residual is not None:
        y = y + leaves[1]
    if layer.activation is not None:
        y = F.leaky_relu(y, 0.0 if layer.activation == "relu" else layer.activation[1])
    y.backward(dy)
    return results_of(y, leaves, plain)


def on_ranks(world, layer, x, dy, part, residual=None):
    """Return the same of the layer, which has a part of the batch here."""
    leaves = [each.detach()[part].clone().requires_grad_() for each in (x, residual) if each is not None]
    y = layer(*leaves)
    y.backward(dy[part])
    return results_of(y, leaves, layer, lambda gradient: torch.from_numpy(world.sum(gradient)))


def assert_equal_parts(ours, theirs, part, tolerance):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        if name in ("y", "dx", "dresidual"):
            expected = expected[part]
        assert ours[name].shape == expected.shape
        assert not expected.numel() or deviation(ours[name], expected) <= tolerance, name


SETTINGS = {
    "plain": {},
    "no parameters": {"affine": False},
    "no statistics": {"track_running_stats": False},
    "average": {"momentum": None},
    "relu": {"activation": "relu"},
    "leaky": {"activation": ("leaky_relu", 0.2)},
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("split", ["uneven", "first_empty"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_layer_equals_torch_on_the_whole_batch(world, settings, split, with_residual, memory_format):
    generator = torch.Generator().manual_seed(2)
    x, dy, residual = torch.randn(3, 9, 4, 5, 3, generator=generator, dtype=torch.float64)
    x += torch.arange(9).view(-1, 1, 1, 1)
    x = x.contiguous(memory_format=memory_format)
    residual = residual if with_residual else None
    layer = SyncBatchNorm(4, dtype=torch.float64, **SETTINGS[settings])
    if layer.affine:
        nn.init.uniform_(layer.weight.data, generator=generator)
    part = share(world, split, 9)
    theirs = one_process(layer, x, dy, residual)
    ours = on_ranks(world, layer, x, dy, part, residual)
    assert_equal_parts(ours, theirs, part, 1e-12)
    if ours["y"].numel():
        assert ours["y"].is_contiguous(memory_format=memory_format)
        assert ours["dx"].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_grad_reduction(world, reduction):
    """Without DistributedDataParallel the layer adds up the gradients of its parameters itself."""
    generator = torch.Generator().manual_seed(3)
    x, dy = torch.randn(2, 8, 3, 4, 4, generator=generator, dtype=torch.float64)
    part = share(world, "uneven", 8)
    layer = SyncBatchNorm(3, dtype=torch.float64, grad_reduction=reduction)
    theirs = one_process(layer, x, dy)
    layer(x[part]).backward(dy[part])
    scale = 1 / world.size if reduction == "mean" else 1
    assert deviation(layer.weight.grad, theirs["weight.grad"] * scale) <= 1e-12
    assert deviation(layer.bias.grad, theirs["bias.grad"] * scale) <= 1e-12


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_gradcheck_with_the_ranks_as_one_process(world, training, activation):
    """Differences of the sum over the ranks' losses, in which a rank's input moves all ranks' results."""
    generator = torch.Generator().manual_seed(4)
    x, weights = torch.randn(2, 6, 2, 2, 2, generator=generator, dtype=torch.float64)
    part = share(world, "uneven", 6)
    layer = SyncBatchNorm(2, dtype=torch.float64, activation=activation).train(training)
    layer.track_running_stats = False  # so that each evaluation is the same

    def loss(x):
        with torch.no_grad():
            return float(world.sum((layer(x[part]) * weights[part]).sum()))

    own = x[part].clone().requires_grad_()
    (layer(own) * weights[part]).sum().backward()
    parts = world.comm.allgather(own.grad.numpy())
    gradient = np.concatenate(parts)
    for index in np.ndindex(*x.shape):
        moved = [x.clone(), x.clone()]
        for each, step in zip(moved, (1e-6, -1e-6), strict=True):
            each[index] += step
        difference = (loss(moved[0]) - loss(moved[1])) / 2e-6
        assert abs(difference - gradient[index]) <= 1e-6


@pytest.mark.parametrize("activation", [None, ("leaky_relu", 0.3)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_torchs_gradcheck(world, training, activation):
    """All ranks evaluate alike. As all have the same batch, what one moves the others by, they move it by."""
    generator = torch.Generator().manual_seed(5)
    x, residual = torch.randn(2, 4, 2, 3, generator=generator, dtype=torch.float64)
    layer = SyncBatchNorm(2, dtype=torch.float64, activation=activation).train(training)

    def called(x, residual, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x, residual))

    parameters = [each.detach().clone() + 0.5 for each in (layer.weight, layer.bias)]
    assert torch.autograd.gradcheck(called, [each.requires_grad_() for each in (x, residual, *parameters)])


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "hooks"])
def test_activation_checkpointing(world, use_reentrant):
    """The forward that is computed again is collective, and its batch counts once."""
    x, _ = make_steps(torch.float64, steps=1)
    part = share(world, "uneven")
    plain, network = make_network(torch.float64), convert_sync_batchnorm(make_network(torch.float64))
    own, whole = x[0, part].clone().requires_grad_(), x[0].clone().requires_grad_()
    network[5:](checkpoint(network[:5], own, use_reentrant=use_reentrant)).square().sum().backward()
    plain(whole).square().sum().backward()
    for (name, ours), theirs in zip(network.named_parameters(), plain.parameters(), strict=True):
        assert deviation(torch.from_numpy(world.sum(ours.grad)), theirs.grad) <= 1e-10, name
    assert deviation(own.grad, whole.grad[part]) <= 1e-10
    assert largest_deviation(network.state_dict(), plain.state_dict()) <= 1e-12
    assert int(network[1].num_batches_tracked) == 1


def test_torchs_own_layer_counts_a_checkpointed_batch_twice():
    """What this package does not do: if torch changes, the docstring of SyncBatchNorm has to."""
    layer = nn.BatchNorm1d(3)
    checkpoint(layer, torch.randn(4, 3, requires_grad=True), use_reentrant=False).sum().backward()
    assert int(layer.num_batches_tracked) == 2


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "hooks"])
def test_fault_in_a_forward_that_is_computed_again(world, use_reentrant):
    layers = nn.ModuleList(SyncBatchNorm(3, name=name) for name in "abc")
    calls, culprit = [], world.size - 1

    def part(x):
        calls.append(x)
        x = layers[0](x)
        return layers[1](x[:, :2] if world.rank == culprit and len(calls) == 2 else x)

    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(world.rank), requires_grad=True)
    y = layers[2](checkpoint(part, x, use_reentrant=use_reentrant))
    kind, match = (ValueError, "channels") if world.rank == culprit else (RemoteRankError, "forward 1 of b")
    with pytest.raises(kind, match=match):
        y.square().sum().backward()
    layers[0](x)


def test_saved_input_goes_through_hooks_alone(world):
    """Such as those of save_on_cpu and of activation checkpointing, which drop it meanwhile."""
    layer = SyncBatchNorm(3, activation="relu", dtype=torch.float64)
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
    packed, copies = [], {}

    def pack(tensor):
        packed.append(tensor.shape)
        copies[len(packed)] = tensor.detach().numpy().tobytes()
        return len(packed)

    def unpack(number):
        return torch.frombuffer(bytearray(copies[number]), dtype=torch.float64).view(6, 3)

    part = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        middle = part * 1
        y = layer(middle)
    reference = weakref.ref(middle)
    del middle
    assert reference() is None
    assert (6, 3) in packed
    y.square().sum().backward()
    plain = x.clone().requires_grad_()
    F.relu(nn.BatchNorm1d(3, dtype=torch.float64)(plain)).square().sum().backward()
    assert deviation(part.grad, plain.grad) <= 1e-12


def test_layer_used_twice(world):
    """Each forward has a record of its own, and the backwards come in the order of autograd."""
    generator = torch.Generator().manual_seed(6)
    x, dy = torch.randn(2, 7, 3, 4, 4, generator=generator, dtype=torch.float64)
    part = share(world, "uneven", 7)
    layer, plain = SyncBatchNorm(3, dtype=torch.float64), nn.BatchNorm2d(3, dtype=torch.float64)
    own, whole = x[part].clone().requires_grad_(), x.clone().requires_grad_()
    layer(layer(own) ** 2 + layer(own.sin())).backward(dy[part])
    plain(plain(whole) ** 2 + plain(whole.sin())).backward(dy)
    assert not own.numel() or deviation(own.grad, whole.grad[part]) <= 1e-11
    assert deviation(torch.from_numpy(world.sum(layer.weight.grad)), plain.weight.grad) <= 1e-11
    assert largest_deviation(layer.state_dict(), plain.state_dict()) <= 1e-12


def test_backward_twice_on_a_kept_graph(world):
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(world.rank))
    layer = SyncBatchNorm(3, dtype=torch.float64)
    y = layer(x.requires_grad_())
    y.backward(x.detach(), retain_graph=True)
    first = x.grad.clone()
    y.backward(x.detach())
    assert torch.equal(x.grad, 2 * first)
    with pytest.raises(RuntimeError, match="a second time"):  # torch's own error, on all ranks
        y.backward(x.detach())
    layer(x).sum().backward()


@pytest.mark.parametrize("grad_reduction", ["none", "sum"])
def test_evaluation_needs_nobody_else(world, grad_reduction):
    layer = SyncBatchNorm(3).eval()
    if world.rank == 0:
        with torch.no_grad():
            layer(torch.ones(1, 3))
        with torch.inference_mode():
            assert layer(torch.ones(1, 3)).is_inference()
    layer.grad_reduction = grad_reduction
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(7)).requires_grad_()
    layer(x).sum().backward()
    expected = x.detach().sum(0) / (1 + layer.eps) ** 0.5 * (world.size if grad_reduction == "sum" else 1)
    assert deviation(layer.weight.grad, expected) <= 1e-5


FAULTS = {
    "wrong channels": lambda layer, x: layer(x[:, :2]),
    "wrong type": lambda layer, x: layer(x.double()),
    "no tensor": lambda layer, x: layer(x.numpy()),
    "one axis": lambda layer, x: layer(x[0, :, 0, 0]),
    "residual of another size": lambda layer, x: layer(x, x[1:]),
    "meta tensor": lambda layer, x: layer(x.to("meta")),
}


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_a_forward_is_an_error_on_all_ranks(world, fault):
    layer, x = SyncBatchNorm(3), torch.ones(2, 3, 4, 4)
    culprit = world.size - 1
    before = copy.deepcopy(layer.state_dict())
    kind = Exception if world.rank == culprit else RemoteRankError
    with pytest.raises(kind) as caught:
        (FAULTS[fault] if world.rank == culprit else SyncBatchNorm.forward)(layer, x)
    if world.rank == culprit:
        assert not isinstance(caught.value, RemoteRankError)
    else:
        assert f"rank {culprit} failed before forward 0 of SyncBatchNorm" in str(caught.value)
    assert largest_deviation(layer.state_dict(), before) == 0
    layer(x)  # all go on


@pytest.mark.mpi(min_size=2)
def test_fault_in_a_backward_is_an_error_on_all_ranks(world, torch_ranks):
    network = convert_sync_batchnorm(make_network(torch.float32))
    called = nn.parallel.DistributedDataParallel(network)
    x, culprit = torch.randn(3, 3, 9, 9, generator=torch.Generator().manual_seed(8)), world.size - 1
    kept = []
    network[4].register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    loss = called(x).square().sum()
    if world.rank == culprit:
        with torch.no_grad():
            kept[0].add_(1)  # which autograd notices, in the backward of that layer
    kind, match = RemoteRankError, f"rank {culprit} failed before backward 0 of 4 with eps"
    if world.rank == culprit:
        kind, match = RuntimeError, "modified by an inplace operation"
    with pytest.raises(kind, match=match):
        loss.backward()


@pytest.mark.mpi(min_size=2)
def test_fault_between_two_layers_ends_by_the_timeout(world):
    """Of a fault outside of this package nobody tells: the ranks that wait in the next layer give up."""
    group = new_group(timeout=1)
    first, last = (SyncBatchNorm(3, process_group=group) for _ in range(2))
    x, culprit = torch.randn(4, 3, requires_grad=True), world.size - 1
    y = first(x)
    if world.rank == culprit:
        y.register_hook(lambda gradient: 1 / 0)
    kind = ZeroDivisionError if world.rank == culprit else CollectiveTimeoutError
    with pytest.raises(kind):
        last(y).square().sum().backward()
    world.comm.barrier()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    "change", [{"eps": 1e-3}, {"momentum": 0.2}, {"activation": "relu"}, {"name": "b"}], ids=str
)
def test_ranks_with_other_settings(world, change):
    layer = SyncBatchNorm(3, **(change if world.rank == 0 else {}))
    with pytest.raises(RankMismatchError, match="forward 0 of"):
        layer(torch.ones(2, 3))


@pytest.mark.mpi(min_size=2)
def test_a_forward_too_many(world):
    """A rank that is in another call is an error on all."""
    layer, x = SyncBatchNorm(3), torch.randn(2, 3, generator=torch.Generator().manual_seed(world.rank))
    y = layer(x.requires_grad_())
    next_call = partial(layer, x) if world.rank == 0 else y.sum().backward
    with pytest.raises(RankMismatchError, match="rank 0 is in forward 1" if world.rank else "in backward 0"):
        next_call()


def test_backward_in_another_thread(world):
    """As autograd's of a GPU: MPI is called there, and nobody else calls it meanwhile."""
    layer = SyncBatchNorm(3, dtype=torch.float64)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    part = share(world, "even", 4)
    own = x[part].clone().requires_grad_()
    y = layer(own)
    thread = threading.Thread(target=y.backward, args=[x[part].sin()])
    thread.start()
    thread.join()
    whole = x.clone().requires_grad_()
    nn.BatchNorm1d(3, dtype=torch.float64)(whole).backward(x.sin())
    assert not own.numel() or deviation(own.grad, whole.grad[part]) <= 1e-12


def test_groups(world):
    """A layer of some ranks only: each by itself."""
    with new_group([0]) as first:
        layer = SyncBatchNorm(3, process_group=first, dtype=torch.float64)
        if world.rank == 0:
            x = torch.randn(5, 3, generator=torch.Generator().manual_seed(10), dtype=torch.float64)
            assert deviation(layer(x), nn.BatchNorm1d(3, dtype=torch.float64)(x)) <= 1e-12
        else:
            with pytest.raises(RuntimeError, match="not a member"):
                layer(torch.ones(2, 3, dtype=torch.float64))


def test_copies_of_a_layer_and_of_its_group(world):
    layer = SyncBatchNorm(3, process_group=world.comm, activation="relu", dtype=torch.float64)
    part = share(world, "uneven", 8)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    expected = layer(x[part])
    for copied in copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)):
        assert torch.equal(copied(x[part]), expected)
        assert copied.process_group is None or copied.process_group.size == world.size


def test_process_group_of_torch_is_refused(torch_ranks):
    group = torch_ranks.group.WORLD
    for make in (
        lambda: SyncBatchNorm(3, process_group=group),
        lambda: convert_sync_batchnorm(nn.BatchNorm1d(3), group),
        lambda: convert_sync_batchnorm(nn.SyncBatchNorm(3, process_group=group)),
    ):
        with pytest.raises(TypeError, match=r"cupy_syncbn.new_group\(ranks\)"):
            make()


def test_ranks_of_torch_are_those_of_mpi(world, torch_ranks):
    assert (torch_ranks.get_rank(), torch_ranks.get_world_size()) == (world.rank, world.size)
    assert default_group().size == world.size


@pytest.mark.mpi(min_size=2)
def test_fault_of_the_rank_where_torch_is_to_meet(world, monkeypatch):
    def no_port(*arguments, **settings):
        raise OSError("no port")

    if world.rank == 0:
        monkeypatch.setattr(interop, "_distributed", SimpleNamespace(TCPStore=no_port))
    with pytest.raises(OSError if world.rank == 0 else RemoteRankError, match="no port"):
        interop.init_process_group()
