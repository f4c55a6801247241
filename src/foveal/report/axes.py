"""Axes with round ticks, linear or logarithmic, and numbers as one reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """A linear axis with round ticks: low and high are data, `at` gives a place in [0, 1]."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)

    def label(self, value: float) -> str:
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else 1.0
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return number(value, digits)


@dataclass(frozen=True)
class LogScale(Scale):
    """The same for positive data, by their logarithm; zero and less lie at minus infinity."""

    def at(self, value: float) -> float:
        if not value > 0:
            return math.nan if math.isnan(value) else -math.inf
        return math.log(value / self.low) / math.log(self.high / self.low)

    def label(self, value: float) -> str:
        return f"{value:g}" if 1e-4 <= value < 1e6 else f"1e{round(math.log10(value))}"


def log_scale(values: Sequence[float], count: int = 5) -> LogScale:
    """A logarithmic axis over whole decades that holds all finite values above zero; about `count` ticks."""
    found = [math.log10(value) for value in values if math.isfinite(value) and value > 0] or [0.0]
    first, last = math.floor(min(found) + 1e-9), math.ceil(max(found) - 1e-9)
    if first == last:
        first, last = first - 1, last + 1
    step = math.ceil((last - first) / count)
    ticks = tuple(10.0**power for power in range(first, last + 1, step))
    return LogScale(10.0**first, 10.0**last, ticks)


def scale(values: Sequence[float], count: int = 5, *, within: tuple[float, float] | None = None) -> Scale:
    """An axis that holds all finite values, about `count` ticks at 1, 2 or 5 times a power of ten.

    within: the range that makes sense, such as (0, 100) for percent; the axis does not leave it.
    """
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [round(i * step, 12) for i in range(first, last + 1)]
    if within:
        ticks = [tick for tick in ticks if within[0] <= tick <= within[1]] or list(within)
    return Scale(min(ticks[0], low), max(ticks[-1], high), tuple(ticks))


def number(value: float, digits: int = 1, *, sign: bool = False) -> str:
    """A number as one reads it: a real minus, no minus before zero; with `sign` also a plus."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return ("−" if value < 0 else "+" if sign else "") + text
