"""Data-parallel training: equal parameters at the start, averaged gradients at each step."""

from __future__ import annotations

import itertools
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from cupy_syncbn.backends import Array, module_of
from cupy_syncbn.exchange import Call
from cupy_syncbn.layers import Module, Parameter, SyncBatchNorm, _BatchNorm
from cupy_syncbn.process_group import ProcessGroup, as_group

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
        If `module` is not a Module.
    ValueError
        If `bucket_cap_mb` is not positive.
    RankMismatchError
        If parameters or buffers differ between ranks in name, shape or type.
    CollectiveTimeoutError
        If a rank does not come within the group's timeout.

    Notes
    -----
    Construction and `reduce_gradients` are **collective**; forward and backward are the module's.
    SyncBatchNorm layers without a name take their dotted one in the module, for errors to tell.

    Examples
    --------
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
        state = module.state_dict()
        call = self._call("construction", state)
        call.exchange(group, np.array(call.trailer(group)))
        for array in state.values():
            values = module_of(array).ascontiguousarray(array)
            group.broadcast(values)
            array[...] = values.reshape(array.shape)
        for name, layer in module.named_modules():
            if isinstance(layer, SyncBatchNorm):
                layer.name = layer.name or name or None  # alike on all ranks: tells those of one size apart
                layer._begin()  # one that a rank has loaded from a pickle may have been called before

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
        ValueError
            If a gradient has not the shape of its parameter.
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
        call = self._call("gradients", {name: parameter.data for name, parameter in named})
        self._reductions += 1
        with call.faults_join(group, len(named) + 3):
            for name, parameter in named:
                if parameter.grad is not None and parameter.grad.shape != parameter.data.shape:
                    raise ValueError(
                        f"expected the gradient of {name} to have its shape {parameter.data.shape} "
                        f"(got {parameter.grad.shape})"
                    )
            present = np.array([parameter.grad is not None for _, parameter in named] + [0] * 3, np.float64)
            present[-3:] = call.trailer(group)
        call.exchange(group, present)
        if group.size > 1:
            parameters = [p for (_, p), ranks in zip(named, present[:-3], strict=True) if ranks]
            for bucket in self._buckets(parameters):
                self._average(bucket)

    def _call(self, direction: str, arrays: dict[str, Array]) -> Call:
        description = [(name, array.shape, array.dtype.name) for name, array in arrays.items()]
        code = zlib.crc32(repr(description).encode())
        name = f"DistributedDataParallel with arrays of code {code:08x}"
        return Call(name, len(arrays), direction, self._reductions)

    def _already_reduced(self) -> set[int]:
        layers = [
            layer
            for _, layer in self.module.named_modules()
            if isinstance(layer, _BatchNorm)
            and layer.grad_reduction != "none"
            and as_group(layer.process_group).has_same_ranks(self.process_group)
        ]
        return {id(parameter) for layer in layers for parameter in (layer.weight, layer.bias)}

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
            if parameter.grad is None:
                parameter.grad = xp.empty_like(parameter.data)
            parameter.grad[...] = part.reshape(parameter.data.shape)


def _fit_together(a: Parameter, b: Parameter) -> bool:
    """Tell whether the gradients of two parameters can share a message."""
    return _sum_type(a) == _sum_type(b) and module_of(a.data) is module_of(b.data)


def _sum_type(parameter: Parameter) -> np.dtype[Any]:
    """MPI adds up float32 and float64, not 16-bit floats."""
    dtype: np.dtype[Any] = parameter.data.dtype
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype
