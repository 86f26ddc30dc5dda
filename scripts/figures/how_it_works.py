"""Draw the figure of scripts/docs/how_it_works.md: two passes over the batch and one exchange per direction.

p is the pivot, μ the mean and σ the deviation over all ranks, g the gradient of the activation's input.

    python scripts/figures/how_it_works.py

Writes how_it_works.svg beside this file, or into the folder that is given.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

RANKS = 3
BLUE, ORANGE, GRAY = "#2f6db5", "#d9822b", "#555555"

# What a direction does: its passes over memory, and what the ranks exchange between them.
FORWARD = (
    "forward",
    "pass 1 over x\n$n,\\ \\sum(x-p),\\ \\sum(x-p)^2$\nper channel",
    "one allreduce of\n$4C + 6$ float64:\nsums about $p$,\nfault flag, tag",
    "pass 2 over x\n$y = (x-\\mu)\\,\\sigma^{-1}w + b$\nrunning statistics",
)
BACKWARD = (
    "backward",
    "pass 1 over dy and x\n$\\sum g,\\ \\sum g\\,(x-\\mu)$\ndresidual $= g$",
    "one allreduce of\n$2C + 5$ float64:\nsums,\nfault flag, tag",
    "pass 2 over dy and x\ndx\ndweight, dbias",
)


def box(axes: Any, x: float, y: float, width: float, height: float, text: str, color: str) -> None:
    """Draw a rounded box with text in its middle."""
    from matplotlib.patches import FancyBboxPatch

    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor="white", edgecolor=color))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9, linespacing=1.4)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw an arrow."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": GRAY, "shrinkA": 0, "shrinkB": 0})


def direction(axes: Any, top: float, texts: tuple[str, str, str, str]) -> None:
    """Draw a row for each rank, and the exchange across them."""
    title, first, exchange, second = texts
    height, step = 1.05, 1.25
    bottom = top - RANKS * step + (step - height)
    axes.text(0.1, top + 0.22, title, fontsize=12, weight="bold", color=GRAY)
    for rank in range(RANKS):
        y = top - (rank + 1) * step + (step - height)
        axes.text(0.55, y + height / 2, f"rank {rank}", ha="center", va="center", fontsize=10, color=GRAY)
        box(axes, 1.15, y, 2.6, height, first, BLUE)
        box(axes, 7.25, y, 2.6, height, second, BLUE)
        arrow(axes, (3.75, y + height / 2), (4.35, y + height / 2))
        arrow(axes, (6.65, y + height / 2), (7.25, y + height / 2))
    box(axes, 4.35, bottom, 2.3, top - bottom, exchange, ORANGE)


def main(folder: Path = Path(__file__).parent) -> None:
    """Draw and write the figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams |= {"svg.hashsalt": "how_it_works", "mathtext.fontset": "dejavusans"}
    figure, axes = pyplot.subplots(figsize=(8.5, 7))
    direction(axes, 8.3, FORWARD)
    direction(axes, 3.9, BACKWARD)
    axes.set(xlim=(0, 10), ylim=(0.1, 8.8))
    axes.axis("off")
    figure.savefig(folder / "how_it_works.svg", bbox_inches="tight", metadata={"Date": None})
    print("written: how_it_works.svg")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
