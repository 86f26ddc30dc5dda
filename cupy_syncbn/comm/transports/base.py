"""The base class of transports, and the group that they need: CuPy arrays travel between its ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

import numpy as np

from cupy_syncbn.arrays import import_cupy
from cupy_syncbn.comm.trailer import FAULT

if TYPE_CHECKING:
    from cupy_syncbn.comm.private_comm import PrivateComm

Array: TypeAlias = Any  # of NumPy or CuPy


class HostGroup(Protocol):
    """The part of `MPIProcessGroup` that transports use, for messages of NumPy arrays and small objects."""

    rank: int
    size: int
    timeout: float
    host: str

    def allreduce_into(self, sent: Array, received: Array) -> None: ...
    def allreduce_checked(self, vector: Array) -> Array: ...
    def tell_fault(self, trailer: tuple[float, ...], length: int, library: ModuleType) -> Array: ...
    def broadcast_into(self, buffer: Array, root: int) -> None: ...
    def gather_numbers(self, number: int) -> Array: ...
    def broadcast_object(self, value: Any, root: int = 0) -> Any: ...
    def messages(self, needed: list[Any]) -> AbstractContextManager[PrivateComm]: ...


class Transport(ABC):
    """The way of CuPy arrays between the ranks of a group; see `ProcessGroup` for the methods.

    An array is ready in the order of the current stream, and so is the result that replaces it.
    """

    name: ClassVar[str]

    def allreduce(self, buffer: Array) -> Array:
        own = buffer.copy()  # what is given up may still be written to
        self.allreduce_owned(own)
        buffer[...] = own
        return buffer

    @abstractmethod
    def allreduce_owned(self, buffer: Array) -> Array: ...

    def allreduce_checked(self, vector: Array) -> Array:
        return self.allreduce_owned(vector)

    @abstractmethod
    def broadcast(self, buffer: Array, root: int) -> None: ...

    def tell_fault(self, trailer: tuple[float, ...], length: int) -> Array:
        vector = np.zeros(length)
        vector[FAULT:] = trailer
        return self.allreduce_checked(import_cupy().asarray(vector))

    def mailbox(self) -> Array | None:
        return None

    def defer(
        self, trailer: Array, check: Callable[[list[float]], None], call: object, mailbox: Array | None = None
    ) -> None:
        check(trailer.tolist())

    def check_errors(self) -> None:  # noqa: B027, most have raised them
        pass


def missing_for_cupy() -> tuple[str, str]:
    """Tell why this process cannot use CuPy, or nothing, and which GPU it has."""
    try:
        runtime = import_cupy().cuda.runtime
    except ImportError as error:
        return str(error), ""
    try:
        return "", runtime.deviceGetPCIBusId(runtime.getDevice())
    except RuntimeError as error:
        return f"CuPy finds no GPU: {error}", ""
