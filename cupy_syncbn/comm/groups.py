"""Groups of ranks that add up vectors."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import time
import uuid
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from cupy_syncbn.arrays import Array
from cupy_syncbn.comm.checked_sum import CheckedSum
from cupy_syncbn.comm.errors import CollectiveTimeoutError
from cupy_syncbn.comm.launcher import is_launched
from cupy_syncbn.comm.private_comm import (
    FORKED,
    FREED,
    SPINS_BEFORE_YIELD,
    PrivateComm,
    forked,
    keyval_for,
    opening,
)
from cupy_syncbn.comm.small_objects import pack, unpack
from cupy_syncbn.comm.transports import TRANSPORTS, transport_for
from cupy_syncbn.comm.transports.base import Transport

if TYPE_CHECKING:
    from mpi4py import MPI

DEFAULT_TIMEOUT = 600.0
"""Seconds that a collective waits for the other ranks, unless CUPY_SYNCBN_TIMEOUT says otherwise."""


class ProcessGroup(ABC):
    """Ranks that exchange vectors.

    Attributes
    ----------
    rank, size : int
        This process's number within the group, and how many there are.
    timeout : float
        Seconds after which a collective call gives up waiting.

    See Also
    --------
    default_group, new_group, split_group : What makes one.
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
            A NumPy array, or a CuPy array: it is ready in the order of the current stream, and so is the sum.

        Returns
        -------
        array
            The sum where the host reads it best: in memory of the host if it came by there, valid until the
            next call, else `buffer`.

        Raises
        ------
        CollectiveTimeoutError
            If a rank does not come within the timeout.
        """

    def exchange(self, vector: Array) -> Array:
        """Replace `vector` by its sum, as `allreduce`, among ranks that may be out of step (**collective**).

        Parameters
        ----------
        vector : array
            In float64, ending in the trailer of `Call.trailer`.

        Returns
        -------
        array
            Something that ends in the sum's trailer; in memory of the host if it is there already. A group
            that notices different lengths sets the fault flag to NaN on all ranks.

        Raises
        ------
        CollectiveTimeoutError
            If a rank does not come within the timeout.
        """
        return self.allreduce(vector)

    def alike(self, vector: Array, library: ModuleType) -> Array:
        """Turn a vector into one that meets those of the other ranks, which are arrays of `library`.

        Parameters
        ----------
        vector : array
            Of NumPy.
        library : module
            numpy or cupy.

        Returns
        -------
        array
            Of `library`, unless the others' come by memory of the host: that takes none of the GPU's.

        Raises
        ------
        MemoryError
            If the GPU has none left.
        """
        result: Array = library.asarray(vector)
        return result

    def defer(self, trailer: Array, check: Callable[[list[float]], None], call: object) -> None:
        """Look at the trailer of an exchange that is not in memory of the host: now, or later.

        Parameters
        ----------
        trailer : array
            Of CuPy.
        check : callable
            Is given the numbers, and raises an error if they tell of one.
        call : object
            What the exchange was, for an error that it did not end in time.

        Raises
        ------
        RemoteRankError, RankMismatchError
            What `check` raises, unless it is called later.
        """
        check(trailer.tolist())

    def check_errors(self) -> None:  # noqa: B027, most have nothing to do
        """Wait for all exchanges, and raise the first error that they tell of.

        Raises
        ------
        RemoteRankError, RankMismatchError, CollectiveTimeoutError
            See `sync_batch_norm`. Transports that do not defer have raised them already.
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
    """One process by itself: nothing to exchange, nothing to wait for.

    Examples
    --------
    >>> group = SingleProcessGroup()
    >>> group.rank, group.size
    (0, 1)
    """

    rank, size, timeout = 0, 1, math.inf

    def allreduce(self, buffer: Array) -> Array:
        """Leave `buffer` as it is, and return it.

        Parameters
        ----------
        buffer : array
            Of any shape and type.

        Returns
        -------
        array
            `buffer`.
        """
        return buffer

    def broadcast(self, buffer: Array, root: int = 0) -> None:
        """Leave `buffer` as it is.

        Parameters
        ----------
        buffer : array
            Of any shape and type.
        root : int
            0, the only rank.
        """

    def __repr__(self) -> str:
        return "SingleProcessGroup()"


class MPIProcessGroup(ProcessGroup):
    """The ranks of an MPI communicator.

    Messages travel on a duplicate of the communicator, made at the first exchange, so that none meets the
    caller's own. All groups and layers on one communicator share one duplicate, as MPI has only so many. It
    is for one thread at a time, and is freed with the communicator.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        The communicator.
    transport : {"auto", "mpi", "cuda-aware-mpi", "nccl"}, optional
        What carries CuPy arrays: MPI through pinned memory of the host, an MPI that takes addresses on the
        GPU, or NCCL. Default CUPY_SYNCBN_TRANSPORT, or "auto": NCCL where it is installed and no two ranks
        share a GPU, else "mpi".
    timeout : float, optional
        Seconds that an exchange waits for the other ranks; default CUPY_SYNCBN_TIMEOUT, or 600.

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
        self._channel: PrivateComm | None = None
        self._deadline: float | None = None

    def allreduce(self, buffer: Array) -> Array:
        """Replace `buffer`, contiguous, by its sum over the ranks (**collective**).

        Parameters
        ----------
        buffer : array
            Of NumPy or CuPy.

        Returns
        -------
        array
            The sum, in pinned memory of the host if it came by there, valid until the next call.

        Raises
        ------
        CollectiveTimeoutError
            If a rank does not come within the timeout.
        RuntimeError
            If the transport that was asked for is not there.
        """
        if not _is_numpy(buffer):
            total: Array = self._carrier.allreduce(buffer)
            return total
        from mpi4py import MPI

        with self._opened() as channel:
            self._complete(channel.comm.Iallreduce(MPI.IN_PLACE, buffer, op=MPI.SUM), buffer)
        return buffer

    def exchange(self, vector: Array) -> Array:
        """Replace `vector` by its sum, as `allreduce`, among ranks that may be out of step (**collective**).

        Parameters
        ----------
        vector : array
            In float64, ending in the trailer of `Call.trailer`.

        Returns
        -------
        array
            What ends in the sum's trailer. Where the lengths differed, the fault flag is NaN on all ranks.

        Raises
        ------
        CollectiveTimeoutError
            If a rank does not come within the timeout.
        """
        if not isinstance(vector, np.ndarray):
            ending: Array = self._carrier.exchange(vector)
            return ending
        channel = self._channel
        if channel is None or channel.unusable:
            channel = self._opened()
        channel.take()  # by hand, as a `with` takes longer
        self._deadline = None
        try:
            exchange = channel.exchanges.get(vector.size)
            if exchange is None:
                exchange = CheckedSum(channel.comm, self.rank, self.size, vector.size, channel.place)
                channel.exchanges[vector.size] = exchange
            exchange.sum(vector, self._wait)
        except BaseException as error:
            channel.give_up(error)
            raise
        finally:
            channel.lock.release()
        return vector

    def alike(self, vector: Array, library: ModuleType) -> Array:
        """Turn a vector into one that meets those of the other ranks; see `ProcessGroup.alike`.

        Parameters
        ----------
        vector : array
            Of NumPy.
        library : module
            numpy or cupy.

        Returns
        -------
        array
            `vector` itself if the others' come by memory of the host.

        Raises
        ------
        MemoryError
            If the GPU has none left.
        """
        return vector if library is np else self._carrier.alike(vector)

    def defer(self, trailer: Array, check: Callable[[list[float]], None], call: object) -> None:
        """Look at the trailer of an exchange: by NCCL, when the GPU has it.

        Parameters
        ----------
        trailer, check, call : see `ProcessGroup.defer`
            The numbers on the GPU, what looks at them, and what the exchange was.

        Raises
        ------
        RemoteRankError, RankMismatchError
            What `check` raises; by NCCL later, see `check_errors`.
        """
        self._carrier.defer(trailer, check, call)

    def check_errors(self) -> None:
        """Wait for all exchanges by NCCL, and raise the first error that they tell of.

        Raises
        ------
        RemoteRankError, RankMismatchError, CollectiveTimeoutError
            See `sync_batch_norm`. The communicator is aborted then: the group takes no more CuPy arrays.

        Notes
        -----
        Call it also when exchanges in a CUDA graph have been replayed, on the stream that it was launched on.
        The graph must be captured in CuPy's mode, the relaxed one, as NCCL is watched meanwhile.
        """
        if "_carrier" in vars(self):
            self._carrier.check_errors()

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
        is_numpy = _is_numpy(buffer)
        if not buffer.flags.c_contiguous:  # its bytes could only be had by a copy
            raise ValueError(f"expected a contiguous buffer (got one of strides {buffer.strides})")
        if not is_numpy:
            self._carrier.broadcast(buffer, root)
            return
        data = buffer.reshape(-1).view("u1")  # bytes, as MPI has no type for 16-bit floats
        with self._opened() as channel:
            self._complete(channel.comm.Ibcast(data, root), data)

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
        own = pack(value)
        everyones = np.empty((self.size, own.size), np.uint8)
        with self._opened() as channel:
            self._complete(channel.comm.Iallgather(own, everyones), own, everyones)
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
        """Give the communicator for messages between ranks, and what waits for one: all within the timeout.

        After an error inside, the communicator is used no more, and what MPI needed is kept.

        Parameters
        ----------
        needed : list of array
            What MPI may write or read.

        Yields
        ------
        comm : mpi4py.MPI.Comm
            The communicator.
        wait : callable
            Given a request and the partner's rank, waits and returns the status.

        Raises
        ------
        CollectiveTimeoutError
            If an earlier exchange was given up; `wait` also if the partner does not come in time.
        """
        with self._opened() as channel:
            self._deadline = None
            try:
                yield channel.comm, self._wait
            except BaseException as error:
                channel.give_up(error, *needed)
                raise

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
        if not isinstance(other, MPIProcessGroup):
            return super().has_same_ranks(other)
        from mpi4py import MPI

        if MPI.COMM_NULL in (self._comm, other._comm):
            raise RuntimeError(FREED)
        return MPI.Comm.Compare(self._comm, other._comm) != MPI.UNEQUAL

    def __reduce__(self) -> tuple[Callable[..., ProcessGroup | None], tuple[str, ...]]:
        """Pickle all ranks of the world as `default_group()` where they are loaded; others by a token."""
        if self._is_world:
            return _unpickled_world, ()
        _pickled[self._token] = self
        return _unpickled, (self._token,)

    @functools.cached_property
    def _token(self) -> str:
        return uuid.uuid4().hex

    @functools.cached_property
    def _carrier(self) -> Transport:
        """What carries CuPy arrays, chosen when the first comes (**collective**)."""
        return transport_for(self, self.transport)

    def _opened(self) -> PrivateComm:
        """Return the duplicate that messages travel on, kept as an attribute of the communicator."""
        if self._channel is None:
            from mpi4py import MPI

            if self._comm == MPI.COMM_NULL:
                raise RuntimeError(FREED)
            if forked:
                raise RuntimeError(FORKED)
            request = None
            with opening:  # two threads would make two duplicates
                keyval = keyval_for("channel")
                channel = cast("PrivateComm | None", self._comm.Get_attr(keyval))
                if channel is None:
                    # Not Dup, which would wait for ever for a rank that never comes to its first exchange.
                    comm, request = self._comm.Idup()
                    channel = PrivateComm(comm)
                    channel.take()  # until it is there
                    self._comm.Set_attr(keyval, channel)
            self._channel = channel
            if request is not None:
                try:
                    self._complete(request)
                    # Messages of other lengths are errors to catch, whatever the caller's communicator does.
                    channel.comm.Set_errhandler(MPI.ERRORS_RETURN)
                finally:
                    channel.lock.release()
        if self._channel.unusable:
            kind, reason = self._channel.unusable
            raise kind(reason)
        return self._channel

    def _complete(self, request: MPI.Request, *needed: Array) -> None:
        """Wait for a collective request, which needs some arrays to live as long as it does."""
        self._deadline = None
        try:
            self._wait(request)
        except BaseException as error:
            assert self._channel is not None
            self._channel.give_up(error, *needed)
            raise

    def _wait(self, request: MPI.Request, partner: int | None = None) -> MPI.Status:
        """Wait for a request to or from a rank, or to all, until the deadline of the whole exchange."""
        assert self._channel is not None
        status, test = self._channel.status, request.Test
        for _ in SPINS_BEFORE_YIELD:
            if test(status):
                return status
        while not test(status):
            os.sched_yield()
            now = time.monotonic()
            if self._deadline is None:
                self._deadline = now + self.timeout
            elif now > self._deadline:
                whom = "the other ranks" if partner is None else f"rank {partner}"
                raise CollectiveTimeoutError(
                    f"rank {self.rank} of {self.size} waited {self.timeout:g} s for {whom}: "
                    "a rank ended, is stuck, or did not make this call"
                )
        return status

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank}, size={self.size})"


class NCCLProcessGroup(MPIProcessGroup):
    """The ranks of an MPI communicator, each with a GPU of its own, whose CuPy arrays NCCL carries.

    Its operations are enqueued on the current stream: the host does not wait, and they can be captured in a
    CUDA graph. Errors of other ranks are therefore raised later: see `check_errors`. NumPy arrays go by MPI.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm, optional
        The communicator; default MPI.COMM_WORLD.
    timeout : float, optional
        Seconds that an exchange waits for the other ranks; default CUPY_SYNCBN_TIMEOUT, or 600.

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
        self._carrier  # noqa: B018, what is missing is said here and now


class Unusable(ProcessGroup):
    """What a process has that is not in a group, or has lost it: each use is an error that says why."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __getattribute__(self, name: str) -> Any:
        if name in ("rank", "size", "timeout", "allreduce", "exchange", "broadcast"):
            raise RuntimeError(self._reason)
        return super().__getattribute__(name)

    def allreduce(self, buffer: Array) -> Array:
        """Raise RuntimeError, as does every other use."""
        raise NotImplementedError

    def broadcast(self, buffer: Array, root: int = 0) -> None:
        """Raise RuntimeError, as does every other use."""

    def __repr__(self) -> str:
        return f"<no group: {self._reason}>"


_pickled: weakref.WeakValueDictionary[str, MPIProcessGroup] = weakref.WeakValueDictionary()
"""The groups that this process has pickled, by their tokens."""


def _unpickled(token: str) -> ProcessGroup:
    """Return the group of a token, in the process that pickled it."""
    return _pickled.get(token) or Unusable(
        "this group of some ranks was pickled in another process, or is gone: "
        "assign layer.process_group, for instance new_group(ranks)"
    )


def _unpickled_world() -> ProcessGroup | None:
    """Return the group of all ranks; None, which means it, where it is not known to be more than one."""
    group = default_group() if "mpi4py.MPI" in sys.modules else _SINGLE
    return None if group.size == 1 else group


_SINGLE = SingleProcessGroup()
_world: list[ProcessGroup] = []


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
            return _SINGLE
        from mpi4py import MPI

        _world.append(as_group(MPI.COMM_WORLD))
    return _world[0]


def as_group(process_group: ProcessGroup | MPI.Intracomm | None) -> ProcessGroup:
    """Return the group that an argument `process_group` means.

    Parameters
    ----------
    process_group : ProcessGroup, mpi4py.MPI.Intracomm or None
        None is the whole world.

    Returns
    -------
    ProcessGroup
        A communicator of one rank is a SingleProcessGroup, another always the same group.

    Raises
    ------
    TypeError
        If it is none of these.
    """
    if process_group is None:
        return default_group()
    if isinstance(process_group, ProcessGroup):
        return process_group
    if "mpi4py.MPI" in sys.modules:
        from mpi4py import MPI

        if isinstance(process_group, MPI.Comm):
            # One for all calls, as a transport takes its time to make.
            keyval, known = keyval_for("group"), None
            if process_group != MPI.COMM_NULL:
                known = cast("ProcessGroup | None", process_group.Get_attr(keyval))
            if known is None:
                group = MPIProcessGroup(process_group)
                known = _SINGLE if group.size == 1 else group
                process_group.Set_attr(keyval, known)
            return known
    raise TypeError(
        f"expected process_group to be None, a ProcessGroup or an mpi4py communicator "
        f"(got {type(process_group).__name__})"
    )
