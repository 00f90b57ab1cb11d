"""The loss over a run as a drawing: what the report's SVG is made of.

Everything is given in percent of the plot, so that the page can stretch the lines to any width and set the numbers at
the axes as text of its own size.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

POINTS = 400  # more would not be seen
LOG_FROM = 8.0  # a loss that falls to less than this part of itself is drawn on a logarithmic axis
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Lines as SVG paths in a box of 100 x 100, y downwards.

    Attributes:
        raw: the training loss of single steps. smooth: its running mean. held_out: the held-out loss; "" without one.
        dots: a dot for each held-out measurement.
        steps: marks of the horizontal axis, (percent from the left, text).
        losses: marks of the vertical axis, (percent from the top, text).
        words: what the drawing shows, in a sentence.
    """

    raw: str
    smooth: str
    held_out: str
    dots: str
    steps: list[tuple[float, str]]
    losses: list[tuple[float, str]]
    words: str


def loss_curve(rows: Sequence[Mapping[str, Any]]) -> Curve | None:
    """The drawing of a run's metrics, or None when it logged fewer than 2 losses.

    Args:
        rows: lines of metrics.jsonl, with "step" and "loss" or "val_loss".
    """
    steps, loss = column(rows, "loss")
    if len(loss) < 2:
        return None
    held_steps, held = column(rows, "val_loss")
    smooth = running_mean(loss, max(1, len(loss) // 30))
    lines = np.concatenate([smooth, held])
    seen = np.concatenate([np.quantile(loss, [0.01, 0.99]), lines])  # single steps may lie outside
    low, high = float(seen.min()), float(seen.max())
    logarithmic = low > 0 and float(lines.max() / lines.min()) >= LOG_FROM
    scale: Callable[[float], float] = math.log if logarithmic else float
    ticks = log_ticks(low, high) if logarithmic else linear_ticks(low, high)
    bottom, top = scale(min(low, ticks[0])), scale(max(high, ticks[-1]))
    first, last = min(0.0, float(steps[0])), float(max(steps[-1], *held_steps, 0))

    def x(step: float) -> float:
        return 100 * (step - first) / (last - first)

    def y(value: float) -> float:
        value = max(value, ticks[0]) if logarithmic else value
        return min(100.0, max(0.0, 100 * (top - scale(value)) / ((top - bottom) or 1.0)))

    def path(at: Numbers, values: Numbers) -> str:
        points = zip(*thinned(at, values), strict=True)
        return "M" + " L".join(f"{x(step):.2f} {y(value):.2f}" for step, value in points)

    return Curve(
        raw=path(steps, loss),
        smooth=path(steps, smooth),
        held_out=path(held_steps, held) if len(held) > 1 else "",
        dots=" ".join(f"M{x(step):.2f} {y(value):.2f}h0" for step, value in zip(held_steps, held, strict=True)),
        steps=[(x(step), f"{step:,.0f}") for step in linear_ticks(first, last) if first <= step <= last],
        losses=[(y(value), f"{value:g}") for value in ticks],
        words=in_words(smooth, held, int(last)),
    )


def column(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[Numbers, Numbers]:
    """Steps and finite values of those rows that have the key, (N,) each."""
    found = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), (int, float))]
    pairs = np.array(found, dtype=np.float64).reshape(-1, 2)  # (N, 2)
    pairs = pairs[np.isfinite(pairs[:, 1])]
    return pairs[:, 0], pairs[:, 1]


def running_mean(values: Numbers, reach: int) -> Numbers:
    """Mean over each value and `reach` neighbours to both sides, fewer at the ends: (N,)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])  # (N + 1,)
    place = np.arange(len(values))
    start, end = np.maximum(place - reach, 0), np.minimum(place + reach + 1, len(values))
    return (sums[end] - sums[start]) / (end - start)


def thinned(steps: Numbers, values: Numbers) -> tuple[Numbers, Numbers]:
    """At most `POINTS` points, spread evenly, with the first and the last."""
    keep = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), POINTS)).round().astype(int))
    return steps[keep], values[keep]


def linear_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers around [low, high], about `wanted` of them."""
    if high <= low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / gap + 1e-9), math.ceil(high / gap - 1e-9)
    return [round(i * gap, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... around [low, high]; powers of ten alone where those would be many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    ticks = [float(f"{factor}e{power}") for power in range(first, last + 1) for factor in factors]
    lower = max((tick for tick in ticks if tick <= low), default=ticks[0])
    upper = min((tick for tick in ticks if tick >= high), default=ticks[-1])
    return [tick for tick in ticks if lower <= tick <= upper]


def in_words(smooth: Numbers, held: Numbers, steps: int) -> str:
    """The course of the loss in a sentence."""
    words = f"Over {steps:,} steps the training loss went from {smooth[0]:.4g} to {smooth[-1]:.4g}"
    if len(held) > 1:
        words += f", the held-out loss from {held[0]:.4g} to {held[-1]:.4g}"
    return words + "."
