"""One collective call: its name and number, its sum over the ranks, and the faults that the sum tells of."""

from __future__ import annotations

import contextlib
import functools
import zlib
from typing import Any, NamedTuple

import numpy as np

from cupy_syncbn.arrays import Array, module_of
from cupy_syncbn.comm.errors import CollectiveTimeoutError, RankMismatchError, RemoteRankError
from cupy_syncbn.comm.groups import ProcessGroup
from cupy_syncbn.comm.schedules import FAULT

_NAMED_RANKS = 50
"""Groups up to this size tell each faulty rank: the sum of 2**rank is exact in a float64."""


class Call(NamedTuple):
    """A collective step of a layer: all ranks that are in step make the same call."""

    name: str
    channels: int
    """0 if the call is none of a layer's."""
    direction: str
    """"forward" or "backward"."""
    number: int
    """Calls that the layer has made before; a backward has the number of its forward."""

    def __str__(self) -> str:
        count = f" ({self.channels} channels)" if self.channels else ""
        return f"{self.direction} {self.number} of {self.name}{count}"

    def trailer(self, group: ProcessGroup) -> tuple[float, float, float]:
        """Return the end of a faultless rank's vector, ``(fault, tag, tag²)``.

        The sums satisfy ``size Σtag² = (Σtag)²`` exactly if all tags are equal (equality in Cauchy and
        Schwarz's inequality), and in float64 exactly for 12-bit tags of up to 2^14 ranks. Calls of a layer
        in one direction have equal tags only if their numbers differ by a multiple of 4096, as the factor is
        odd; other calls collide with probability 2^-12.
        """
        if group.size == 1:
            return 0.0, 0.0, 0.0
        name, channels, direction, number = self
        tag = _hash(name, channels, direction) + 0x9E5 * number & 0xFFF
        return 0.0, tag, tag * tag

    def allreduce_checked(self, group: ProcessGroup, vector: Array) -> None:
        """Replace `vector` by its sum, and raise the error that its trailer tells of (**collective**)."""
        if group.size == 1:
            return
        try:
            trailer = group.allreduce_checked(vector)[-3:]
        except CollectiveTimeoutError as error:
            self._name_in(error)
            raise
        if not isinstance(trailer, np.ndarray):
            self._raise_fault_later(group, trailer)
            return
        try:
            self._raise_fault(group, trailer.tolist())
        except (RemoteRankError, RankMismatchError) as error:
            _note_hearers(error, group)
            raise

    def tell_others(
        self, group: ProcessGroup, error: Exception, length: int, arrays: tuple[Any, ...]
    ) -> None:
        """Join the sum in which the other ranks wait, with a fault flag: they raise RemoteRankError."""
        library = next((module for module in map(module_of, arrays) if module is not np), np)
        vector = np.zeros(length)
        vector[-3:] = self.trailer(group)
        vector[FAULT] = _fault_code(group)
        try:
            total = group.allreduce_checked(group.match_peers(vector, library))
            _note_hearers(error, group)
            if not isinstance(total, np.ndarray):  # by NCCL, where the others may end the sum by an error
                with contextlib.suppress(RemoteRankError, RankMismatchError):
                    self._raise_fault_later(group, total[-3:])
        except Exception as late:  # a timeout, or no memory on the GPU for the vector
            self._name_in(late)
            error.add_note(f"The other ranks did not hear of it: {str(late) or type(late).__name__}")

    def _raise_fault(self, group: ProcessGroup, trailer: list[float]) -> None:
        """Raise the error that the trailer of a sum tells of, if any."""
        fault, tag, tag_square = trailer
        if fault == 0 and group.size * tag_square == tag * tag:
            return
        if fault > 0:
            raise RemoteRankError(f"{_faulty_ranks(fault, group)} failed before {self}: see the error there")
        raise RankMismatchError(
            f"rank {group.rank} is in {self}, while another rank is in another call: "
            "all ranks must call the same layers in the same order"
        )

    def _raise_fault_later(self, group: ProcessGroup, trailer: Array) -> None:
        group.defer(trailer, functools.partial(self._raise_fault, group), self)

    def _name_in(self, error: Exception) -> None:
        """Name this call in a timeout that names no earlier one."""
        if isinstance(error, CollectiveTimeoutError):
            error.call = error.call or self


class Preparing:
    """The context of all that can fail on one rank alone: it tells the other ranks of an error.

    They wait in a sum of vectors of `length` numbers: of CuPy if any of `arrays` is, else of NumPy.
    """

    __slots__ = ("arrays", "call", "group", "length")

    def __init__(self, call: Call, group: ProcessGroup, length: int, arrays: tuple[Any, ...] = ()) -> None:
        self.call, self.group, self.length, self.arrays = call, group, length, arrays

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Exception) and self.group.size > 1:
            self.call.tell_others(self.group, error, self.length, self.arrays)


def _note_hearers(error: Exception, group: ProcessGroup) -> None:
    """Note in an error that all ranks of a group raise one now."""
    vars(error).setdefault("_heard_by", []).append(group)


def was_heard_by(group: ProcessGroup, error: Exception) -> bool:
    """Tell whether all ranks of a group have heard of an error."""
    return any(group.has_same_ranks(hearers) for hearers in vars(error).get("_heard_by", ()))


@functools.cache
def _hash(name: str, channels: int, direction: str) -> int:
    """Return the first tag of a layer's calls in one direction."""
    return zlib.crc32(repr((name, channels, direction)).encode())


def _fault_code(group: ProcessGroup) -> float:
    return 2.0**group.rank if group.size <= _NAMED_RANKS else 1.0


def _faulty_ranks(code: float, group: ProcessGroup) -> str:
    if group.size > _NAMED_RANKS:
        return f"{code:.0f} of {group.size} ranks"
    ranks = [str(rank) for rank in range(group.size) if int(code) >> rank & 1]
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(ranks)
