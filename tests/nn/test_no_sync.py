"""`no_sync`: gradients add up on each rank, and are reduced behind it."""

import contextlib
import copy
import pickle

import numpy as np
import pytest

from cupy_syncbn import DistributedDataParallel, RankMismatchError, Sequential, SyncBatchNorm
from support.arrays import on_host, random_array, random_batch
from support.compare import assert_close

C, SHAPE = 4, (12, 4, 3, 2)


def test_parts_of_a_batch(world, rng, device, xp):
    """A step that reduces each time is called for all parts, the last one outside."""
    models = [DistributedDataParallel(Sequential(SyncBatchNorm(C, device=device))) for _ in "12"]
    parts = [tuple(random_array(rng, SHAPE) * (world.rank + 1) for _ in "12") for _ in range(3)]

    def step(model, x, dy, reduces=True):
        model(xp.asarray(x))
        model.backward(xp.asarray(dy))
        if reduces:
            model.reduce_gradients()

    with models[0].no_sync():
        for x, dy in parts[:-1]:
            step(models[0], x, dy)
    step(models[0], *parts[-1])
    for x, dy in parts:
        step(models[1], x, dy, reduces=False)
    models[1].reduce_gradients()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert_close(on_host(one.grad), on_host(other.grad))
        world.assert_same(on_host(one.grad))


def test_it_nests_and_ends_with_an_error(world):
    model = DistributedDataParallel(Sequential(SyncBatchNorm(C)))

    def grad_after_reduction():
        model.module[0].weight.grad = np.full(C, 3.0 * world.rank, "f4")
        model.reduce_gradients()
        return model.module[0].weight.grad.tolist()

    own, mean = [3 * world.rank] * C, [3 * (world.size - 1) / 2] * C
    with model.no_sync():
        with model.no_sync():
            assert grad_after_reduction() == own
        assert grad_after_reduction() == own
    assert grad_after_reduction() == mean
    with pytest.raises(ZeroDivisionError), model.no_sync():
        raise ZeroDivisionError
    assert grad_after_reduction() == mean


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_outside(world, duplicate):
    model = DistributedDataParallel(Sequential(SyncBatchNorm(C)))
    with model.no_sync():
        other = duplicate(model)
    other.module[0].weight.grad = np.full(C, world.rank, "f4")
    other.reduce_gradients()
    assert other.module[0].weight.grad.tolist() == [(world.size - 1) / 2] * C


@pytest.mark.mpi(min_size=2)
def test_one_rank_inside(world, rng):
    """It is in the next call, while the others reduce."""
    model = DistributedDataParallel(Sequential(SyncBatchNorm(C)))
    x = random_batch(rng, SHAPE)
    model.backward(model(x))

    with contextlib.ExitStack() as stack:
        if world.rank == 0:
            stack.enter_context(model.no_sync())
            model.reduce_gradients()
        call = (lambda: model(x)) if world.rank == 0 else model.reduce_gradients
        with pytest.raises(RankMismatchError, match="gradients 0 of DistributedDataParallel"):
            call()
