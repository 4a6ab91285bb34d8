"""Curves of runs: loss, throughput, learning rate and gradient norm over steps, as SVG or PNG.

SVG is written here, so that it needs nothing; the same panels go to PNG through matplotlib where it
is installed. Long runs are thinned to what a screen can show: each column keeps its extremes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ...errors import ConfigError
from ..metrics import FILE, read_evaluations, read_metrics

_COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2")
_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 760, 200, 76, 34, 46
_COLUMNS = 600

#: Points of a curve: step and value.
Points = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a panel; ``dashed`` for validation."""

    name: str
    points: Points
    colour: str
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves that share axes."""

    title: str
    curves: tuple[Curve, ...]


def panels(runs: Sequence[Path]) -> list[Panel]:
    """Read the metrics of runs.

    Raises:
        ConfigError: a folder without metrics.
    """
    kinds: tuple[tuple[str, str], ...] = (
        ("loss", "loss"),
        ("tokens/s", "tokens_per_s"),
        ("learning rate", "lr"),
        ("gradient norm", "grad_norm"),
    )
    curves: dict[str, list[Curve]] = {title: [] for title, _ in kinds}
    for number, run in enumerate(runs):
        folder = run.parent if run.name == FILE else run
        metrics = read_metrics(folder)
        if not metrics:
            raise ConfigError(f"{folder}: has no {FILE} with a line in it: not the folder of a run")
        colour = _COLOURS[number % len(_COLOURS)]
        name = folder.resolve().name
        for title, field in kinds:
            points = [(float(m.step), float(getattr(m, field))) for m in metrics]
            curves[title].append(Curve(name, _thinned(points), colour))
        evals = [(float(e.step), e.loss) for e in read_evaluations(folder) if e.loss is not None]
        if evals:
            curves["loss"].append(Curve(f"{name} validation", _thinned(evals), colour, True))
    return [Panel(title, tuple(found)) for title, found in curves.items()]


def plot(runs: Sequence[Path], out: Path) -> Path:
    """Draw runs into ``out``, whose suffix chooses between ``.svg`` and ``.png``.

    Raises:
        ConfigError: another suffix, no metrics, or PNG without matplotlib.
    """
    drawn: dict[str, Callable[[list[Panel], Path], None]] = {".svg": _svg_file, ".png": _png}
    if out.suffix not in drawn:
        raise ConfigError(f"{out}: curves are drawn as .svg or .png")
    drawn[out.suffix](panels(runs), out)
    return out


def svg(drawn: Sequence[Panel]) -> str:
    """Return an SVG document of panels, one below the other."""
    height = _TOP + len(drawn) * (_HEIGHT + _GAP)
    width = _LEFT + _WIDTH + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, panel in enumerate(drawn):
        parts += _panel(panel, _TOP + number * (_HEIGHT + _GAP))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, top: int) -> list[str]:
    values = [p for curve in panel.curves for p in curve.points if math.isfinite(p[1])]
    xs, ys = [x for x, _ in values] or [0.0], [y for _, y in values] or [0.0]
    across, up = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x_span, y_span = (min(*xs, across[0]), max(*xs, across[-1])), (up[0], up[-1])

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = (point[0] - x_span[0]) / ((x_span[1] - x_span[0]) or 1)
        y = (point[1] - y_span[0]) / ((y_span[1] - y_span[0]) or 1)
        return round(_LEFT + x * _WIDTH, 1), round(top + (1 - y) * _HEIGHT, 1)

    parts = [f'<text x="{_LEFT}" y="{top - 8}" font-weight="600">{escape(panel.title)}</text>']
    for tick in up:
        _, y = place((x_span[0], tick))
        parts.append(f'<path d="M{_LEFT} {y}h{_WIDTH}" stroke="#e5e7eb"/>')
        label = f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end" fill="#6b7280">'
        parts.append(f"{label}{tick:.6g}</text>")
    for tick in across:
        x, y = place((tick, up[0]))
        parts.append(
            f'<text x="{x}" y="{y + 16}" text-anchor="middle" fill="#6b7280">{tick:.6g}</text>'
        )
    right = _LEFT + _WIDTH
    for curve in reversed(panel.curves):
        line = " ".join(
            f"{x},{y}" for x, y in (place(p) for p in curve.points if math.isfinite(p[1]))
        )
        dash = ' stroke-dasharray="5 4"' if curve.dashed else ""
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{curve.colour}" stroke-width="1.6"'
            f"{dash}/>"
        )
        text = escape(curve.name)
        parts.append(
            f'<text x="{right}" y="{top - 8}" text-anchor="end" fill="{curve.colour}">{text}</text>'
        )
        right -= 7 * len(curve.name) + 16
    return parts


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about ``count`` round numbers from at most ``low`` to at least ``high``."""
    if not high > low:
        low, high = low - abs(low) / 2 - (low == 0), high + abs(high) / 2 + (high == 0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def _thinned(points: Points) -> Points:
    """Keep the lowest and highest point of each column of the drawing."""
    if len(points) <= 2 * _COLUMNS:
        return points
    out = []
    size = len(points) / _COLUMNS
    for column in range(_COLUMNS):
        part = points[int(column * size) : int((column + 1) * size)]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        out += sorted(ends)
    return out


def _svg_file(drawn: list[Panel], out: Path) -> None:
    out.write_text(svg(drawn), encoding="utf-8")


def _png(drawn: list[Panel], out: Path) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"{out}: drawing PNG needs matplotlib: pip install 'mconv[plot]', or draw an .svg"
        ) from error
    figure = Figure(figsize=(9, 2.6 * len(drawn)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(len(drawn), squeeze=False)[:, 0], drawn, strict=True):
        for curve in panel.curves:
            xs, ys = zip(*curve.points, strict=True)
            style = "--" if curve.dashed else "-"
            axes.plot(xs, ys, style, color=curve.colour, label=curve.name, linewidth=1.3)
        axes.set_title(panel.title, loc="left", fontsize=10)
        axes.grid(color="#e5e7eb")
        axes.legend(fontsize=8)
    figure.savefig(out, dpi=120)
