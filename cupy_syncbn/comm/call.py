"""One exchange between the ranks: the vector they add up, and what it tells about their faults."""

from __future__ import annotations

import contextlib
import functools
import zlib
from types import ModuleType
from typing import NamedTuple

import numpy as np

from cupy_syncbn.arrays import Array
from cupy_syncbn.comm.errors import CollectiveTimeoutError, RankMismatchError, RemoteRankError
from cupy_syncbn.comm.groups import ProcessGroup

_NAMED_RANKS = 50
"""Groups up to this size tell each faulty rank: the sum of 2**rank is exact in a float64."""


class Call(NamedTuple):
    """A collective call of a layer: all ranks that are in step make the same."""

    name: str
    channels: int
    """0 if it is none of a layer's."""
    direction: str
    """"forward" or "backward"."""
    number: int
    """How many exchanges the layer had made before; a backward has the number of its forward."""

    def __str__(self) -> str:
        count = f" ({self.channels} channels)" if self.channels else ""
        return f"{self.direction} {self.number} of {self.name}{count}"

    def trailer(self, group: ProcessGroup) -> tuple[float, float, float]:
        """End of the vector of a rank without fault, ``(fault, tag, tag²)``.

        The sums of tag and tag² satisfy ``size Σtag² = (Σtag)²`` exactly if all tags are equal (equality
        in Cauchy and Schwarz's inequality), and in float64 exactly for 12-bit tags of up to 2^14 ranks.
        Calls of a layer in one direction have the same only if their numbers differ by a multiple of 4096,
        as the factor is odd; others have if 12 bits of a hash happen to be equal.
        """
        if group.size == 1:
            return 0.0, 0.0, 0.0
        name, channels, direction, number = self
        tag = _hash(name, channels, direction) + 0x9E5 * number & 0xFFF
        return 0.0, tag, tag * tag

    def faults_join(self, group: ProcessGroup, length: int, library: ModuleType = np) -> _FaultsJoin:
        """Let a rank that fails inside join the exchange of `length` numbers: the others hear of it.

        They bring arrays of `library`, and so will it.
        """
        return _FaultsJoin(self, group, length, library)

    def exchange(self, group: ProcessGroup, vector: Array) -> None:
        """Replace `vector` by its sum over the ranks (**collective**).

        Raises
        ------
        RemoteRankError
            If another rank found its input wrong.
        RankMismatchError
            If the ranks are in different calls.
        CollectiveTimeoutError
            If a rank does not come within the group's timeout.
        """
        if group.size == 1:
            return
        try:
            trailer = group.exchange(vector)[-3:]
        except CollectiveTimeoutError as error:
            self._name(error)
            raise
        if not isinstance(trailer, np.ndarray):
            self._defer(group, trailer)
            return
        try:
            self._check(group, trailer.tolist())
        except (RemoteRankError, RankMismatchError) as error:
            _known_to(group, error)
            raise

    def _defer(self, group: ProcessGroup, trailer: Array) -> None:
        group.defer(trailer, functools.partial(self._check, group), self)

    def _check(self, group: ProcessGroup, trailer: list[float]) -> None:
        """Raise the error that the trailer of a sum tells of, if it does."""
        fault, tag, tag_square = trailer
        if fault == 0 and group.size * tag_square == tag * tag:
            return
        if fault > 0:
            raise RemoteRankError(f"{_faulty(fault, group)} failed before {self}: see the error there")
        raise RankMismatchError(
            f"rank {group.rank} is in {self}, while another rank is in another call: "
            "all ranks must call the same layers in the same order"
        )

    def _name(self, error: Exception) -> None:
        """Let a timeout tell of this call, unless it is one of an earlier call that shows only now."""
        if isinstance(error, CollectiveTimeoutError):
            error.call = error.call or self


class _FaultsJoin:
    """The context of `Call.faults_join`."""

    __slots__ = ("call", "group", "length", "library")

    def __init__(self, call: Call, group: ProcessGroup, length: int, library: ModuleType) -> None:
        self.call, self.group, self.length, self.library = call, group, length, library

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Exception) and self.group.size > 1:
            vector = np.zeros(self.length)
            vector[-3:] = self.call.trailer(self.group)
            vector[-3] = _fault_code(self.group)
            try:
                sum_ = self.group.exchange(self.group.alike(vector, self.library))
                _known_to(self.group, error)
                if not isinstance(sum_, np.ndarray):  # an exchange of NCCL: the others may end it by an error
                    with contextlib.suppress(RemoteRankError, RankMismatchError):
                        self.call._defer(self.group, sum_[-3:])
            except Exception as late:  # a timeout, or no memory on the GPU for the vector
                self.call._name(late)
                error.add_note(f"The other ranks did not hear of it: {str(late) or type(late).__name__}")


def _known_to(group: ProcessGroup, error: Exception) -> None:
    """Note that all ranks of a group raise an error now."""
    vars(error).setdefault("_known_to", []).append(group)


def is_known_to(group: ProcessGroup, error: Exception) -> bool:
    """Tell whether all ranks of a group have heard of an error."""
    return any(group.has_same_ranks(known) for known in vars(error).get("_known_to", ()))


@functools.cache
def _hash(name: str, channels: int, direction: str) -> int:
    """Return what the tags of a layer's calls in one direction are counted from."""
    return zlib.crc32(repr((name, channels, direction)).encode())


def _fault_code(group: ProcessGroup) -> float:
    return 2.0**group.rank if group.size <= _NAMED_RANKS else 1.0


def _faulty(code: float, group: ProcessGroup) -> str:
    if group.size > _NAMED_RANKS:
        return f"{code:.0f} of {group.size} ranks"
    ranks = [str(rank) for rank in range(group.size) if int(code) >> rank & 1]
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(ranks)
