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
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import numpy as np

from cupy_syncbn.arrays import Array
from cupy_syncbn.comm.launcher import (
    import_mpi,
    initialized_mpi,
    is_launched,
    start_if_one_of_several,
    warn_if_alone,
)
from cupy_syncbn.comm.private_comm import FREED, PrivateComm, free_comm, known_private_comm, private_comm_of
from cupy_syncbn.comm.small_objects import pack, unpack
from cupy_syncbn.comm.trailer import FAULT
from cupy_syncbn.comm.transports import TRANSPORTS, check_here, transport_for
from cupy_syncbn.comm.transports.base import Transport

if TYPE_CHECKING:
    from mpi4py import MPI

DEFAULT_TIMEOUT = 600.0
"""In seconds, unless CUPY_SYNCBN_TIMEOUT says otherwise."""


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
    problem: tuple[type[Exception], str] | None = None
    """The error of each collective call, of which the other ranks hear, where a variable is wrong here."""
    counter: Any = SimpleNamespace(sums=0)
    """Its `sums` is the number of checked sums that have ended, if the group counts them."""
    asks: ClassVar[bool] = False
    """Whether ranks that have met in different calls can ask each other which."""

    @abstractmethod
    def allreduce(self, buffer: Array) -> Array:
        """Replace a contiguous array by its sum over the ranks (**collective**).

        Parameters
        ----------
        buffer : array
            Of NumPy, or of CuPy: ready in the order of the current stream, as the sum is.

        Returns
        -------
        array
            `buffer`; or, if it went through pinned memory of the host, a copy there, valid until the next
            call.

        Raises
        ------
        CollectiveTimeoutError
        RuntimeError
            If the requested transport is not there.
        """

    def allreduce_checked(self, vector: Array) -> Array:
        """Replace `vector`, which ends in a trailer, by its sum among ranks that may be out of step.

        Returns an array that ends with the sum of the trailers, in memory of the host if the sum went through
        there. The fault flag is NaN on all ranks if the group notices different lengths.
        """
        return self.allreduce(vector)

    def tell_fault(self, trailer: tuple[float, ...], length: int, library: ModuleType) -> Array:
        """Take part, with the trailer of a fault alone, in a sum of vectors of `length` numbers of `library`.

        Returns an array that ends with the sum of the trailers, as `allreduce_checked` does.
        """
        vector = np.zeros(length)
        vector[FAULT:] = trailer
        return self.allreduce_checked(library.asarray(vector))

    def allreduce_owned(self, sent: Array, total: Array) -> None:
        """Write the sum of `sent` to `total`, arrays of the package, which a timeout leaves to MPI."""
        total[...] = self.allreduce(sent)

    def broadcast_owned(self, buffer: Array, root: int = 0) -> None:
        """Replace an array of the package, which a timeout leaves to MPI, by that of rank `root`."""
        self.broadcast(buffer, root)

    def next_model(self) -> int:
        """Return how many models were wrapped for these ranks before this one."""
        return 0

    @property
    def is_given_up(self) -> bool:
        """Whether its ranks are out of step for ever."""
        return False

    def abandon(self, error: BaseException) -> None:  # noqa: B027, most have no messages to leave
        """Leave messages in which the other ranks wait, after an error here, and tell them."""

    def mailbox(self) -> Array | None:
        """Return memory of the host for a trailer, which `defer` looks at later; None if it never does."""
        return None

    def defer(
        self, trailer: Array, check: Callable[[list[float]], None], call: object, mailbox: Array | None = None
    ) -> None:
        """Show the trailer of a sum on the GPU to `check`, which may raise: now, or by NCCL later.

        Work that has been enqueued on the current stream copies it to the mailbox, if there is one.
        """
        check(trailer.tolist())

    def check_errors(self) -> None:  # noqa: B027, most have nothing to do
        """Wait for all sums by NCCL, and raise the first error among them.

        Raises
        ------
        RemoteRankError, RankMismatchError, CollectiveTimeoutError
            See `sync_batch_norm`. The error aborts NCCL's communicator: the group takes no more CuPy arrays.
            Other transports have already raised their errors.

        Notes
        -----
        Call it also after the replay of a CUDA graph with sums, on the stream of the launch. Capture the
        graph in CuPy's mode, the relaxed one, as NCCL is watched meanwhile.
        """

    @abstractmethod
    def broadcast(self, buffer: Array, root: int = 0) -> None:
        """Replace a contiguous array by that of rank `root` (**collective**).

        Parameters
        ----------
        buffer : array
            Of NumPy or CuPy, of one size and type on all ranks.
        root : int
            A rank of the group.

        Raises
        ------
        CollectiveTimeoutError
        ValueError
            If `buffer` is not contiguous.
        """

    def has_same_ranks(self, other: ProcessGroup) -> bool:
        """Tell whether two groups of this process have the same ranks, in any order.

        Parameters
        ----------
        other : ProcessGroup
            The other group.

        Returns
        -------
        bool
        """
        return self is other or self.size == other.size == 1

    def free(self) -> None:  # noqa: B027, most have nothing to free
        """Give back the communicators of a group that is not needed any more (**collective**).

        A group of `new_group` or `split_group` frees its communicator and the duplicate for its messages. A
        group on a communicator of the caller's frees the duplicate, when no other group uses it. The groups
        of the world and of a single process have nothing to free, and stay usable. The end of `with` frees
        a group too.

        Raises
        ------
        RuntimeError
            If another thread uses the group.

        Notes
        -----
        Each later use raises RuntimeError. To free a group again does nothing. After a timeout, memory that
        MPI may still use is not freed.

        Examples
        --------
        >>> import numpy as np
        >>> from cupy_syncbn import new_group
        >>> group = new_group()
        >>> group.free()
        >>> with new_group() as group:
        ...     total = group.allreduce(np.ones(3))
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.free()

    # A copied layer keeps its group.
    def __copy__(self) -> ProcessGroup:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ProcessGroup:
        return self


class SingleProcessGroup(ProcessGroup):
    """The group of a single process: it has nothing to add up, and waits for nobody.

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

    Messages travel on a duplicate of the communicator, made at the first sum, so that they never meet the
    caller's own messages. All groups and layers on one communicator share one duplicate, since MPI has only
    so many. Use it from one thread at a time. It is freed with the communicator.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        The communicator.
    transport : {"auto", "mpi", "cuda-aware-mpi", "nccl"}, optional
        What carries CuPy arrays: MPI through pinned memory of the host, an MPI that takes addresses on the
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
    RuntimeError
        If CuPy, a GPU or NCCL is missing here for the transport.
    """

    asks = True

    def __init__(self, comm: MPI.Comm, *, transport: str | None = None, timeout: float | None = None) -> None:
        from mpi4py import MPI

        if isinstance(comm, MPI.Comm):
            initialized_mpi()
        if not isinstance(comm, MPI.Comm) or (comm != MPI.COMM_NULL and comm.Is_inter()):
            raise TypeError(f"expected an mpi4py.MPI.Intracomm (got {type(comm).__name__})")
        if comm == MPI.COMM_NULL:
            raise ValueError("expected a communicator (got MPI.COMM_NULL): this process is not in it")
        self.rank, self.size = comm.rank, comm.size
        self._is_world = MPI.Comm.Compare(comm, MPI.COMM_WORLD) != MPI.UNEQUAL
        self.host: str = MPI.Get_processor_name()
        self.timeout = timeout_of(timeout)
        self.transport = transport_name(transport)
        check_here(self.transport)
        self._comm = comm
        self._private_comm: PrivateComm | None = None
        self.owns_comm = False
        """Whether the package made the communicator, so that `free` frees it."""
        self._token = uuid.uuid4().hex

    def allreduce(self, buffer: Array) -> Array:
        if not _is_numpy(buffer):
            total: Array = self._transport.allreduce(buffer)
            return total
        received = np.empty(buffer.shape, buffer.dtype)
        self.allreduce_into(buffer.copy(), received)
        buffer[...] = received
        return buffer

    def allreduce_owned(self, sent: Array, total: Array) -> None:
        if _is_numpy(total):
            self.allreduce_into(sent, total)
        else:
            self._transport.allreduce_owned(sent)
            total[...] = sent

    def broadcast_owned(self, buffer: Array, root: int = 0) -> None:
        if _is_numpy(buffer):
            self.broadcast_into(buffer, root)
        else:
            self._transport.broadcast(buffer, root)

    def next_model(self) -> int:
        private = self._opened()
        private.models += 1
        return private.models - 1

    def allreduce_into(self, sent: Array, received: Array) -> None:
        """Write the sum of `sent` to `received`, arrays of the package: a timeout leaves both to MPI."""
        # Not in place: Open MPI adds up so by a tree, with more bytes from each rank than two buffers need.
        with self._taken() as private:
            private.complete(private.comm.Iallreduce(sent, received), sent, received)

    def allreduce_checked(self, vector: Array) -> Array:
        if not isinstance(vector, np.ndarray):
            ending: Array = self._transport.allreduce_checked(vector)
            return ending
        (self._private_comm or self._opened()).sum(vector, self.timeout)
        return vector

    def tell_fault(self, trailer: tuple[float, ...], length: int, library: ModuleType) -> Array:
        if library is not np:
            ending: Array = self._transport.tell_fault(trailer, length)
            return ending
        return (self._private_comm or self._opened()).tell(trailer, self.timeout)

    @property
    def is_given_up(self) -> bool:
        private = self._private_comm or known_private_comm(self._comm)
        return private is not None and private.is_given_up

    def abandon(self, error: BaseException) -> None:
        self._opened().leave(error)

    def mailbox(self) -> Array | None:
        return self._transport.mailbox()

    def defer(
        self, trailer: Array, check: Callable[[list[float]], None], call: object, mailbox: Array | None = None
    ) -> None:
        self._transport.defer(trailer, check, call, mailbox)

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
        copy = buffer.copy()
        self.broadcast_into(copy, root)
        if self.rank != root:
            buffer[...] = copy

    def broadcast_into(self, buffer: Array, root: int) -> None:
        """Replace `buffer`, an array of the package, by that of `root`: a timeout leaves it to MPI."""
        data = buffer.reshape(-1).view("u1")  # bytes, as MPI has no type for 16-bit floats
        with self._taken() as private:
            private.complete(private.comm.Ibcast(data, root), data)

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the objects of all ranks, of at most 1024 bytes as pickles (**collective**).

        That is much on thousands of ranks: it is for reports.
        """
        data = pack(value)
        everyones = np.empty((self.size, data.size), np.uint8)
        with self._taken() as private:
            private.complete(private.comm.Iallgather(data, everyones), data, everyones)
        return [unpack(row) for row in everyones]

    def gather_numbers(self, number: int) -> Array:
        """Return a number of each rank, which takes eight bytes (**collective**)."""
        data, everyones = np.array([number], np.int64), np.empty(self.size, np.int64)
        with self._taken() as private:
            private.complete(private.comm.Iallgather(data, everyones), data, everyones)
        return everyones

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        """Return the object of rank `root`, of at most 1024 bytes as a pickle (**collective**)."""
        data = pack(value)
        self.broadcast_into(data, root)
        return unpack(data)

    @contextlib.contextmanager
    def messages(self, needed: list[Any]) -> Iterator[PrivateComm]:
        """Lend the private communicator for messages between ranks, and for its wait.

        After an error inside, the communicator is used no more, and the memory that MPI needed is kept.
        """
        with self._taken() as private:
            try:
                yield private
            except BaseException as error:
                private.leave(error, *needed)
                raise

    def has_same_ranks(self, other: ProcessGroup) -> bool:
        if not isinstance(other, MPIProcessGroup):
            return super().has_same_ranks(other)
        from mpi4py import MPI

        if MPI.COMM_NULL in (self._comm, other._comm):
            raise RuntimeError(FREED)
        initialized_mpi()
        return MPI.Comm.Compare(self._comm, other._comm) != MPI.UNEQUAL

    def free(self) -> None:
        from mpi4py import MPI

        if self._comm in (MPI.COMM_WORLD, MPI.COMM_NULL):  # all layers share the world's group
            return
        try:
            self.check_errors()  # waits for NCCL's sums
        finally:
            comm = self._comm
            free_comm(comm, self._private_comm, self.owns_comm)
            # Now each use finds no communicator, and says so; so does one of CuPy arrays, by a new transport.
            self._comm, self._private_comm = MPI.COMM_NULL, None
            vars(self).pop("_transport", None)
            if not self.owns_comm and not MPI.Is_finalized() and comm.Get_attr(_keyval()) is self:
                comm.Delete_attr(_keyval())  # so that `as_group` makes another

    def __reduce__(self) -> tuple[Callable[..., ProcessGroup | None], tuple[str, ...]]:
        """Pickle the world as `default_group()` of the process that loads it, other groups as a token."""
        if self._is_world:
            return MPIProcessGroup._unpickled_world, ()
        _pickled[self._token] = self
        return MPIProcessGroup._unpickled, (self._token,)

    # Class methods: these are pickled by the name of the class, which is that of no file.
    @classmethod
    def _unpickled(cls, token: str) -> ProcessGroup:
        """Return the group of a token, in the process that pickled it."""
        return _pickled.get(token) or UnusableGroup(
            "this group of some ranks was pickled in another process, or is gone: "
            "assign layer.process_group, for instance new_group(ranks)"
        )

    @classmethod
    def _unpickled_world(cls) -> ProcessGroup | None:
        """Return the group of all ranks, or None, which means it, where that is one rank by now."""
        group = _world_group() if "mpi4py.MPI" in sys.modules else SINGLE
        return None if group.size == 1 else group

    @functools.cached_property
    def _transport(self) -> Transport:
        """The transport of CuPy arrays, chosen when the first comes (**collective**)."""
        return transport_for(self, self.transport)

    def _opened(self) -> PrivateComm:
        """Return the private communicator, made at its first use (**collective**)."""
        if self._private_comm is None:
            self._private_comm = self.counter = private_comm_of(self._comm, self.timeout, self.host)
        return self._private_comm

    def _taken(self) -> PrivateComm:
        """Return the private communicator as the context of one collective operation."""
        return self._opened().take(self.timeout)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank}, size={self.size})"


class NCCLProcessGroup(MPIProcessGroup):
    """The ranks of `comm`, by default the world, each with a GPU of its own for NCCL; see `MPIProcessGroup`.

    Operations on CuPy arrays are enqueued on the current stream: the host does not wait, and a CUDA graph can
    capture them (`CapturedStep`). So errors of other ranks are raised later: see `check_errors`. NumPy arrays
    go by MPI. It raises RuntimeError if CuPy finds no NCCL on a rank, or two ranks share a GPU.
    **Collective** over `comm`.
    """

    def __init__(self, comm: MPI.Intracomm | None = None, *, timeout: float | None = None) -> None:
        # By "mpi" until here, as a rank without NCCL would fail alone: the next line tells all ranks of it.
        super().__init__(world_comm() if comm is None else comm, transport="mpi", timeout=timeout)
        self.transport = "nccl"
        self._transport  # noqa: B018, raises the error of a missing transport now, not at the first sum


class UnusableGroup(ProcessGroup):
    """The group of a process that is not in it, or has lost it: each use raises an error that says why."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __getattr__(self, name: str) -> Any:
        """Raise RuntimeError for rank, size and timeout, which only a usable group has."""
        if name in ProcessGroup.__annotations__:
            raise RuntimeError(self._reason)
        raise AttributeError(name)

    def allreduce(self, buffer: Array) -> Array:
        raise RuntimeError(self._reason)

    def broadcast(self, buffer: Array, root: int = 0) -> None:
        raise RuntimeError(self._reason)

    def __repr__(self) -> str:
        return f"<no group: {self._reason}>"


# The groups that this process has pickled, by their tokens.
_pickled: weakref.WeakValueDictionary[str, MPIProcessGroup] = weakref.WeakValueDictionary()


def _is_numpy(buffer: object) -> bool:
    """Tell a NumPy array from a CuPy array; raise TypeError for all else."""
    if isinstance(buffer, np.ndarray):
        return True
    if not isinstance(buffer, getattr(sys.modules.get("cupy"), "ndarray", ())):
        raise TypeError(f"expected a NumPy or CuPy array (got {type(buffer).__name__})")
    return False


def transport_name(name: str | None) -> str:
    """Return the name of a transport, by default that in CUPY_SYNCBN_TRANSPORT."""
    asked = os.environ.get("CUPY_SYNCBN_TRANSPORT") if name is None else None
    name = (asked or "auto") if name is None else name
    if name not in TRANSPORTS:
        wanted = "CUPY_SYNCBN_TRANSPORT to be one" if asked else "a transport"
        raise ValueError(f"expected {wanted} of {', '.join(map(repr, TRANSPORTS))} (got {name!r})")
    return name


def timeout_of(seconds: float | None) -> float:
    """Return a timeout, by default that in CUPY_SYNCBN_TIMEOUT."""
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
        All ranks of MPI.COMM_WORLD, if a launcher started this process as one of several or it has imported
        mpi4py.MPI; else this process by itself, and MPI is not initialised. So it is in a process that a rank
        has started.

    Raises
    ------
    RuntimeError
        If MPI could not be started, was not initialized as mpi4py.rc.initialize says, or was finalized; or if
        something is missing here for the transport of CUPY_SYNCBN_TRANSPORT.
    ValueError
        If CUPY_SYNCBN_TRANSPORT or CUPY_SYNCBN_TIMEOUT is wrong.

    Warns
    -----
    RuntimeWarning
        If a launcher started several processes, and each is alone in its MPI world.

    Examples
    --------
    >>> group = default_group()
    >>> 0 <= group.rank < group.size
    True
    """
    group = _world_group()
    if group.problem is not None:
        kind, message = group.problem
        raise kind(message)
    return group


def _world_group() -> ProcessGroup:
    """Return the group of the whole world, with its problem if it has one."""
    if not _world:
        if "mpi4py.MPI" not in sys.modules and not is_launched():
            return SINGLE
        _world.append(as_group(world_comm()))
    return _world[0]


def world_comm() -> MPI.Intracomm:
    """Return MPI.COMM_WORLD; start MPI if that has not been done."""
    comm: MPI.Intracomm = import_mpi(_seconds_to_start()).COMM_WORLD
    warn_if_alone()
    return comm


def start_mpi_of_ranks() -> None:
    """Start MPI where a launcher started several processes: what the import of the package does."""
    start_if_one_of_several(_seconds_to_start())


def _seconds_to_start() -> float:
    try:
        return timeout_of(None)
    except ValueError:  # groups raise it
        return DEFAULT_TIMEOUT


def as_group(process_group: ProcessGroup | MPI.Intracomm | None) -> ProcessGroup:
    """Return the group that an argument `process_group` means; for a communicator always the same one."""
    if process_group is None:
        return _world_group()
    if isinstance(process_group, ProcessGroup):
        return process_group
    if "mpi4py.MPI" in sys.modules:
        from mpi4py import MPI

        if isinstance(process_group, MPI.Comm):
            initialized_mpi()
            # One for all calls, as a transport takes its time to make.
            known = None
            if process_group != MPI.COMM_NULL:
                known = cast("ProcessGroup | None", process_group.Get_attr(_keyval()))
            if known is None:
                if process_group == MPI.COMM_WORLD:
                    warn_if_alone()
                known = _group_by_variables(process_group)
                process_group.Set_attr(_keyval(), known)
            return known
    raise TypeError(
        f"expected process_group to be None, a ProcessGroup or an mpi4py communicator "
        f"(got {type(process_group).__name__})"
    )


def _group_by_variables(comm: MPI.Intracomm) -> ProcessGroup:
    """Return the group of a communicator, as the environment variables want it.

    Where they are wrong on some ranks, the others wait in the first call: so it is there that they fail.
    """
    group = MPIProcessGroup(comm, transport="mpi", timeout=DEFAULT_TIMEOUT)
    try:
        transport, group.timeout = transport_name(None), timeout_of(None)
        if group.size == 1:
            return SINGLE
        check_here(transport)
        group.transport = transport
    except (RuntimeError, ValueError) as error:
        if group.size == 1:
            raise
        by = "CUPY_SYNCBN_TRANSPORT: " if isinstance(error, RuntimeError) else ""
        group.problem = type(error), f"{by}{error}"
        group.transport = "auto"  # as of the others, who hear of it by that
    return group


@functools.cache
def _keyval() -> int:
    """Return the key of the attribute in which a communicator keeps its group."""
    from mpi4py import MPI

    return MPI.Comm.Create_keyval()
