"""What a transport offers, and what it needs: CuPy arrays travel between the ranks of a group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

from cupy_syncbn.arrays import import_cupy

if TYPE_CHECKING:
    from mpi4py import MPI

Array: TypeAlias = Any  # of NumPy or CuPy


class HostGroup(Protocol):
    """The ranks, as far as a transport uses them: messages of NumPy arrays and small objects."""

    rank: int
    size: int
    timeout: float
    host: str

    def allreduce(self, buffer: Array) -> Array:
        """See `ProcessGroup`."""

    def allreduce_checked(self, vector: Array) -> Array:
        """See `ProcessGroup`."""

    def broadcast(self, buffer: Array, root: int = 0) -> None:
        """See `ProcessGroup`."""

    def gather_objects(self, value: Any) -> list[Any]:
        """See `MPIProcessGroup`."""

    def broadcast_object(self, value: Any) -> Any:
        """See `MPIProcessGroup`."""

    def messages(
        self, needed: list[Any]
    ) -> AbstractContextManager[tuple[MPI.Comm, Callable[[Any, int], MPI.Status]]]:
        """See `MPIProcessGroup`."""


class Transport(ABC):
    """The way of CuPy arrays between the ranks of a group.

    Sums and broadcasts replace their array. It is ready in the order of the current stream, and so is the
    result.
    """

    name: ClassVar[str]

    @abstractmethod
    def allreduce(self, buffer: Array) -> Array:
        """Replace a buffer by its sum; return it, or a copy of the sum in memory of the host."""

    @abstractmethod
    def allreduce_checked(self, vector: Array) -> Array:
        """Do the same to a vector that ends in a trailer, and return what ends in its sum."""

    @abstractmethod
    def broadcast(self, buffer: Array, root: int) -> None:
        """Replace a buffer by that of a rank."""

    def match_peers(self, vector: Array) -> Array:
        """Turn a NumPy vector into one that meets the CuPy vectors of the other ranks."""
        return import_cupy().asarray(vector)

    def defer(self, trailer: Array, check: Callable[[list[float]], None], call: object) -> None:
        """Show a trailer that is on the GPU to `check`: now, as the sum has ended."""
        check(trailer.tolist())

    def check_errors(self) -> None:  # noqa: B027, most have raised them
        """Wait for all sums, and raise the first error that they tell of."""
