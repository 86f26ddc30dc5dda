"""Running statistics: set from a whole data set, or kept from changing."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np

from cupy_syncbn.arrays import Array, check_writeable, module_of, move
from cupy_syncbn.backends.vector import moments, round_to_12_bits
from cupy_syncbn.comm import trailer
from cupy_syncbn.comm.call import DO, Call, Collective, commit, was_heard_by
from cupy_syncbn.comm.groups import ProcessGroup, SingleProcessGroup, as_group
from cupy_syncbn.functional import Description, Saved
from cupy_syncbn.nn.batch_norm import BatchNormBase, FrozenStatistics, observing
from cupy_syncbn.nn.conversion import check_reach
from cupy_syncbn.nn.module import Module, check_module, no_backward


def frozen_statistics(module: Module) -> contextlib.AbstractContextManager[None]:
    """Return a context in which training leaves running statistics and num_batches_tracked as they are.

    Batches are still normalized by their own statistics. Use it for forwards that are computed again, as in
    activation checkpointing: without it, their batches would count twice. The first forward, whose
    activations are dropped, belongs in `no_backward`.

    Parameters
    ----------
    module : Module
        Holds the batch normalizations: those that it has at this call.

    Returns
    -------
    context manager
        It may be entered any number of times, and nested. Some ranks may be inside while others are not.

    Raises
    ------
    TypeError
        If `module` is not a Module.

    Examples
    --------
    >>> import numpy as np
    >>> from cupy_syncbn import BatchNorm1d, no_backward
    >>> bn, x = BatchNorm1d(3, device="cpu"), np.ones((4, 3), "float32")
    >>> with no_backward(bn):
    ...     y = bn(x)
    >>> with frozen_statistics(bn):
    ...     y = bn(x)
    >>> int(bn.num_batches_tracked), bn.backward(y).shape
    (1, (4, 3))
    """
    return FrozenStatistics(_layers(module))


def recalibrate(module: Module, batches: Iterable[Any]) -> None:
    """Set running statistics to the mean and unbiased variance of all values of a data set.

    Each value that a layer meets, in all `batches` of all ranks of its group, has the same weight ("precise
    batch norm", Wu and Johnson 2021). Training leaves a moving average instead, which lags behind the
    parameters. The module is called as in training: each batch is normalized by its own statistics, over the
    ranks.

    Parameters
    ----------
    module : Module
        Its batch normalizations are in training mode meanwhile, all other modules in the mode they have.
        ``num_batches_tracked``, gradients, and a forward that waits for its backward stay as they are.
    batches : iterable of array, or of tuple
        The arguments to call `module` with; a tuple as ``module(*batch)``. Ranks may have different numbers
        of batches, but each has one: a rank that has no more joins the others without samples, its last
        batch cut to length 0 along the first axis of each array. A rank without data gives ``[x[:0]]``.

    Raises
    ------
    TypeError
        If `module` is not a Module, or does not see a batch normalization that it holds.
    ValueError
        If there is no batch on this rank, or running statistics are read-only. The other ranks raise
        RemoteRankError, also for what `batches` raises.
    RemoteRankError, RankMismatchError, CollectiveTimeoutError
        See `sync_batch_norm`. After any error, all is as it was before.

    Notes
    -----
    **Collective** if there are SyncBatchNorm layers: every rank of the largest of their groups must call it,
    and the other groups must lie within that one. Before each batch the ranks exchange whether there is one.
    With momentum None, later training counts the result as the average of the batches so far.

    Examples
    --------
    >>> import numpy as np
    >>> from cupy_syncbn import BatchNorm1d
    >>> bn = BatchNorm1d(1, device="cpu")
    >>> recalibrate(bn, [np.array([[1], [2], [3]], "float32"), np.array([[4], [9]], "float32")])
    >>> bn.running_mean.tolist(), bn.running_var.round(4).tolist()
    ([3.799999952316284], [9.699999809265137])
    """
    layers = _layers(module)
    check_reach(module, lambda each: isinstance(each, BatchNormBase))
    groups = [as_group(layer.process_group) for layer in layers]
    group = max(groups, key=lambda each: each.size, default=SingleProcessGroup())
    totals = [_Total() for _ in layers]
    with contextlib.ExitStack() as stack:
        stack.enter_context(FrozenStatistics(layers))
        stack.enter_context(no_backward(module))
        for layer, total in zip(layers, totals, strict=True):
            stack.enter_context(observing(layer, total.add))
        for number, arguments in enumerate(_in_step(batches, group, layers)):
            try:
                module(*arguments)
            except Exception as error:
                if not was_heard_by(group, error):  # the others are in this batch, or wait for the next
                    with Collective(describe=partial(_describe, layers, number + 1, group)):
                        raise
                raise
        for each in groups:
            each.check_errors()
    writes = []
    for layer, total in zip(layers, totals, strict=True):
        if layer.running_mean is not None and layer.running_var is not None and total.count:
            writes.append(_assignment(layer.running_mean, total.pivot + total.offset))
            writes.append(_assignment(layer.running_var, total.m2 / max(total.count - 1, 1)))
    commit(map(DO, writes))


def _layers(module: Module) -> list[BatchNormBase]:
    check_module(module)
    return [layer for _, layer in module.named_modules() if isinstance(layer, BatchNormBase)]


class _Total:
    """Statistics of all values that a layer has met, (C,) in float64."""

    def __init__(self) -> None:
        self.count = 0.0
        self.pivot: Array = np.zeros(())
        self.offset: Array = np.zeros(())
        """mean - pivot: where the mean is far from zero, differences between means need all its bits."""
        self.m2: Array = np.zeros(())
        """Σ(x - mean)²."""

    @np.errstate(all="ignore")  # infinities and NaN are the data's, and pass through
    def add(self, forward: Saved) -> None:
        """Merge the statistics of a forward, after Chan, Golub and LeVeque (1983)."""
        if forward.batch is None:  # the module keeps this layer in evaluation mode: it stays as it is
            return
        vector, C = move(forward.batch.vector, np), forward.call.channels
        _, m2, count = moments(vector, C)
        if not count:
            return
        if forward.batch.squares is not None:
            m2 = move(forward.batch.squares, np)[:C]
        pivot_sum, _, sum_ = vector[: 3 * C].reshape(3, C)
        pivot = round_to_12_bits(pivot_sum / count)
        if not self.count:
            self.pivot = pivot
        offset = (pivot - self.pivot) + ((pivot_sum - count * pivot) + sum_) / count
        distance, share = offset - self.offset, count / (self.count + count)
        self.m2 = self.m2 + np.maximum(m2, 0) + distance * distance * (self.count * share)
        self.offset = self.offset + distance * share
        self.count += count


def _describe(layers: list[BatchNormBase], number: int, group: ProcessGroup) -> Description:
    call = Call(f"recalibrate of {len(layers)} layers", 0, "batch", number)
    return call, group, 1 + trailer.LENGTH, ()


def _in_step(
    batches: Iterable[Any], group: ProcessGroup, layers: list[BatchNormBase]
) -> Iterator[tuple[Any, ...]]:
    """Yield the arguments of each batch, and empty ones while other ranks have more (**collective**)."""
    end = object()
    for number in itertools.count():
        describe = partial(_describe, layers, number, group)
        with Collective(describe=describe) as step:
            step.enter(*describe())
            if number == 0:
                for layer in layers:
                    check_writeable("running_mean", layer.running_mean)
                    check_writeable("running_var", layer.running_var)
                iterator, arguments = iter(batches), ()
            batch = next(iterator, end)
            if batch is end and number == 0:
                raise ValueError(
                    "expected at least one batch (got none): give [x[:0]] on a rank without data"
                )
            votes = np.array([batch is not end, *step.trailer()])
            step.sum(votes)
        if not votes[0]:
            return
        if batch is not end:
            arguments = batch if isinstance(batch, tuple) else (batch,)
        yield arguments if batch is not end else _emptied(arguments)


def _emptied(value: Any) -> Any:
    """Return arguments with all arrays cut to length 0 along their first axis."""
    if isinstance(value, dict):
        return {key: _emptied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return getattr(value, "_make", type(value))([_emptied(item) for item in value])
    return value[:0] if getattr(value, "shape", ()) else value


@np.errstate(all="ignore")
def _assignment(buffer: Array, values: Array) -> Callable[[], object]:
    """Return what writes complete values."""
    return partial(buffer.__setitem__, ..., module_of(buffer).asarray(values.astype(buffer.dtype)))
