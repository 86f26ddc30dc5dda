"""Groups of ranks that add up vectors, and the transports that carry them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import operator
import os
import pickle
import sys
import threading
import time
import uuid
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np

from cupy_syncbn import host_exchange, transports
from cupy_syncbn.errors import CollectiveTimeoutError, RankMismatchError, RemoteRankError

if TYPE_CHECKING:
    from mpi4py import MPI

    Array = np.ndarray[Any, Any]

DEFAULT_TIMEOUT = 600.0
"""Seconds that a collective waits for the other ranks, unless CUPY_SYNCBN_TIMEOUT says otherwise."""

# Set for each rank by the launchers of Open MPI, MPICH and Intel MPI (also by srun --mpi=pmi2),
# PMIx (srun --mpi=pmix, prterun), MVAPICH2 and 3, and HPE Cray's PALS and ALPS.
_LAUNCHER_VARIABLES = (
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",
    "PMIX_RANK",
    "MV2_COMM_WORLD_RANK",
    "MVP_COMM_WORLD_RANK",
    "PALS_RANKID",
    "ALPS_APP_PE",
)

_SPINS_BEFORE_YIELD = range(50)
"""Tests of a request before the core is offered to others, such as ranks that share it."""


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
        self.timeout = _timeout(timeout)
        self.transport = _transport(transport)
        self._comm = comm
        self._channel: _Channel | None = None
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
                exchange = host_exchange.Exchange(
                    channel.comm, self.rank, self.size, vector.size, channel.place
                )
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
        if library is np or isinstance(self._carrier, transports.HostStaged):
            return vector
        return super().alike(vector, library)

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
        if isinstance(self._carrier, transports.NCCL):
            self._carrier.defer(trailer, check, call)
        else:
            super().defer(trailer, check, call)

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
        carrier = vars(self).get("_carrier")
        if isinstance(carrier, transports.NCCL):
            carrier.raise_errors(wait=True)

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
        own = transports.pack(value)
        everyones = np.empty((self.size, own.size), np.uint8)
        with self._opened() as channel:
            self._complete(channel.comm.Iallgather(own, everyones), own, everyones)
        return [pickle.loads(row) for row in everyones]

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
        data = transports.pack(value)
        self.broadcast(data)
        return pickle.loads(data)

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
            raise RuntimeError(_FREED)
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
    def _carrier(self) -> transports.Transport:
        """What carries CuPy arrays, chosen when the first comes (**collective**)."""
        return transports.transport_for(self, self.transport)

    def _opened(self) -> _Channel:
        """Return the duplicate that messages travel on, kept as an attribute of the communicator."""
        if self._channel is None:
            from mpi4py import MPI

            if self._comm == MPI.COMM_NULL:
                raise RuntimeError(_FREED)
            if _forked:
                raise RuntimeError(_FORKED)
            request = None
            with _opening:  # two threads would make two duplicates
                keyval = _keyval("channel")
                channel = cast("_Channel | None", self._comm.Get_attr(keyval))
                if channel is None:
                    # Not Dup, which would wait for ever for a rank that never comes to its first exchange.
                    comm, request = self._comm.Idup()
                    channel = _Channel(comm)
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
        for _ in _SPINS_BEFORE_YIELD:
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


class _Channel:
    """The one duplicate of a communicator, and what MPI uses for its messages; the context of an exchange."""

    def __init__(self, comm: MPI.Comm) -> None:
        from mpi4py import MPI

        self.comm = comm
        self.status = MPI.Status()
        self.place = np.empty(host_exchange.LONGEST)
        self.exchanges: dict[int, host_exchange.Exchange] = {}
        """By the length of the vector."""
        self.unusable: tuple[type[RuntimeError], str] | None = None
        """The error that tells why no more messages can travel here, if so."""
        self.lock = threading.Lock()
        _channels.add(self)

    def take(self) -> None:
        """Keep other threads out, until the lock is released."""
        if not self.lock.acquire(False):
            raise RuntimeError(
                "two threads of this process exchange on one communicator at a time: the other ranks cannot "
                "tell whose turn it is. Give each thread a group of its own, new_group()"
            )

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.lock.release()

    def give_up(self, error: BaseException, *needed: Array) -> None:
        """Use the channel no more, after an error in the middle of an exchange that needed some arrays."""
        self.unusable = (
            CollectiveTimeoutError,
            "an earlier exchange on this communicator was given up, and its ranks are out of step: "
            + (str(error) or type(error).__name__),
        )
        _left_to_mpi.append((self, needed))

    def free(self) -> None:
        """Free the duplicate with the communicator that it is of, unless MPI may still use it."""
        from mpi4py import MPI

        if not self.unusable and not MPI.Is_finalized():
            self.unusable = RuntimeError, _FREED
            for exchange in self.exchanges.values():
                exchange.free()
            self.comm.Free()


_opening = threading.Lock()
"""Held while a communicator gets its channel."""
_channels: weakref.WeakSet[_Channel] = weakref.WeakSet()
_left_to_mpi: list[tuple[_Channel, tuple[Array, ...]]] = []
"""What exchanges needed that were given up: kept for ever, as MPI may still read and write it."""

_FREED = "the communicator of this group was freed: make another group, and assign it to its layers"
_FORKED = (
    "this process was forked from a rank, and MPI does not go on in it: leave the exchanges to the rank, or "
    "use process_group=SingleProcessGroup() here"
)
_forked: list[bool] = []
"""Not empty in a process that was forked from one with MPI."""


def _after_fork() -> None:
    """Keep a child from using what belongs to its parent."""
    if "mpi4py.MPI" in sys.modules:
        _forked.append(True)
    for channel in _channels:
        channel.unusable = RuntimeError, _FORKED


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


class _Unusable(ProcessGroup):
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
    return _pickled.get(token) or _Unusable(
        "this group of some ranks was pickled in another process, or is gone: "
        "assign layer.process_group, for instance new_group(ranks)"
    )


def _unpickled_world() -> ProcessGroup | None:
    """Return the group of all ranks; None, which means it, where it is not known to be more than one."""
    group = default_group() if "mpi4py.MPI" in sys.modules else _SINGLE
    return None if group.size == 1 else group


_SINGLE = SingleProcessGroup()
_world: list[ProcessGroup] = []


@functools.cache
def _keyval(purpose: str) -> int:
    """Key of an attribute in which a communicator keeps what belongs to it: its channel, its group."""
    from mpi4py import MPI

    def freed(comm: MPI.Comm, keyval: int, value: object) -> None:
        if isinstance(value, _Channel):
            value.free()

    return MPI.Comm.Create_keyval(delete_fn=freed)


def _is_numpy(buffer: object) -> bool:
    """Tell an array of NumPy from one of CuPy."""
    if isinstance(buffer, np.ndarray):
        return True
    if not isinstance(buffer, getattr(sys.modules.get("cupy"), "ndarray", ())):
        raise TypeError(f"expected a NumPy or CuPy array (got {type(buffer).__name__})")
    return False


def _transport(name: str | None) -> str:
    name = (os.environ.get("CUPY_SYNCBN_TRANSPORT") or "auto") if name is None else name
    if name not in transports.TRANSPORTS:
        raise ValueError(
            f"expected a transport of {', '.join(map(repr, transports.TRANSPORTS))} (got {name!r})"
        )
    return name


def _timeout(seconds: float | None) -> float:
    if seconds is None:
        text = os.environ.get("CUPY_SYNCBN_TIMEOUT") or str(DEFAULT_TIMEOUT)
        try:
            seconds = float(text)
        except ValueError:
            raise ValueError(f"expected CUPY_SYNCBN_TIMEOUT to be seconds (got {text!r})") from None
    if isinstance(seconds, str) or not seconds > 0:
        raise ValueError(f"expected a timeout of more than 0 seconds (got {seconds!r})")
    return seconds


@functools.cache
def _launched() -> bool:
    """Tell whether an MPI launcher started this process."""
    return any(name in os.environ for name in _LAUNCHER_VARIABLES) and not _is_worker()


def _is_worker() -> bool:
    """Tell whether multiprocessing started this: it has a rank's variables, but must not start MPI."""
    if "multiprocessing" not in sys.modules:
        return False
    from multiprocessing import parent_process

    # While the program is imported there, only the name of its module tells.
    program = getattr(sys.modules.get("__mp_main__"), "__name__", "")
    return program == "__mp_main__" or parent_process() is not None


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
        if "mpi4py.MPI" not in sys.modules and not _launched():
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
            keyval, known = _keyval("group"), None
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


def _meet(group: MPIProcessGroup, request: str, error: Exception | None) -> None:
    """Compare what all ranks ask for, and wait for them before MPI does, for ever (**collective**).

    Raises
    ------
    Exception
        `error`, which this rank has found in its own arguments.
    RemoteRankError
        If another rank has found one.
    RankMismatchError
        If the ranks ask for different groups.
    """
    digest = hashlib.sha256(request.encode()).hexdigest()
    everyones = group.gather_objects((error is not None, digest, request[:200])) if group.size > 1 else []
    if error is not None:
        raise error
    failed = [rank for rank, (has_failed, _, _) in enumerate(everyones) if has_failed]
    if failed:
        raise RemoteRankError(f"rank {failed[0]} failed before {request}: see the error there")
    for rank, (_, other_digest, other) in enumerate(everyones):
        if other_digest != digest:
            raise RankMismatchError(
                f"rank {group.rank} asks for {request}, but rank {rank} for {other}: "
                "all ranks must ask for the same"
            )


def new_group(
    ranks: Iterable[int] | None = None,
    *,
    comm: MPI.Intracomm | None = None,
    transport: str | None = None,
    timeout: float | None = None,
) -> ProcessGroup:
    """Create a group of some ranks.

    Parameters
    ----------
    ranks : iterable of int, optional
        Ranks of `comm`, in the order that they have in the group; default all.
    comm : mpi4py.MPI.Intracomm, optional
        The communicator that the ranks are counted in; default MPI.COMM_WORLD.
    transport : {"auto", "mpi", "cuda-aware-mpi", "nccl"}, optional
        What carries CuPy arrays, see `MPIProcessGroup`; default CUPY_SYNCBN_TRANSPORT, or "auto".
    timeout : float, optional
        Seconds that an exchange waits for the other ranks; default CUPY_SYNCBN_TIMEOUT, or 600.

    Returns
    -------
    ProcessGroup
        On a process that is not among `ranks`, an object that says so when it is used.

    Raises
    ------
    TypeError, ValueError
        If the ranks are not distinct ranks of `comm`, or the transport is unknown.
    RemoteRankError
        If that is so of the ranks that another process gives.
    RankMismatchError
        If other processes give other ranks.
    CollectiveTimeoutError
        If a rank of `comm` does not come within the timeout.

    Notes
    -----
    **Collective** over `comm`: each of its processes calls it, with the same ranks. Make groups once, not in
    each step: they are never freed, and MPI has only so many communicators (MPICH 2048).
    """
    from mpi4py import MPI

    comm = MPI.COMM_WORLD if comm is None else comm
    parent = MPIProcessGroup(comm, transport="mpi", timeout=timeout)
    members = list(range(comm.size))
    error: Exception | None = None
    try:
        transport = _transport(transport)
        members = members if ranks is None else [operator.index(rank) for rank in ranks]
        if not members or len(set(members)) < len(members) or not set(members) <= set(range(comm.size)):
            raise ValueError(f"expected distinct ranks between 0 and {comm.size - 1} (got {members})")
    except TypeError:
        error = TypeError(f"expected ranks to be integers, or None for all (got {ranks!r})")
    except Exception as wrong:  # also what an iterable raises
        error = wrong
    _meet(parent, f"new_group({members}, transport={transport!r})", error)
    is_member = comm.rank in members
    part = comm.Split(0 if is_member else MPI.UNDEFINED, members.index(comm.rank) if is_member else 0)
    if not is_member:
        return _Unusable(f"this process is not a member of the group of ranks {members}")
    return MPIProcessGroup(part, transport=transport, timeout=timeout)


def split_group(
    group_size: int,
    *,
    comm: MPI.Intracomm | None = None,
    transport: str | None = None,
    timeout: float | None = None,
) -> ProcessGroup:
    """Divide the ranks into groups of `group_size` consecutive ranks and return this process's.

    Parameters
    ----------
    group_size : int
        Ranks a group; it must divide the number of ranks.
    comm : mpi4py.MPI.Intracomm, optional
        The communicator to divide; default MPI.COMM_WORLD.
    transport : {"auto", "mpi", "cuda-aware-mpi", "nccl"}, optional
        What carries CuPy arrays, see `MPIProcessGroup`; default CUPY_SYNCBN_TRANSPORT, or "auto".
    timeout : float, optional
        Seconds that an exchange waits for the other ranks; default CUPY_SYNCBN_TIMEOUT, or 600.

    Returns
    -------
    ProcessGroup
        The group that this process is in.

    Raises
    ------
    TypeError, ValueError
        If `group_size` is no integer that divides the number of ranks, or the transport is unknown.
    RemoteRankError
        If that is so of another process's.
    RankMismatchError
        If other processes give another `group_size`.
    CollectiveTimeoutError
        If a rank of `comm` does not come within the timeout.

    Notes
    -----
    **Collective** over `comm`.
    """
    from mpi4py import MPI

    comm = MPI.COMM_WORLD if comm is None else comm
    parent = MPIProcessGroup(comm, transport="mpi", timeout=timeout)
    error: Exception | None = None
    try:
        transport, group_size = _transport(transport), operator.index(group_size)
        if group_size < 1 or comm.size % group_size:
            raise ValueError(f"expected a group_size that divides {comm.size} ranks (got {group_size})")
    except (TypeError, ValueError) as wrong:
        error = wrong
    _meet(parent, f"split_group({group_size}, transport={transport!r})", error)
    part = comm.Split(comm.rank // group_size, comm.rank)
    return MPIProcessGroup(part, transport=transport, timeout=timeout)
