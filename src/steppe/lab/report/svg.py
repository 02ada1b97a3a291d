"""Figures as SVG: seen without JavaScript, scaled to any width, and saved as they are.

A curve is told by colour, by dashes, and by its name at its end.
"""

import math
from html import escape
from typing import Any

from steppe.lab.report.figures import Figure, Trace

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 190, 14, 52
_DASH = {"solid": "", "dash": "9 5", "dot": "2 4", "dashdot": "9 4 2 4", "longdash": "15 5"}
_GAP = 15  # pixels between two names at the ends of curves
_LONGEST = 26  # letters of such a name
STYLE = """
svg { font: 13px system-ui, sans-serif; } svg text { fill: var(--ink, #1c2430); }
svg .grid { stroke: var(--line, #dfe3e8); } svg .name { font-size: 12px; }
"""


class _Axis:
    """One axis: where a value lies, in pixels, and its ticks."""

    def __init__(self, values: list[Any], spec: dict[str, Any], start: float, end: float) -> None:
        self.start, self.end, self.kind = start, end, spec.get("type", "linear")
        self.names = list(spec.get("categoryarray", dict.fromkeys(values))) if self.kind == "category" else []
        numbers = [v for v in values if isinstance(v, int | float) and math.isfinite(v)] or [0.0, 1.0]
        if self.kind == "log":
            numbers = [math.log10(v) for v in numbers if v > 0] or [0.0, 1.0]
        low, high = min(numbers), max(numbers)
        low = min(0.0, low) if spec.get("rangemode") == "tozero" else low
        pad = 0.04 * (high - low) or 0.5 * (abs(high) or 1.0)
        self.low, self.high = (low if spec.get("rangemode") == "tozero" else low - pad), high + pad

    def at(self, value: Any) -> float | None:
        """Return the pixel of a value, ``None`` where it has no place."""
        if self.kind == "category":
            share = (self.names.index(value) + 0.5) / len(self.names)
        elif value is None or not math.isfinite(value) or (self.kind == "log" and value <= 0):
            return None
        else:
            number = math.log10(value) if self.kind == "log" else value
            share = (number - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[tuple[Any, str]]:
        """Return the values of the ticks and their texts."""
        if self.kind == "category":
            return [(name, str(name)) for name in self.names]
        if self.kind == "log":
            low, high = math.floor(self.low), math.ceil(self.high)
            steps = (1, 2, 5) if high - low <= 2 else (1,)
            values = [m * 10.0**e for e in range(low, high + 1) for m in steps]
            return [(v, f"{v:g}") for v in values if self.low <= math.log10(v) <= self.high]
        rough = (self.high - self.low) / 5
        unit = 10 ** math.floor(math.log10(rough))
        step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough)
        first = math.ceil(self.low / step)
        return [(k * step, f"{k * step:.6g}") for k in range(first, math.floor(self.high / step) + 1)]


def draw(figure: Figure, log: bool = False, alone: bool = False) -> str:
    """Return a figure as an SVG element.

    Args:
        log: draw the vertical axis by orders of magnitude.
        alone: for a file of its own, with its style inside.
    """
    ys = {**figure.layout["yaxis"], **({"type": "log"} if log else {})}
    xs = figure.layout["xaxis"]
    xaxis = _Axis([x for t in figure.data for x in t["x"]], xs, LEFT, WIDTH - RIGHT)
    yaxis = _Axis([y for t in figure.data for y in t["y"]], ys, HEIGHT - BOTTOM, TOP)
    parts = [*_frame(xaxis, yaxis, xs["title"]["text"], ys["title"]["text"])]
    for trace in figure.data:
        parts += _trace(trace, xaxis, yaxis)
    parts += _names(figure.data, yaxis)
    style = f"<style>{STYLE}</style>" if alone else ""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
    return f"{head}><title>{escape(figure.title)}</title>{style}{''.join(parts)}</svg>"


def _frame(xaxis: _Axis, yaxis: _Axis, across: str, up: str) -> list[str]:
    """Return grid, ticks and titles."""
    parts, right, bottom = [], WIDTH - RIGHT, HEIGHT - BOTTOM
    for value, text in yaxis.ticks():
        y = yaxis.at(value) or 0.0
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>')
    for value, text in xaxis.ticks():
        x = xaxis.at(value) or 0.0
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{escape(text)}</text>')
    middle = (TOP + bottom) / 2
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{escape(across)}</text>')
    turned = f'transform="rotate(-90 16 {middle})"'
    return [*parts, f'<text x="16" y="{middle}" text-anchor="middle" {turned}>{escape(up)}</text>']


def _trace(trace: Trace, xaxis: _Axis, yaxis: _Axis) -> list[str]:
    """Return a band, or a line with its marks and bars."""
    pairs = list(zip(trace["x"], trace["y"], strict=True))
    points = [(xaxis.at(x), yaxis.at(y)) for x, y in pairs]
    if trace.get("fill"):
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in points if x is not None and y is not None)
        return [f'<polygon points="{corners}" fill="{trace["fillcolor"]}" fill-opacity="0.16"/>']
    colour, parts = trace["line"]["color"], []
    if "lines" in trace["mode"]:
        dash = _DASH[trace["line"]["dash"]]
        parts.append(
            f'<path d="{_path(points)}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
        )
        if len(there := [(x, y) for x, y in points if x is not None and y is not None]) == 1:  # a path of one point
            parts.append(f'<circle cx="{there[0][0]:.1f}" cy="{there[0][1]:.1f}" r="3" fill="{colour}"/>')
    if "markers" in trace["mode"]:
        spreads = trace.get("error_y", {}).get("array", [0.0] * len(points))
        for (x, y), (px, py), spread, symbol, text in zip(
            pairs, points, spreads, trace["marker"]["symbol"], trace.get("text", [""] * len(points)), strict=True
        ):
            if px is not None and py is not None:
                ends = [yaxis.at(y + s) or py for s in (-spread, spread)]
                told = escape(f"{trace['name']} {x}: {y:.4g} {text}")
                bar = f'<path d="M{px:.1f} {ends[0]:.1f}V{ends[1]:.1f}" stroke="{colour}"/>'
                parts.append(f"{bar}{_mark(symbol, px, py, colour)}<title>{told}</title></g>")
    return parts


def _path(points: list[tuple[float | None, float | None]]) -> str:
    """Return a path that is broken where a value is missing."""
    text, pen = "", "M"
    for x, y in points:
        if x is None or y is None:
            pen = "M"
            continue
        text, pen = f"{text}{pen}{x:.1f} {y:.1f}", "L"
    return text


def _mark(symbol: str, x: float, y: float, colour: str) -> str:
    """Return the open group of one mark: a star is chosen, a cross dropped or collapsed."""
    fill = f'fill="{colour}"'
    shape = {
        "circle": f'<circle r="5" {fill}/>',
        "square": f'<rect x="-5" y="-5" width="10" height="10" {fill}/>',
        "diamond": f'<path d="M0-6L6 0L0 6L-6 0Z" {fill}/>',
        "triangle-up": f'<path d="M0-6L6 5H-6Z" {fill}/>',
        "x": f'<path d="M-5-5L5 5M-5 5L5-5" stroke="{colour}" stroke-width="2.5"/>',
        "star": f'<path d="{_STAR}" {fill} stroke="var(--ink, #1c2430)"/>',
    }.get(symbol, f'<path d="M0-6V6M-6 0H6" stroke="{colour}" stroke-width="4"/>')
    return f'<g transform="translate({x:.1f} {y:.1f})">{shape}'


_STAR = (
    "M"
    + "L".join(
        f"{r * math.sin(k * math.pi / 5):.1f} {-r * math.cos(k * math.pi / 5):.1f}"
        for k, r in enumerate([9.0, 4.0] * 5)
    )
    + "Z"
)


def _names(data: list[Trace], yaxis: _Axis) -> list[str]:
    """Return the name of every curve at its end, moved apart where two would overlap."""
    ends = []
    for trace in data:
        shown = [y for y in map(yaxis.at, trace["y"]) if y is not None]
        if shown and not trace.get("fill") and trace.get("showlegend", True) and trace["name"]:
            ends.append((shown[-1], trace))
    ends.sort(key=lambda end: end[0])
    parts, last = [], -math.inf
    highest = HEIGHT - BOTTOM - _GAP * (len(ends) - 1)
    for k, (y, trace) in enumerate(ends):
        last = max(min(y, highest + k * _GAP), last + _GAP)
        whole, x = trace["name"], WIDTH - RIGHT + 6
        name = whole if len(whole) <= _LONGEST else whole[: _LONGEST - 1] + "\N{HORIZONTAL ELLIPSIS}"
        look = f'stroke="{trace["line"]["color"]}" stroke-dasharray="{_DASH[trace["line"]["dash"]]}" stroke-width="2.5"'
        mark = f'<path d="M{x} {last:.1f}h20" {look}/>'
        if "lines" not in trace["mode"]:
            symbol = next((one for one in trace["marker"]["symbol"] if one not in ("star", "x")), "star")
            mark = f"{_mark(symbol, x + 12, last, trace['line']['color'])}</g>"
        parts.append(f'{mark}<text class="name" x="{x + 24}" y="{last + 4:.1f}">')
        parts.append(f"{escape(name)}<title>{escape(whole)}</title></text>")
    return parts
