"""Counts instructions in the kernels' machine code, which nvdisasm shows: in the main loop, and before it.

What a block does in a kernel is the entry, as many rounds of the main loop as it has vectors, and the rest.
Counted are the shortest paths: in the loop, the shortest that does all loads, stores and multiply-adds of a
full round.
"""

from __future__ import annotations

import heapq
import re
import subprocess
import tempfile
from collections.abc import Iterator
from importlib import metadata
from typing import NamedTuple

PACKAGE = "nvidia-cuda-nvdisasm"


class Instruction(NamedTuple):
    """One line of the disassembly."""

    predicate: str
    operation: str
    operands: str


class Block(NamedTuple):
    """Instructions that run one after the other, and the blocks that may follow."""

    instructions: list[Instruction]
    followers: list[int]

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, each.operation)) for each in self.instructions)


class Round(NamedTuple):
    """What a full round of a kernel's main loop does."""

    vectors: int
    """Per tensor."""
    loads: int
    stores: int
    multiply_adds: int


class Counts(NamedTuple):
    """Instructions of a warp."""

    loop: float
    """A vector of 16 bytes."""
    entry: int
    """Before the main loop."""


def disassemble(cubin: bytes) -> dict[str, list[Block]]:
    """Return the functions of a compiled file by their mangled names."""
    program = metadata.distribution(PACKAGE).locate_file("nvidia/cu13/bin/nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), "-c", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    parts = re.split(r"^\.text\.(\S+):$", text, flags=re.MULTILINE)[1:]
    return {name: _blocks(body) for name, body in zip(parts[::2], parts[1::2], strict=True)}


def _blocks(text: str) -> list[Block]:
    """Divide a function at its labels and branches."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@(!?U?P\w+) )?\s*([A-Z][\w.]*)\s*(.*?) ?;", line):
            instructions.append(Instruction(found[1] or "", found[2], found[3]))
        elif re.match(r"\$\w+:", line):
            break  # a function that this one calls
    ends = {i + 1 for i, each in enumerate(instructions) if re.match(r"BRA|EXIT|CALL|RET", each.operation)}
    starts = sorted(start for start in {0, *labels.values(), *ends} if start < len(instructions))
    number = {start: i for i, start in enumerate(starts)}
    blocks = []
    for i, start in enumerate(starts):
        end = starts[i + 1] if i + 1 < len(starts) else len(instructions)
        last = instructions[end - 1]
        followers = []
        if re.match(r"BRA|CALL", last.operation):
            target = re.search(r"\.L_x_\d+", last.operands)
            followers += [number[labels[target[0]]]] if target and labels[target[0]] in number else []
        # A branch may also depend on predicates among its operands. A call without one is of a slow path, and
        # ends here; with one, it is how sm_80 leaves a loop.
        is_conditional = bool(last.predicate) or re.match(r"!?U?P\d", last.operands) is not None
        goes_on = is_conditional or not re.match(r"BRA|EXIT|RET|CALL", last.operation)
        if goes_on and i + 1 < len(starts):
            followers.append(i + 1)
        blocks.append(Block(instructions[start:end], followers))
    return blocks


_LOAD, _STORE, _MULTIPLY_ADD = r"LDG\.E(?!.*STRONG).*\.128", r"STG\.E.*\.128", r"[FD]FMA"


def count(blocks: list[Block], full: Round) -> Counts | None:
    """Return the counts of a function whose loop does this in a round; None if none does."""
    heads = {j for i, block in enumerate(blocks) for j in block.followers if j <= i}
    rounds = [(length, head) for head in heads if (length := _round(blocks, head, full)) is not None]
    if not rounds:
        return None
    length, head = min(rounds)
    return Counts(length / full.vectors, _distances(blocks, 0)[head])


def _round(blocks: list[Block], head: int, full: Round) -> int | None:
    """Return the fewest instructions from a block back to it that do all of a round."""
    needs = full.loads, full.stores, full.multiply_adds
    does = [tuple(block.count(pattern) for pattern in (_LOAD, _STORE, _MULTIPLY_ADD)) for block in blocks]
    waiting = [(0, head, (0, 0, 0))]
    seen = set()
    while waiting:
        length, i, done = heapq.heappop(waiting)
        if i == head and length and done == needs:
            return length
        if (i, done) in seen or (i == head and length):
            continue
        seen.add((i, done))
        done = tuple(min(need, a + b) for need, a, b in zip(needs, done, does[i], strict=True))
        for j in blocks[i].followers:
            heapq.heappush(waiting, (length + len(blocks[i].instructions), j, done))
    return None


def _distances(blocks: list[Block], start: int) -> dict[int, int]:
    """Return the fewest instructions from the beginning of a block to those of the others."""
    found: dict[int, int] = {}
    waiting = [(0, start)]
    while waiting:
        distance, i = heapq.heappop(waiting)
        if i in found:
            continue
        found[i] = distance
        for j in blocks[i].followers:
            heapq.heappush(waiting, (distance + len(blocks[i].instructions), j))
    return found


def round_of(name: str) -> Round | None:
    """Return what a kernel's loop does in a round, by its name; None if it reads no vectors."""
    match = re.match(r"(\w+)<(\w+), (\d+), (true|false)(?:, (true|false), (\w+))?>", name)
    if match is None or match[3] == "1":
        return None
    kernel, _, width, _, residual, activation = match.groups()
    has_residual, computes_mask = residual == "true", residual == "false" and activation != "IDENTITY"
    # walk's UNROLL, and the tensors that are read and written: see the kernels.
    vectors = 4 if kernel == "statistics" or (kernel == "normalize" and not has_residual) else 2
    reads = {"statistics": 1, "normalize": 1 + has_residual}.get(kernel, 2)
    writes = {"statistics": 0, "reduce_gradients": int(has_residual)}.get(kernel, 1)
    adds = 1 + (computes_mask and kernel in ("reduce_gradients", "input_gradient"))
    return Round(vectors, vectors * reads, vectors * writes, vectors * int(width) * adds)


def counts(cubin: bytes, names: dict[str, str]) -> Iterator[tuple[str, Counts | None]]:
    """Yield the counts of kernels, which are given by their mangled names."""
    functions = disassemble(cubin)
    for mangled, name in names.items():
        full = round_of(name)
        yield name, None if full is None else count(functions[mangled], full)
