"""Synchronized batch normalization for PyTorch, on CPUs too: statistics by MPI, gradients by autograd.

A torch program changes in two lines::

    from cupy_syncbn.interop.torch import convert_sync_batchnorm, init_process_group
    init_process_group()  # torch's ranks are those of MPI
    model = torch.nn.parallel.DistributedDataParallel(convert_sync_batchnorm(model))

Tensors are the memory of the arrays that the package computes on: nothing is copied.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch._C import _current_graph_task_id
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from cupy_syncbn import functional
from cupy_syncbn.arrays import Array, as_array, import_cupy, module_of, type_name
from cupy_syncbn.checks import Activation, activation_slope, check_grad_reduction, check_settings
from cupy_syncbn.comm.call import DO, Call, Collective, commit
from cupy_syncbn.comm.errors import RemoteRankError
from cupy_syncbn.comm.groups import SINGLE, MPIProcessGroup, ProcessGroup, as_group
from cupy_syncbn.interop.threads import check_threads
from cupy_syncbn.nn.conversion import losses
from cupy_syncbn.plan import Arguments, Settings

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["SyncBatchNorm", "convert_sync_batchnorm", "init_process_group"]

_Model = TypeVar("_Model", bound=torch.nn.Module)

_distributed: Any = torch.distributed  # whose stores have no types


class SyncBatchNorm(_BatchNorm):
    """Batch normalization by the statistics of all MPI ranks, as torch.nn.SyncBatchNorm, on CPUs and GPUs.

    ``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``. Parameters, buffers and the
    state dict are those of torch's batch normalizations.

    Parameters
    ----------
    num_features : int
        C, the number of channels: the second axis of the input, in any memory format.
    eps : float
        Added to the variance.
    momentum : float or None
        Share of each batch in the running statistics; None averages over all batches.
    affine : bool
        Whether there are weight and bias.
    track_running_stats : bool
        Whether there are running statistics, which evaluation uses.
    process_group : ProcessGroup, mpi4py.MPI.Intracomm or None
        The ranks whose batches are one; None is all. It is no process group of torch's.
    device, dtype : see torch.nn.SyncBatchNorm
        Of parameters and buffers.
    bias : bool
        Whether there is a bias, if `affine`.
    activation : {None, "relu", "leaky_relu"} or ("leaky_relu", slope)
        Applied to the result, in the same pass.
    grad_reduction : {"none", "sum", "mean"}
        Whether the gradients of weight and bias are this rank's, which DistributedDataParallel averages, or
        their sum or mean over the ranks, where nobody else adds them up.
    name : str, optional
        The layer's name in errors, the same on all ranks. `convert_sync_batchnorm` gives one.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.

    Notes
    -----
    Forward and backward are **collective** in training mode: every rank of the group calls the same layers in
    the same order, a rank without samples too, with N = 0. An error on one rank is an error on all of them,
    also within ``loss.backward()``. Evaluation sends no messages, except for a `grad_reduction`.

    A forward that activation checkpointing computes again normalizes by its batch, and leaves the running
    statistics as they are; torch's layers count the batch twice. So is any other forward within a backward.
    There is no second derivative. CUDA tensors are computed on by CuPy, on torch's current stream.

    Examples
    --------
    >>> bn = SyncBatchNorm(3, activation="relu")
    >>> x = torch.randn(4, 3, 5, 5, requires_grad=True)
    >>> bn(x, residual=x).sum().backward()
    >>> x.grad.shape, bn.weight.grad.shape
    (torch.Size([4, 3, 5, 5]), torch.Size([3]))
    """

    # What a layer that was converted, or is of an older pickle, lacks has its value here.
    process_group: ProcessGroup | MPI.Intracomm | None = None
    activation: Activation = None
    grad_reduction: str = "none"
    name: str | None = None
    _calls_made: int = 0

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: ProcessGroup | MPI.Intracomm | None = None,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: Activation = None,
        grad_reduction: str = "none",
        name: str | None = None,
    ) -> None:
        check_settings(eps, momentum)
        activation_slope(activation)
        check_grad_reduction(grad_reduction)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.process_group = _group_of(process_group)
        self.activation = tuple(activation) if isinstance(activation, list) else activation
        self.grad_reduction, self.name = grad_reduction, name

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:  # noqa: A002, torch's name
        """Normalize a batch.

        Parameters
        ----------
        input : Tensor of shape (N, C, ...)
            This rank's part of the batch.
        residual : Tensor like `input`, optional
            Added before the activation.

        Returns
        -------
        Tensor
            Like `input`, in its memory format.

        Raises
        ------
        TypeError, ValueError
            If an argument is wrong; the other ranks raise RemoteRankError.
        RemoteRankError, RankMismatchError, CollectiveTimeoutError
            See `cupy_syncbn.sync_batch_norm`.
        """
        apply: Any = _Normalize.apply
        result: Tensor = apply(self, input, residual, self.weight, self.bias)
        return result

    def extra_repr(self) -> str:
        """Return the settings: torch's first ones, and of the others those that are not as by default."""
        others = {"activation": None, "grad_reduction": "none", "process_group": None}
        shown = {name: getattr(self, name) for name in others}
        own: Any = super()
        return str(own.extra_repr()) + "".join(
            f", {name}={value!r}" for name, value in shown.items() if value != others[name]
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of copies and pickles, which count their calls anew, on all ranks alike."""
        return {name: value for name, value in vars(self).items() if name != "_calls_made"}

    @classmethod
    def convert_sync_batchnorm(
        cls, module: _Model, process_group: ProcessGroup | MPI.Intracomm | None = None
    ) -> Any:
        """Turn all batch normalizations within a module into SyncBatchNorm; see `convert_sync_batchnorm`."""
        return convert_sync_batchnorm(module, process_group)


@functools.lru_cache(maxsize=1024)  # more than a model has layers
def _name_of(name: str, *settings: Any) -> str:
    """Return the name of a layer's calls, in which ranks with other settings differ."""
    eps, momentum, affine, tracking, activation, grad_reduction, is_double = settings
    return (
        f"{name} with eps={eps}, momentum={momentum}, affine={affine}, tracking={tracking}, "
        f"activation={activation}, grad_reduction={grad_reduction}{', in float64' * is_double}"
    )


def _description_of(layer: SyncBatchNorm, x: Any) -> functional.Description:
    """Return what `Collective` needs to know of a forward."""
    peers = as_group(layer.process_group) if layer.training else SINGLE
    is_double = getattr(x, "dtype", None) == torch.float64  # which adds up once more
    name = _name_of(
        layer.name or type(layer).__name__, layer.eps, layer.momentum, layer.affine,
        layer.track_running_stats, layer.activation, layer.grad_reduction, is_double,
    )  # fmt: skip
    call = Call(name, layer.num_features, "forward", layer._calls_made)
    known = layer.running_mean if layer.weight is None else layer.weight
    on_gpu = (as_array(known),) if known is not None and known.is_cuda else ()
    return functional.describe_forward(call, peers, on_gpu)


class _Normalize(torch.autograd.Function):
    """What autograd calls."""

    @staticmethod
    def forward(
        ctx: Any,
        layer: SyncBatchNorm,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        """Normalize, and update the running statistics in place."""
        describe = partial(_description_of, layer, x)
        with _on_device_of(x), Collective(describe=describe) as step:
            step.enter(*describe())
            for name, value in ("input", x), ("residual", residual):
                if value is not None and not isinstance(value, Tensor):
                    raise TypeError(f"expected {name} to be a torch tensor (got {type_name(value)})")
            if x.is_cuda:
                check_threads(step.group, "SERIALIZED", "autograd calls backwards on a GPU from a thread")
            array = _array_of(x)
            settings = Settings(
                layer.training,
                layer.momentum,
                layer.eps,
                activation=layer.activation,
                frozen=layer.training and (not layer.track_running_stats or _is_within_backward()),
                weight_trains=weight is None or weight.requires_grad,
                bias_trains=bias is None or bias.requires_grad,
            )
            running = layer.running_mean, layer.running_var, layer.num_batches_tracked
            arguments = Arguments(*_arrays_of(weight, bias, *running, residual))
            y, saved, writes = functional.forward(array, arguments, settings, layer.process_group, step)
            result = _as_tensor(y)
            call, peers, length, _ = saved.backward
            saved.x = module_of(array).empty(0)  # which tells the library, and keeps no memory
            saved.backward = call, peers, length, (saved.x,)
            ctx.record, ctx.grad_reduction = saved, layer.grad_reduction
            ctx.save_for_backward(x)  # so that hooks see it, such as those of activation checkpointing
            count = partial(vars(layer).update, _calls_made=layer._calls_made + layer.training)
            commit(map(DO, [*writes, count]))
        return result

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of what `forward` was given."""
        record, reduction = ctx.record, ctx.grad_reduction
        describe = partial(functional.describe_backward, record, reduction)
        with _on_device_of(dy), Collective(describe=describe) as step:
            # Before the call is entered, as activation checkpointing calls forwards here.
            (x,) = ctx.saved_tensors
            step.enter(*describe())
            saved = replace(record, x=record.plan.as_tensor(_array_of(x)))
            gradients = functional.backward(_array_of(dy), saved, reduction, step)
            ours = gradients.x, gradients.residual, gradients.weight, gradients.bias
            results = [None if each is None else _as_tensor(each) for each in ours]
        if torch.is_grad_enabled():  # by create_graph=True: a second derivative must not be zero silently
            apply: Any = _Last.apply
            results = [None if each is None else apply(each, x, dy) for each in results]
        return None, *results


class _Last(torch.autograd.Function):
    """The end of what can be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *origins: Tensor) -> Tensor:
        """Return a gradient, which belongs to the graph if one of its origins does."""
        return gradient

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        """Raise the error of a second derivative."""
        raise RuntimeError(
            "cupy_syncbn's SyncBatchNorm has no second derivative: a gradient penalty needs a network with "
            "other normalizations, or without create_graph=True"
        )


def _array_of(tensor: Tensor) -> Array:
    """Return a tensor as an array of NumPy or CuPy that shares its memory."""
    try:
        result: Array = (tensor.detach() if tensor.requires_grad else tensor).numpy()
    except (RuntimeError, TypeError):  # of a GPU, bfloat16, or with a lazy sign
        result = as_array(tensor)
    return result


def _arrays_of(*tensors: Tensor | None) -> list[Array | None]:
    return [None if tensor is None else _array_of(tensor) for tensor in tensors]


def _as_tensor(array: Array) -> Tensor:
    """Return an array of NumPy or CuPy as a tensor, without a copy."""
    if not isinstance(array, np.ndarray):
        return torch.from_dlpack(array)
    if array.dtype.kind != "f":  # ml_dtypes' bfloat16, which torch does not take from NumPy
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _is_within_backward() -> bool:
    """Tell whether a backward calls, as where activation checkpointing computes a forward again."""
    return _current_graph_task_id() != -1


_HERE = contextlib.nullcontext()


def _on_device_of(x: Any) -> contextlib.AbstractContextManager[None]:
    """Return a context in which CuPy computes where a tensor is, on torch's current stream."""
    return _on_gpu_of(x) if getattr(x, "is_cuda", False) else _HERE


@contextlib.contextmanager
def _on_gpu_of(x: Tensor) -> Iterator[None]:
    cupy = import_cupy()
    stream = torch.cuda.current_stream(x.device).cuda_stream
    with cupy.cuda.Device(x.device.index), cupy.cuda.ExternalStream(stream, x.device.index):
        yield


def _group_of(process_group: Any) -> ProcessGroup | None:
    """Return the group of an argument; TypeError if it is torch's, with what to use."""
    try:
        return None if process_group is None else as_group(process_group)
    except TypeError as error:
        if type(process_group).__module__.startswith("torch"):
            raise TypeError(
                "expected the ranks as None (all), a cupy_syncbn.ProcessGroup or an mpi4py communicator (got "
                f"{type_name(process_group)}): use cupy_syncbn.new_group(ranks), which every rank calls"
            ) from error
        raise


def convert_sync_batchnorm(
    module: torch.nn.Module, process_group: ProcessGroup | MPI.Intracomm | None = None
) -> Any:
    """Turn all batch normalizations within a torch module into `SyncBatchNorm` layers.

    Parameters
    ----------
    module : torch.nn.Module
        A layer, or a module that holds layers: torch's BatchNorm1d, 2d, 3d and SyncBatchNorm.
    process_group : ProcessGroup, mpi4py.MPI.Intracomm or None
        The ranks whose batches are one; None is all. Layers of this package keep theirs if it is None.

    Returns
    -------
    torch.nn.Module
        The new layer, if `module` is one; else `module`, changed in place. New layers have the parameters,
        buffers, hooks, settings and mode of the old, and their dotted names in `module` for errors. A layer
        in several places stays one. The logger "cupy_syncbn" names them, at level INFO.

    Raises
    ------
    TypeError
        If `module` is no torch module, a layer has no parameters yet (LazyBatchNorm), or belongs to a
        process group of torch's while `process_group` is None. Nothing has changed.

    Warns
    -----
    UserWarning
        If no layer is found, or if a class derived from torch's has methods that SyncBatchNorm lacks.

    Examples
    --------
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    >>> weight = model[1].weight
    >>> model = convert_sync_batchnorm(model)
    >>> type(model[1]).__module__, model[1].name, model[1].weight is weight
    ('cupy_syncbn.interop.torch', '1', True)
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"expected a torch.nn.Module (got {type_name(module)})")
    group = _group_of(process_group)
    found = {
        name: layer
        for name, layer in module.named_modules(remove_duplicate=False)
        if isinstance(layer, _BatchNorm) and (group is not None or not isinstance(layer, SyncBatchNorm))
    }
    for name, layer in found.items():
        _check_convertible(name, layer, group)
    nn = torch.nn
    ours = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm
    messages = losses(found.values(), SyncBatchNorm, *ours)
    if not any(isinstance(layer, _BatchNorm) for layer in module.modules()):
        messages = [f"convert_sync_batchnorm found no batch normalization of torch in {type_name(module)}"]
    for message in messages:
        warnings.warn(message, UserWarning, stacklevel=2)
    made: dict[int, SyncBatchNorm] = {}
    for name, old in found.items():
        new = made.setdefault(id(old), _converted(old, name, group))
        if not name:
            return new
        parent, _, attribute = name.rpartition(".")
        module.get_submodule(parent).add_module(attribute, new)
    if found:
        logging.getLogger("cupy_syncbn").info("SyncBatchNorm now: %s", ", ".join(found))
    return module


def _check_convertible(name: str, layer: Any, group: ProcessGroup | None) -> None:
    """Raise TypeError for a layer that cannot be converted, or not without losing its ranks."""
    where = f" at {name}" * bool(name)
    if isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params():  # type: ignore[misc]
        raise TypeError(
            f"expected layers with parameters (got {type_name(layer)}{where}): convert after a first batch"
        )
    if group is None and getattr(layer, "process_group", None) is not None:
        raise TypeError(
            f"expected a layer of all ranks (got {type_name(layer)}{where} with a process group of torch's): "
            "give process_group=cupy_syncbn.new_group(ranks), which every rank calls"
        )


def _converted(old: Any, name: str, group: ProcessGroup | None) -> SyncBatchNorm:
    """Return a layer with all that an old one has."""
    kind = type(old) if isinstance(old, SyncBatchNorm) else SyncBatchNorm
    new = kind.__new__(kind)
    # The dicts of parameters, buffers and hooks become the new layer's own; what is in them is shared.
    state = {key: value.copy() if isinstance(value, dict) else value for key, value in vars(old).items()}
    vars(new).update(state, process_group=group, name=getattr(old, "name", None) or name or None)
    return new


def init_process_group(
    process_group: ProcessGroup | MPI.Intracomm | None = None, backend: str = "gloo", **options: Any
) -> None:
    """Start torch.distributed among the ranks of MPI, for DistributedDataParallel.

    Parameters
    ----------
    process_group : ProcessGroup, mpi4py.MPI.Intracomm or None
        The ranks that torch is to have; None is all.
    backend : str
        What carries torch's own messages; torch's wheels have none by MPI.
    **options
        More arguments of torch.distributed.init_process_group, such as timeout.

    Raises
    ------
    RemoteRankError
        If rank 0 has no port for the others.
    CollectiveTimeoutError
        If a rank does not come.
    RuntimeError, ValueError
        As of torch.distributed.init_process_group.

    Notes
    -----
    **Collective** over the group. The ranks meet at a port of rank 0, which MPI tells them. End it by
    torch.distributed.destroy_process_group().

    Examples
    --------
    >>> init_process_group()
    >>> torch.distributed.is_initialized()
    True
    >>> torch.distributed.destroy_process_group()
    """
    group = as_group(process_group)
    store = _store_of(group) if isinstance(group, MPIProcessGroup) else _distributed.HashStore()
    _distributed.init_process_group(backend, store=store, rank=group.rank, world_size=group.size, **options)


def _store_of(group: MPIProcessGroup) -> Any:
    """Return the store in which torch's ranks meet: at a port of rank 0."""
    hosts = set(group.gather_objects(group.host))
    meet = partial(_distributed.TCPStore, world_size=group.size, wait_for_workers=False)
    store, address = None, None
    try:
        if group.rank == 0:
            host = group.host if len(hosts) > 1 else "localhost"
            store = meet(host, 0, is_master=True)
            address = host, store.port
    finally:
        address = group.broadcast_object(address)
    if address is None:
        raise RemoteRankError("rank 0 found no port for torch.distributed: see the error there")
    return store or meet(*address, is_master=False)
