"""Data-parallel training: equal parameters at the start, averaged gradients at each step."""

from __future__ import annotations

import functools
import itertools
import json
import zlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from cupy_syncbn.arrays import Array, check_writeable, module_of
from cupy_syncbn.backends import backend_of
from cupy_syncbn.comm.call import Call, Preparing
from cupy_syncbn.comm.errors import RankMismatchError
from cupy_syncbn.comm.groups import ProcessGroup, as_group
from cupy_syncbn.nn.batch_norm import BatchNormBase, SyncBatchNorm, restart_calls
from cupy_syncbn.nn.module import Module, Parameter, check_gradient, tree_of

if TYPE_CHECKING:
    from mpi4py import MPI


class DistributedDataParallel(Module):
    """A module trained by several ranks, each on its part of the batch.

    Parameters
    ----------
    module : Module
        The module. Its parameters and buffers take the values they have on rank 0.
    process_group : ProcessGroup, mpi4py.MPI.Intracomm or None
        The ranks; None is all.
    bucket_cap_mb : float
        MiB of gradients that one message carries at most, except that one parameter is never divided.

    Raises
    ------
    TypeError
        If `module` is not a Module, or a parameter not an array.
    ValueError
        If `bucket_cap_mb` is not positive, or an array is read-only.
    RemoteRankError
        If an array of another rank's module is wrong so.
    RankMismatchError
        If parameters or buffers differ between ranks in name, shape, type or device, or `bucket_cap_mb` does.
    CollectiveTimeoutError
        If a rank does not come within the group's timeout.

    Notes
    -----
    Construction and `reduce_gradients` are **collective**; forward and backward are the module's.
    SyncBatchNorm layers without a name take their dotted one in the module, for errors to tell.

    Examples
    --------
    >>> import numpy as np
    >>> bn = SyncBatchNorm(3)
    >>> model = DistributedDataParallel(bn)
    >>> y = model(np.random.default_rng(0).normal(size=(8, 3)).astype("float32"))
    >>> dx = model.backward(y)
    >>> model.reduce_gradients()
    >>> bn.weight.data -= 0.1 * bn.weight.grad
    """

    def __init__(
        self,
        module: Module,
        process_group: ProcessGroup | MPI.Intracomm | None = None,
        bucket_cap_mb: float = 25,
    ) -> None:
        if not isinstance(module, Module):
            raise TypeError(f"expected a Module (got {type(module).__name__})")
        if not bucket_cap_mb > 0:
            raise ValueError(f"expected bucket_cap_mb to be positive (got {bucket_cap_mb!r})")
        self.module = module
        # None stays None, so that a pickle means the ranks of the program that loads it.
        self._group = None if process_group is None else as_group(process_group)
        group = self.process_group
        self.bucket_cap_mb = bucket_cap_mb
        self.training = module.training
        self._reductions = 0
        # Each array once, by its last name, so that ranks which share others of their arrays differ too.
        state = dict({id(array): (name, array) for name, array in module.state_dict().items()}.values())
        call = Call("DistributedDataParallel", 0, "construction", 0)
        with Preparing(call, group, 3):
            for name, array in state.items():
                _check_array(name, array)
        call.allreduce_checked(group, np.array(call.trailer(group)))
        _check_alike(group, self._description(state))
        for array in state.values():
            values = module_of(array).ascontiguousarray(array)
            group.broadcast(values)
            array[...] = values.reshape(array.shape)
        for name, layer in module.named_modules():
            if isinstance(layer, SyncBatchNorm):
                layer.name = layer.name or name or None  # alike on all ranks: tells those of one size apart
                restart_calls(layer)  # one that a rank has loaded from a pickle may have been called before

    @property
    def process_group(self) -> ProcessGroup:
        """The ranks."""
        return as_group(self._group)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self.module(*args, **kwargs)

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module's backward. Gradients are this rank's until `reduce_gradients`."""
        return self.module.backward(*args, **kwargs)

    def reduce_gradients(self) -> None:
        """Replace all gradients by their mean over the ranks.

        Left out are those of layers whose ``grad_reduction`` has summed or averaged them over these ranks.
        A gradient that only some ranks have counts as zero on the others; one that none has stays None.

        Raises
        ------
        TypeError, ValueError
            If a gradient is not an array of floating-point numbers, where its parameter is, of its shape.
        RemoteRankError
            If that is so on another rank.
        RankMismatchError
            If the ranks have other parameters, or made another number of calls.
        CollectiveTimeoutError
            If a rank does not come within the group's timeout.

        Notes
        -----
        **Collective.** 16-bit gradients are added up in float32. If a rank is lost, or out of memory, between
        two messages, the gradients of the first are averaged already: compute all anew.
        """
        group = self.process_group
        reduced = self._already_reduced()
        named = [(name, p) for name, p in self.module.named_parameters() if id(p) not in reduced]
        caller = "DistributedDataParallel"
        if group.size > 1:
            code = zlib.crc32(repr(self._description({name: p.data for name, p in named})).encode())
            caller += f" with parameters of code {code:08x}"
        call = Call(caller, 0, "gradients", self._reductions)
        with Preparing(call, group, len(named) + 3):
            for name, parameter in named:
                check_gradient(name, parameter)
            present = np.array([parameter.grad is not None for _, parameter in named] + [0] * 3, np.float64)
            present[-3:] = call.trailer(group)
        call.allreduce_checked(group, present)
        self._reductions += 1
        if group.size > 1:
            parameters = [p for (_, p), ranks in zip(named, present[:-3], strict=True) if ranks]
            for bucket in self._buckets(parameters):
                self._average(bucket)

    def _description(self, arrays: dict[str, Array]) -> list[str]:
        """Describe all that the messages between ranks depend on."""
        described = [
            _describe(name, array.shape, array.dtype, module_of(array))
            if hasattr(array, "dtype")
            else f"{name}: {type(array).__name__}"
            for name, array in arrays.items()
        ]
        return [*described, f"bucket_cap_mb: {float(self.bucket_cap_mb)}"]

    def _already_reduced(self) -> set[int]:
        """Return the parameters whose gradients come from layers alone that reduce them over these ranks."""
        reduced: set[int] = set()
        others: set[int] = set()
        tree = tree_of(self.module)
        for module, parameters in ((self.module, tree.root_leaves), *(each[1:] for each in tree.within)):
            is_reducing = (
                isinstance(module, BatchNormBase)
                and module.grad_reduction != "none"
                and as_group(module.process_group).has_same_ranks(self.process_group)
            )
            (reduced if is_reducing else others).update(map(id, parameters))
        return reduced - others

    def _buckets(self, parameters: list[Parameter]) -> list[list[Parameter]]:
        """Divide parameters into runs of one type that fit into a message."""
        buckets: list[list[Parameter]] = []
        room = 0.0
        for parameter in parameters:
            dtype = _sum_type(parameter)
            nbytes = parameter.data.size * dtype.itemsize
            if not buckets or nbytes > room or not _fit_together(parameter, buckets[-1][0]):
                buckets.append([])
                room = self.bucket_cap_mb * 2**20
            buckets[-1].append(parameter)
            room -= nbytes
        return buckets

    def _average(self, bucket: list[Parameter]) -> None:
        xp = module_of(bucket[0].data)
        total = xp.zeros(sum(parameter.data.size for parameter in bucket), _sum_type(bucket[0]))
        ends = itertools.accumulate(parameter.data.size for parameter in bucket)
        parts = [total[end - p.data.size : end] for p, end in zip(bucket, ends, strict=True)]
        for parameter, part in zip(bucket, parts, strict=True):
            if parameter.grad is not None:
                part[...] = parameter.grad.reshape(-1)
        group = self.process_group
        group.allreduce(total)
        total /= group.size
        for parameter, part in zip(bucket, parts, strict=True):
            gradient = parameter.grad
            if gradient is None or (xp is np and not gradient.flags.writeable):
                parameter.grad = gradient = xp.empty_like(parameter.data)
            gradient[...] = part.reshape(parameter.data.shape)


@functools.lru_cache(maxsize=4096)
def _describe(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], library: ModuleType) -> str:
    return f"{name}: shape {shape}, type {dtype.str} {dtype.name}, of {library.__name__}"


def _check_array(name: str, array: Any) -> None:
    try:
        backend_of(array)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None
    check_writeable(name, array)


def _check_alike(group: ProcessGroup, description: list[str]) -> None:
    """Compare a description with that of rank 0, exactly: broadcasts of other lengths would crash."""
    if group.size == 1:
        return
    encoded = json.dumps(description).encode()
    length = np.array([len(encoded)])
    group.broadcast(length)
    first = np.zeros(length[0], np.uint8)
    if group.rank == 0:
        first[:] = np.frombuffer(encoded, np.uint8)
    group.broadcast(first)
    differs = np.zeros(group.size)
    differs[group.rank] = first.tobytes() != encoded
    group.allreduce(differs)
    if not differs.any():
        return
    others = np.flatnonzero(differs)
    if not differs[group.rank]:
        raise RankMismatchError(f"rank {others[0]} has another module than rank 0: see the error there")
    theirs = json.loads(first.tobytes())
    pairs = itertools.zip_longest(description, theirs, fillvalue="nothing more")
    here, there = next(pair for pair in pairs if pair[0] != pair[1])
    raise RankMismatchError(
        f"rank {group.rank} has another module than rank 0: {here} here, {there} there. "
        "All ranks must construct the same model with the same arguments"
    )


def _fit_together(a: Parameter, b: Parameter) -> bool:
    """Tell whether the gradients of two parameters can share a message."""
    return _sum_type(a) == _sum_type(b) and module_of(a.data) is module_of(b.data)


def _sum_type(parameter: Parameter) -> np.dtype[Any]:
    """MPI adds up float32 and float64 of this machine's byte order, not 16-bit floats."""
    dtype: np.dtype[Any] = parameter.data.dtype.newbyteorder("=")
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype
