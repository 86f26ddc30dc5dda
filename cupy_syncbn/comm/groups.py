"""Groups of ranks that add up vectors."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import uuid
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from cupy_syncbn.arrays import Array
from cupy_syncbn.comm.launcher import is_launched
from cupy_syncbn.comm.private_comm import FREED, PrivateComm, private_comm_of
from cupy_syncbn.comm.small_objects import pack, unpack
from cupy_syncbn.comm.transports import TRANSPORTS, transport_for
from cupy_syncbn.comm.transports.base import Transport

if TYPE_CHECKING:
    from mpi4py import MPI

DEFAULT_TIMEOUT = 600.0
"""Seconds that a collective waits for the other ranks, unless CUPY_SYNCBN_TIMEOUT says otherwise."""


class ProcessGroup(ABC):
    """Ranks that add up vectors.

    Attributes
    ----------
    rank, size : int
        This process's number within the group, and the number of processes.
    timeout : float
        Seconds after which a collective call gives up waiting.

    See Also
    --------
    default_group, new_group, split_group : Functions that make groups.
    """

    rank: int
    size: int
    timeout: float

    @abstractmethod
    def allreduce(self, buffer: Array) -> Array:
        """Replace `buffer`, contiguous, by its sum over the ranks (**collective**).

        Parameters
        ----------
        buffer : array
            A NumPy or CuPy array. One of CuPy is ready in the order of the current stream, and so is the sum.

        Returns
        -------
        array
            The sum where the host reads it best: in pinned memory of the host if it came by there, valid
            until the next call, else `buffer`.

        Raises
        ------
        CollectiveTimeoutError
            If a rank does not come within the timeout.
        RuntimeError
            If the transport that was asked for is not there.
        """

    def allreduce_checked(self, vector: Array) -> Array:
        """Replace `vector` by its sum, as `allreduce`, among ranks that may be out of step (**collective**).

        Parameters
        ----------
        vector : array
            In float64, ending in the trailer of `Call.trailer`.

        Returns
        -------
        array
            An array that ends in the sum's trailer; in memory of the host if it is there already. A group
            that notices different lengths sets the fault flag to NaN on all ranks.

        Raises
        ------
        CollectiveTimeoutError
            If a rank does not come within the timeout.
        """
        return self.allreduce(vector)

    def match_peers(self, vector: Array, library: ModuleType) -> Array:
        """Turn a NumPy vector into one that meets those of the other ranks, which are arrays of `library`.

        Parameters
        ----------
        vector : array
            Of NumPy.
        library : module
            numpy or cupy.

        Returns
        -------
        array
            Of `library`; or `vector`, if the others' come by memory of the host: then the GPU needs none.

        Raises
        ------
        MemoryError
            If the GPU has none left.
        """
        result: Array = library.asarray(vector)
        return result

    def defer(self, trailer: Array, check: Callable[[list[float]], None], call: object) -> None:
        """Look at the trailer of a sum that is not in memory of the host: now, or by NCCL when it is ready.

        Parameters
        ----------
        trailer : array
            Of CuPy.
        check : callable
            Is given the numbers, and raises an error if they tell of one.
        call : object
            The call that the sum belongs to, for an error that it did not end in time.

        Raises
        ------
        RemoteRankError, RankMismatchError
            The error of `check`, unless that is called later: see `check_errors`.
        """
        check(trailer.tolist())

    def check_errors(self) -> None:  # noqa: B027, most have nothing to do
        """Wait for all sums by NCCL, and raise the first error that they tell of.

        Raises
        ------
        RemoteRankError, RankMismatchError, CollectiveTimeoutError
            See `sync_batch_norm`. NCCL's communicator is aborted then: the group takes no more CuPy arrays.
            Other transports have raised their errors already.

        Notes
        -----
        Call it also when sums in a CUDA graph have been replayed, on the stream that it was launched on. The
        graph must be captured in CuPy's mode, the relaxed one, as NCCL is watched meanwhile.
        """

    @abstractmethod
    def broadcast(self, buffer: Array, root: int = 0) -> None:
        """Replace `buffer`, contiguous, by that of rank `root` (**collective**).

        Parameters
        ----------
        buffer : array
            Of NumPy or CuPy, of one size and type on all ranks.
        root : int
            The rank.

        Raises
        ------
        CollectiveTimeoutError
            If a rank does not come within the timeout.
        ValueError
            If `buffer` is not contiguous.
        """

    def has_same_ranks(self, other: ProcessGroup) -> bool:
        """Tell whether two groups, both with this process in them, are of the same ranks.

        Parameters
        ----------
        other : ProcessGroup
            The other group.

        Returns
        -------
        bool
            Whatever the order of the ranks.
        """
        return self is other or self.size == other.size == 1

    # A layer may be copied; its group is where it is, and stays the same.
    def __copy__(self) -> ProcessGroup:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ProcessGroup:
        return self


class SingleProcessGroup(ProcessGroup):
    """One process by itself: nothing to add up, nothing to wait for.

    Examples
    --------
    >>> group = SingleProcessGroup()
    >>> group.rank, group.size
    (0, 1)
    """

    rank, size, timeout = 0, 1, math.inf

    def allreduce(self, buffer: Array) -> Array:
        return buffer

    def broadcast(self, buffer: Array, root: int = 0) -> None:
        pass

    def __repr__(self) -> str:
        return "SingleProcessGroup()"


SINGLE = SingleProcessGroup()


class MPIProcessGroup(ProcessGroup):
    """The ranks of an MPI communicator.

    Messages travel on a duplicate of the communicator, made at the first sum, so that none meets the
    caller's own. All groups and layers on one communicator share one duplicate, as MPI has only so many. It
    is for one thread at a time, and is freed with the communicator.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        The communicator.
    transport : {"auto", "mpi", "cuda-aware-mpi", "nccl"}, optional
        The way of CuPy arrays: MPI through pinned memory of the host, an MPI that takes addresses on the
        GPU, or NCCL. Default CUPY_SYNCBN_TRANSPORT, or "auto": NCCL where it is installed and no two ranks
        share a GPU, else "mpi".
    timeout : float, optional
        Seconds that a collective call waits for the other ranks; default CUPY_SYNCBN_TIMEOUT, or 600.

    Raises
    ------
    TypeError
        If `comm` is not an intracommunicator.
    ValueError
        If `comm` is MPI.COMM_NULL, the transport is unknown, or the timeout is not positive.
    """

    def __init__(self, comm: MPI.Comm, *, transport: str | None = None, timeout: float | None = None) -> None:
        from mpi4py import MPI

        if not isinstance(comm, MPI.Comm) or (comm != MPI.COMM_NULL and comm.Is_inter()):
            raise TypeError(f"expected an mpi4py.MPI.Intracomm (got {type(comm).__name__})")
        if comm == MPI.COMM_NULL:
            raise ValueError("expected a communicator (got MPI.COMM_NULL): this process is not in it")
        self.rank, self.size = comm.rank, comm.size
        self._is_world = MPI.Comm.Compare(comm, MPI.COMM_WORLD) != MPI.UNEQUAL
        self.host: str = MPI.Get_processor_name()
        self.timeout = timeout_of(timeout)
        self.transport = transport_name(transport)
        self._comm = comm
        self._private_comm: PrivateComm | None = None

    def allreduce(self, buffer: Array) -> Array:
        if not _is_numpy(buffer):
            total: Array = self._transport.allreduce(buffer)
            return total
        from mpi4py import MPI

        with self._taken() as private:
            private.complete(private.comm.Iallreduce(MPI.IN_PLACE, buffer, op=MPI.SUM), buffer)
        return buffer

    def allreduce_checked(self, vector: Array) -> Array:
        if not isinstance(vector, np.ndarray):
            ending: Array = self._transport.allreduce_checked(vector)
            return ending
        (self._private_comm or self._opened()).sum(vector, self.timeout)
        return vector

    def match_peers(self, vector: Array, library: ModuleType) -> Array:
        matching: Array = vector if library is np else self._transport.match_peers(vector)
        return matching

    def defer(self, trailer: Array, check: Callable[[list[float]], None], call: object) -> None:
        self._transport.defer(trailer, check, call)

    def check_errors(self) -> None:
        if "_transport" in vars(self):
            self._transport.check_errors()

    def broadcast(self, buffer: Array, root: int = 0) -> None:
        is_numpy = _is_numpy(buffer)
        if not buffer.flags.c_contiguous:  # its bytes could only be had by a copy
            raise ValueError(f"expected a contiguous buffer (got one of strides {buffer.strides})")
        if not is_numpy:
            self._transport.broadcast(buffer, root)
            return
        data = buffer.reshape(-1).view("u1")  # bytes, as MPI has no type for 16-bit floats
        with self._taken() as private:
            private.complete(private.comm.Ibcast(data, root), data)

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the small objects of all ranks (**collective**).

        Parameters
        ----------
        value : object
            This rank's, of at most 1024 bytes as a pickle.

        Returns
        -------
        list of object
            In the order of the ranks.

        Raises
        ------
        CollectiveTimeoutError
            If a rank does not come within the timeout.
        """
        data = pack(value)
        everyones = np.empty((self.size, data.size), np.uint8)
        with self._taken() as private:
            private.complete(private.comm.Iallgather(data, everyones), data, everyones)
        return [unpack(row) for row in everyones]

    def broadcast_object(self, value: Any) -> Any:
        """Return rank 0's small object (**collective**).

        Parameters
        ----------
        value : object
            Of at most 1024 bytes as a pickle; of rank 0 only.

        Returns
        -------
        object
            That of rank 0.

        Raises
        ------
        CollectiveTimeoutError
            If a rank does not come within the timeout.
        """
        data = pack(value)
        self.broadcast(data)
        return unpack(data)

    @contextlib.contextmanager
    def messages(self, needed: list[Any]) -> Iterator[tuple[MPI.Comm, Callable[[Any, int], MPI.Status]]]:
        """Lend the communicator for messages between ranks, with a wait that ends by the timeout.

        After an error inside, the communicator is used no more, and the memory that MPI needed is kept.

        Parameters
        ----------
        needed : list of array
            The memory that MPI may write or read.

        Yields
        ------
        comm : mpi4py.MPI.Comm
            The communicator.
        wait : callable
            Given a request and the partner's rank, waits and returns the status.

        Raises
        ------
        CollectiveTimeoutError
            If an earlier call was given up; `wait` also if the partner does not come in time.
        """
        with self._taken() as private:
            try:
                yield private.comm, private.wait
            except BaseException as error:
                private.give_up(error, *needed)
                raise

    def has_same_ranks(self, other: ProcessGroup) -> bool:
        if not isinstance(other, MPIProcessGroup):
            return super().has_same_ranks(other)
        from mpi4py import MPI

        if MPI.COMM_NULL in (self._comm, other._comm):
            raise RuntimeError(FREED)
        return MPI.Comm.Compare(self._comm, other._comm) != MPI.UNEQUAL

    def __reduce__(self) -> tuple[Callable[..., ProcessGroup | None], tuple[str, ...]]:
        """Pickle all ranks of the world as `default_group()` where they are loaded; others by a token."""
        if self._is_world:
            return MPIProcessGroup._unpickled_world, ()
        _pickled[self._token] = self
        return MPIProcessGroup._unpickled, (self._token,)

    # Class methods, as these are pickled by the name of the class, which is that of no file.
    @classmethod
    def _unpickled(cls, token: str) -> ProcessGroup:
        """Return the group of a token, in the process that pickled it."""
        return _pickled.get(token) or UnusableGroup(
            "this group of some ranks was pickled in another process, or is gone: "
            "assign layer.process_group, for instance new_group(ranks)"
        )

    @classmethod
    def _unpickled_world(cls) -> ProcessGroup | None:
        """Return the group of all ranks; None, which means it, where it is not known to be more than one."""
        group = default_group() if "mpi4py.MPI" in sys.modules else SINGLE
        return None if group.size == 1 else group

    @functools.cached_property
    def _token(self) -> str:
        return uuid.uuid4().hex

    @functools.cached_property
    def _transport(self) -> Transport:
        """The way of CuPy arrays, chosen when the first comes (**collective**)."""
        return transport_for(self, self.transport)

    def _opened(self) -> PrivateComm:
        """Return the private communicator, made at the first use (**collective**)."""
        if self._private_comm is None:
            self._private_comm = private_comm_of(self._comm, self.timeout)
        return self._private_comm

    def _taken(self) -> PrivateComm:
        """Return the private communicator as the context of one collective operation."""
        return self._opened().take(self.timeout)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank}, size={self.size})"


class NCCLProcessGroup(MPIProcessGroup):
    """The ranks of an MPI communicator, each with a GPU of its own, between which NCCL moves CuPy arrays.

    Its operations are enqueued on the current stream: the host does not wait, and they can be captured in a
    CUDA graph. Errors of other ranks are therefore raised later: see `check_errors`. NumPy arrays go by MPI.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm, optional
        The communicator; default MPI.COMM_WORLD.
    timeout : float, optional
        Seconds that a collective call waits for the other ranks; default CUPY_SYNCBN_TIMEOUT, or 600.

    Raises
    ------
    RuntimeError
        If CuPy finds no NCCL on a rank, or two ranks share a GPU.

    Notes
    -----
    **Collective** over `comm`.
    """

    def __init__(self, comm: MPI.Intracomm | None = None, *, timeout: float | None = None) -> None:
        from mpi4py import MPI

        super().__init__(MPI.COMM_WORLD if comm is None else comm, transport="nccl", timeout=timeout)
        self._transport  # noqa: B018, an error tells here and now what is missing


class UnusableGroup(ProcessGroup):
    """The group of a process that is not in it, or has lost it: each use is an error that says why."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __getattr__(self, name: str) -> Any:
        """Raise RuntimeError for the attributes that a group has and this one lacks: rank, size, timeout."""
        if name in ProcessGroup.__annotations__:
            raise RuntimeError(self._reason)
        raise AttributeError(name)

    def allreduce(self, buffer: Array) -> Array:
        raise RuntimeError(self._reason)

    def broadcast(self, buffer: Array, root: int = 0) -> None:
        raise RuntimeError(self._reason)

    def __repr__(self) -> str:
        return f"<no group: {self._reason}>"


_pickled: weakref.WeakValueDictionary[str, MPIProcessGroup] = weakref.WeakValueDictionary()
"""The groups that this process has pickled, by their tokens."""


def _is_numpy(buffer: object) -> bool:
    """Tell an array of NumPy from one of CuPy."""
    if isinstance(buffer, np.ndarray):
        return True
    if not isinstance(buffer, getattr(sys.modules.get("cupy"), "ndarray", ())):
        raise TypeError(f"expected a NumPy or CuPy array (got {type(buffer).__name__})")
    return False


def transport_name(name: str | None) -> str:
    """Return the name of a transport, by default the one that CUPY_SYNCBN_TRANSPORT says."""
    name = (os.environ.get("CUPY_SYNCBN_TRANSPORT") or "auto") if name is None else name
    if name not in TRANSPORTS:
        raise ValueError(f"expected a transport of {', '.join(map(repr, TRANSPORTS))} (got {name!r})")
    return name


def timeout_of(seconds: float | None) -> float:
    """Return a timeout, by default the one that CUPY_SYNCBN_TIMEOUT says."""
    if seconds is None:
        text = os.environ.get("CUPY_SYNCBN_TIMEOUT") or str(DEFAULT_TIMEOUT)
        try:
            seconds = float(text)
        except ValueError:
            raise ValueError(f"expected CUPY_SYNCBN_TIMEOUT to be seconds (got {text!r})") from None
    if isinstance(seconds, str) or not seconds > 0:
        raise ValueError(f"expected a timeout of more than 0 seconds (got {seconds!r})")
    return seconds


_world: list[ProcessGroup] = []


def default_group() -> ProcessGroup:
    """Return the group of the whole world.

    Returns
    -------
    ProcessGroup
        All ranks of MPI.COMM_WORLD, when an MPI launcher started this process or it has imported
        mpi4py.MPI already; else this process by itself, and MPI is not initialised.

    Examples
    --------
    >>> group = default_group()
    >>> 0 <= group.rank < group.size
    True
    """
    if not _world:
        if "mpi4py.MPI" not in sys.modules and not is_launched():
            return SINGLE
        from mpi4py import MPI

        _world.append(as_group(MPI.COMM_WORLD))
    return _world[0]


def as_group(process_group: ProcessGroup | MPI.Intracomm | None) -> ProcessGroup:
    """Return the group that an argument `process_group` means.

    A communicator of one rank is a SingleProcessGroup, another always the same group.

    Raises
    ------
    TypeError
        If it is neither None, which is the whole world, nor a group, nor a communicator.
    """
    if process_group is None:
        return default_group()
    if isinstance(process_group, ProcessGroup):
        return process_group
    if "mpi4py.MPI" in sys.modules:
        from mpi4py import MPI

        if isinstance(process_group, MPI.Comm):
            # One for all calls, as a transport takes its time to make.
            known = None
            if process_group != MPI.COMM_NULL:
                known = cast("ProcessGroup | None", process_group.Get_attr(_keyval()))
            if known is None:
                group = MPIProcessGroup(process_group)
                known = SINGLE if group.size == 1 else group
                process_group.Set_attr(_keyval(), known)
            return known
    raise TypeError(
        f"expected process_group to be None, a ProcessGroup or an mpi4py communicator "
        f"(got {type(process_group).__name__})"
    )


@functools.cache
def _keyval() -> int:
    """Key of the attribute in which a communicator keeps its group."""
    from mpi4py import MPI

    return MPI.Comm.Create_keyval()
