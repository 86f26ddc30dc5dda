"""Data-parallel training: equal parameters at the start, averaged gradients at each step."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cupy_syncbn.arrays import Array, check_writeable, module_of
from cupy_syncbn.backends import backend_of
from cupy_syncbn.comm import trailer
from cupy_syncbn.comm.call import DO, Call, Collective, commit
from cupy_syncbn.comm.errors import RankMismatchError
from cupy_syncbn.comm.groups import ProcessGroup, as_group
from cupy_syncbn.functional import Description
from cupy_syncbn.nn.batch_norm import BatchNormBase, SyncBatchNorm, restart_of
from cupy_syncbn.nn.conversion import check_reach
from cupy_syncbn.nn.module import Module, check_module, own_buffers, tree_of
from cupy_syncbn.nn.parameter import Parameter, check_gradient
from cupy_syncbn.nn.tree import join

if TYPE_CHECKING:
    from mpi4py import MPI


_DIGEST = 8
"""Numbers by which ranks compare the description of their modules."""


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
    broadcast_buffers : bool
        Whether buffers take the values of rank 0 before each forward in training mode, as in torch: so all
        ranks evaluate by the same statistics of a local BatchNorm, which are rank 0's. Left out are those of
        SyncBatchNorm layers over these ranks, which are equal anyway. Without others, no message is sent.

    Raises
    ------
    TypeError
        If `module` is not a Module, or a parameter not an array; or if a batch normalization lies where the
        module does not see it, such as in an object that is no Module.
    ValueError
        If `module` has no parameters, `bucket_cap_mb` is not positive, or an array is read-only.
    RemoteRankError
        If another rank has one of these errors.
    RankMismatchError
        If parameters or buffers differ between ranks in name, shape, type, device or ``requires_grad``, or
        `bucket_cap_mb` does.
    CollectiveTimeoutError
        If a rank does not come within the group's timeout.

    Notes
    -----
    Construction and `reduce_gradients` are **collective**. backward is the module's, and so is forward,
    except that it sends the buffers. SyncBatchNorm layers without a name take their dotted name in the
    module, which errors then show. Forwards before the construction are forgotten.

    After a step without `reduce_gradients` the parameters of the ranks differ, and no error says so: to find
    out would take one more message per step. Construction sends parameters and buffers, but not the state of
    an optimizer: load that on each rank.

    torch's other keywords are not needed. A rank computes where the arrays of its module are (`device_ids`,
    `output_device`), on the part of the batch that it is given (`dim`). One call after the backward reduces
    the gradients that exist (`find_unused_parameters`, `static_graph`), in arrays of their own
    (`gradient_as_bucket_view`). Construction always compares and sends (`init_sync`).

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

    _transient = ("_tree", "_paused")
    _group: ProcessGroup | None = None
    bucket_cap_mb: float = 25
    _reductions: int = 0
    _model: int | None = None
    """See `Call`."""
    broadcast_buffers: bool = True
    _broadcasts: int = 0
    _paused: int = 0
    """How many `no_sync` it is in."""

    def __init__(
        self,
        module: Module,
        process_group: ProcessGroup | MPI.Intracomm | None = None,
        bucket_cap_mb: float = 25,
        broadcast_buffers: bool = True,
    ) -> None:
        with Collective(describe=partial(_describe_construction, process_group)) as step:
            step.enter(*_describe_construction(process_group))
            check_module(module)
            check_reach(module, lambda each: isinstance(each, BatchNormBase))
            if not any(True for _ in module.parameters()):
                raise ValueError(
                    f"expected a module with parameters to train (got {type(module).__name__}, in which none "
                    "are found: as attributes, or in lists, tuples and dicts): call it without a wrapper"
                )
            if not bucket_cap_mb > 0:
                raise ValueError(f"expected bucket_cap_mb to be positive (got {bucket_cap_mb!r})")
            self.module = module
            # None stays None, so that a pickle means the ranks of the program that loads it.
            self._group = None if process_group is None else as_group(process_group)
            self.bucket_cap_mb, self.broadcast_buffers = bucket_cap_mb, broadcast_buffers
            self.training = module.training
            self._reductions = self._broadcasts = 0
            step.needed, step.owes_messages = 2, True
            self._start_alike(step)

    def _start_alike(self, step: Collective) -> None:
        """Take the values of rank 0, all or none, and name the layers."""
        # Each array once, by its last name, so that ranks which share others of their arrays differ too.
        named = self.module.state_dict().items()
        state = dict({id(array): (name, array) for name, array in named}.values())
        for name, array in state.items():
            _check_array(name, array)
        group = step.group
        description = self._description(state)
        copies = [array.copy().reshape(-1) for array in state.values()]
        code = zlib.crc32(json.dumps(description).encode())
        vector = np.array([*trailer.pairs_of(code), *trailer.pairs_of(code >> 8), *step.trailer()])
        step.sum(vector)
        if not trailer.agree(vector[:_DIGEST].tolist(), group.size):
            step.needed, step.owes_messages = 1, False  # all ranks raise an error now
            raise _difference(group, description)
        step.expect(trailer.LENGTH)
        for copy in copies:
            group.broadcast_owned(copy)
        group.check_errors()
        step.owes_messages = False
        # The root of a broadcast waits for nobody: by this sum it knows that all have the values.
        ending = np.array(step.trailer())
        writes: list[Callable[[], object]] = [
            partial(array.__setitem__, ..., copy.reshape(array.shape))
            for array, copy in zip(state.values(), copies, strict=True)
        ]
        self._model = group.next_model()
        for name, layer in self.module.named_modules():
            # The name is alike on all ranks, and tells layers of one size apart. The calls start anew, as a
            # layer that a rank has loaded from a pickle may have been called before.
            if isinstance(layer, BatchNormBase):
                own = layer.name or (name if isinstance(layer, SyncBatchNorm) else "")
                writes.append(restart_of(layer, name=own or None, model=self._model))
        step.sum(ending)
        commit(map(DO, writes))

    def _left(self) -> dict[str, Any]:
        return {}  # all that a forward leaves is the module's

    @property
    def process_group(self) -> ProcessGroup:
        """The ranks."""
        return as_group(self._group)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, in training mode with the buffers of rank 0."""
        if self.training and self.broadcast_buffers and not self._paused:
            self._take_buffers()
        return self.module(*args, **kwargs)

    def _take_buffers(self) -> None:
        """Take the buffers of rank 0, all or none (**collective**)."""
        with Collective(describe=self._describe_broadcast) as step:
            group, buffers = self.process_group, self._own_buffers()
            if group.size == 1 or not buffers:
                return
            step.enter(*self._describe_broadcast(buffers))
            for name, buffer in buffers.items():
                _check_array(name, buffer)
            # Those of long items first, so that all lie where their type wants them.
            ordered = sorted(buffers.values(), key=lambda buffer: -buffer.dtype.itemsize)
            packs = [_Pack(alike) for alike in _by_library(ordered)]
            step.owes_messages = True
            step.sum(np.array(step.trailer()))
            for pack in packs:
                group.broadcast_owned(pack.data)
            step.owes_messages = False
            writes = [write for pack in packs for write in pack.writes()] if group.rank else []
            commit(map(DO, [*writes, partial(vars(self).update, _broadcasts=self._broadcasts + 1)]))

    def _own_buffers(self) -> dict[str, Array]:
        """Return the buffers that may differ between the ranks, each by its name."""
        found: dict[str, Array] = {}
        for prefix, module in self.module.named_modules():
            if not isinstance(module, SyncBatchNorm) or not as_group(module.process_group).has_same_ranks(
                self.process_group
            ):
                found |= {join(prefix, name): buffer for name, buffer in own_buffers(module)}
        return found

    def _describe_broadcast(self, buffers: dict[str, Array] | None = None) -> Description:
        name = "DistributedDataParallel"
        if buffers is not None:
            code = zlib.crc32(repr(self._description(buffers)).encode())
            name += f" with buffers of code {code:08x}"
        call = Call(name, 0, "broadcast", self._broadcasts, self._model)
        return call, self.process_group, trailer.LENGTH, ()

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module's backward. Gradients are this rank's until `reduce_gradients`."""
        return self.module.backward(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Return a context in which `reduce_gradients` does nothing, as torch's.

        Use it for a training step that is called for each part of a batch. Gradients add up on each rank, and
        the call for the last part, outside the context, reduces them. In a loop of your own you can instead
        call `reduce_gradients` after the last part only. SyncBatchNorm layers still send their messages.

        Yields
        ------
        None
            It may be nested. All ranks must be inside at the same calls.

        Raises
        ------
        RankMismatchError, CollectiveTimeoutError
            In a later call, on the ranks that reduce while another rank is inside.
        """
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def reduce_gradients(self) -> None:
        """Replace all gradients by their mean over the ranks.

        It leaves out gradients that a layer's ``grad_reduction`` has already summed or averaged over these
        ranks, and parameters without ``requires_grad``. A gradient that only some ranks have counts as zero
        on the others. A gradient that no rank has stays None.

        Raises
        ------
        TypeError, ValueError
            If a gradient is not a floating-point array of its parameter's shape, on its device.
        RemoteRankError
            If another rank has one of these errors.
        RankMismatchError
            If the ranks have other parameters, or made another number of calls.
        CollectiveTimeoutError
            If a rank does not come within the group's timeout.

        Notes
        -----
        **Collective.** 16-bit gradients are added up in float32. Either all gradients are replaced, after the
        last one has come, or none. Until then there is a copy of them in the type of the sums, and a bucket.
        """
        if self._paused:
            return
        with Collective(describe=self._describe_reduction) as step:
            reduced, group = self._already_reduced(), self.process_group
            every = list(self.module.named_parameters())
            named = [(name, p) for name, p in every if p.requires_grad and id(p) not in reduced]
            caller = "DistributedDataParallel"
            if group.size > 1:
                frozen = [name for name, p in every if not p.requires_grad]
                described = [*self._description({name: p.data for name, p in named}), *frozen]
                caller += f" (parameters {zlib.crc32(repr(described).encode()):08x})"
                if frozen:
                    caller += f", {len(frozen)} of {len(every)} without requires_grad"
            call = Call(caller, 0, "gradients", self._reductions, self._model)
            step.enter(call, group, len(named) + trailer.LENGTH)
            for name, parameter in named:
                check_gradient(name, parameter)
            parameters = [parameter for _, parameter in named]
            means = _Means(parameters if group.size > 1 else [], self.bucket_cap_mb)
            present = np.array([*(p.grad is not None for p in parameters), *step.trailer()], np.float64)
            step.owes_messages = group.size > 1
            step.sum(present)
            means.sum(group, present)
            step.owes_messages = False
            writes = [*means.writes(), partial(vars(self).update, _reductions=self._reductions + 1)]
            commit(map(DO, writes))

    def _describe_reduction(self) -> Description:
        call = Call("DistributedDataParallel", 0, "gradients", self._reductions, self._model)
        return call, self.process_group, trailer.LENGTH, ()

    def _description(self, arrays: dict[str, Array]) -> list[str]:
        """Describe all that the messages between ranks depend on."""
        frozen = {id(p.data) for p in self.module.parameters() if not p.requires_grad}
        described = [
            _describe(name, array.shape, array.dtype, module_of(array), id(array) in frozen)
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


class _Bucket(NamedTuple):
    """Gradients that share a message, each with its part of the sent and of the received memory."""

    parameters: list[Parameter]
    sent: Array
    total: Array
    sent_parts: list[Array]
    parts: list[Array]


class _Means:
    """The means of gradients over the ranks, until the last has come: a copy of them, and a bucket.

    The memory is there before the first message.
    """

    def __init__(self, parameters: list[Parameter], bucket_cap_mb: float) -> None:
        self._parameters, self._capacity = parameters, bucket_cap_mb * 2**20
        self._buckets: list[_Bucket] = []
        self._memory: dict[Any, tuple[Array, Array]] = {}
        sizes: dict[Any, list[int]] = {}
        for parameter in parameters:
            sizes.setdefault(_sum_kind(parameter), []).append(parameter.data.size)
        for (xp, dtype), each in sizes.items():
            bucket = min(sum(each), max(int(self._capacity) // dtype.itemsize, *each))
            self._memory[xp, dtype] = xp.empty(sum(each), dtype), xp.empty(bucket, dtype)

    def sum(self, group: ProcessGroup, present: Array) -> None:
        """Average the gradients that some rank has (**collective**)."""
        self._divide(present)
        for bucket in self._buckets:
            for parameter, part in zip(bucket.parameters, bucket.sent_parts, strict=True):
                part[...] = 0 if parameter.grad is None else parameter.grad.reshape(-1)
            group.allreduce_owned(bucket.sent, bucket.total)
            total = bucket.total
            total /= group.size

    def _divide(self, present: Array) -> None:
        """Divide the parameters into runs of one type that fit into a message."""
        runs: list[list[Parameter]] = []
        room = 0.0
        for parameter in itertools.compress(self._parameters, present):
            kind = _sum_kind(parameter)
            nbytes = parameter.data.size * kind[1].itemsize
            if not runs or nbytes > room or kind != _sum_kind(runs[-1][0]):
                runs.append([])
                room = self._capacity
            runs[-1].append(parameter)
            room -= nbytes
        used = dict.fromkeys(self._memory, 0)
        self._buckets = []
        for run in runs:
            kind = _sum_kind(run[0])
            totals, sent = self._memory[kind]
            ends = list(itertools.accumulate(parameter.data.size for parameter in run))
            total = totals[used[kind] :][: ends[-1]]
            used[kind] += ends[-1]
            places = [slice(end - p.data.size, end) for p, end in zip(run, ends, strict=True)]
            sent_parts, parts = [sent[place] for place in places], [total[place] for place in places]
            self._buckets.append(_Bucket(run, sent[: ends[-1]], total, sent_parts, parts))

    def writes(self) -> list[Callable[[], object]]:
        """Return what assigns the means to the gradients."""
        return [
            _assignment(parameter, part)
            for bucket in self._buckets
            for parameter, part in zip(bucket.parameters, bucket.parts, strict=True)
        ]


class _Pack:
    """Arrays of one library, copied one after the other into bytes, and back."""

    def __init__(self, arrays: list[Array]) -> None:
        self._arrays = arrays
        ends = list(itertools.accumulate(array.nbytes for array in arrays))
        self.data: Array = module_of(arrays[0]).empty(ends[-1], "u1")
        self._parts = [
            self.data[end - array.nbytes : end].view(array.dtype).reshape(array.shape)
            for array, end in zip(arrays, ends, strict=True)
        ]
        for array, part in zip(arrays, self._parts, strict=True):
            part[...] = array

    def writes(self) -> list[Callable[[], object]]:
        """Return what assigns the bytes to the arrays."""
        return [
            partial(array.__setitem__, ..., part)
            for array, part in zip(self._arrays, self._parts, strict=True)
        ]


def _by_library(arrays: list[Array]) -> list[list[Array]]:
    """Divide arrays into those of NumPy and those of CuPy."""
    groups: dict[ModuleType, list[Array]] = {}
    for array in arrays:
        groups.setdefault(module_of(array), []).append(array)
    return [groups[xp] for xp in sorted(groups, key=lambda xp: xp.__name__)]


def _assignment(parameter: Parameter, mean: Array) -> Callable[[], object]:
    """Return what assigns a mean to a gradient, in place where there is one that can be written to."""
    gradient, mean = parameter.grad, mean.reshape(parameter.data.shape)
    if gradient is None or (isinstance(gradient, np.ndarray | np.generic) and not gradient.flags.writeable):
        return partial(setattr, parameter, "grad", mean.astype(parameter.data.dtype))
    return partial(gradient.__setitem__, ..., mean.astype(gradient.dtype, copy=False))


def _describe_construction(process_group: ProcessGroup | MPI.Intracomm | None) -> Description:
    """Return what `Collective` needs to know of a construction."""
    call = Call("DistributedDataParallel", 0, "construction", 0)
    return call, as_group(process_group), _DIGEST + trailer.LENGTH, ()


@functools.lru_cache(maxsize=4096)
def _describe(
    name: str, shape: tuple[int, ...], dtype: np.dtype[Any], library: ModuleType, is_frozen: bool
) -> str:
    frozen = ", requires_grad=False" if is_frozen else ""
    return f"{name}: shape {shape}, type {dtype.str} {dtype.name}, of {library.__name__}{frozen}"


def _check_array(name: str, array: Any) -> None:
    try:
        backend_of(array)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None
    check_writeable(name, array)


def _difference(group: ProcessGroup, description: list[str]) -> RankMismatchError:
    """Return the error that tells what is other on this rank than on rank 0 (**collective**)."""
    encoded = json.dumps(description).encode()
    length = np.array([len(encoded)])
    group.broadcast_owned(length)
    first = np.zeros(length[0], np.uint8)
    if group.rank == 0:
        first[:] = np.frombuffer(encoded, np.uint8)
    group.broadcast_owned(first)
    differs = np.zeros(group.size)
    differs[group.rank] = first.tobytes() != encoded
    group.allreduce(differs)
    others = np.flatnonzero(differs).tolist()
    if not differs[group.rank]:
        verb = "has" if len(others) == 1 else "have"
        return RankMismatchError(
            f"{trailer.describe_ranks(others)} {verb} another module than rank 0: see the error there"
        )
    theirs = json.loads(first.tobytes())
    pairs = itertools.zip_longest(description, theirs, fillvalue="nothing more")
    here, there = next(pair for pair in pairs if pair[0] != pair[1])
    return RankMismatchError(
        f"rank {group.rank} has another module than rank 0: {here} here, {there} there. "
        "All ranks must construct the same model with the same arguments"
    )


def _sum_kind(parameter: Parameter) -> tuple[ModuleType, np.dtype[Any]]:
    """Return the library and the type in which a gradient is added up.

    MPI adds up float32 and float64 of this machine's byte order, not 16-bit floats.
    """
    dtype: np.dtype[Any] = parameter.data.dtype.newbyteorder("=")
    return module_of(parameter.data), np.dtype(np.float32) if dtype.itemsize == 2 else dtype
