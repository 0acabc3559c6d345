"""How every figure looks, and how a matplotlib figure becomes SVG that can stand inside a page.

Colours are Okabe and Ito's (2008), told apart by every kind of colour vision. They are plain hex
values here; the page swaps them for CSS variables, so that one SVG serves light and dark.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK = "#1f2328"
MUTED = "#656d76"
GRID = "#d8dee4"
STUDENT = "#0072b2"
TEACHER = "#d55e00"
SYSTEM = "#009e73"
PROMISE = "#aa4499"

# Colour in a figure to its name in the page's style sheet.
PALETTE: Mapping[str, str] = MappingProxyType(
    {
        INK: "ink",
        MUTED: "muted",
        GRID: "grid",
        STUDENT: "student",
        TEACHER: "teacher",
        SYSTEM: "system",
        PROMISE: "promise",
    }
)

# Inches. At 9 points, text is still about 9 pixels high where a figure of this width is shrunk to
# a telephone's.
WIDTH = 4.8

_RC = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so widths are the same anywhere
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.borderaxespad": 0.0,
    "legend.borderpad": 0.0,
    "legend.columnspacing": 1.4,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",  # real text: it can be searched, read aloud and copied
    "text.color": INK,
    "text.parse_math": False,  # a label may hold a dollar sign
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}


@contextlib.contextmanager
def figure(name: str, height: float, width: float = WIDTH) -> Iterator[Figure]:
    """An empty figure of `width` x `height` inches, with our style in force inside the block.

    Args:
        name: salts the ids in the SVG, so that two figures on one page share none.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's matplotlibrc says
        matplotlib.rcParams.update(_RC | {"svg.hashsalt": f"journeyman-{name}"})
        yield Figure(figsize=(width, height), layout="constrained")


def to_svg(fig: Figure, name: str, description: str) -> str:
    """The figure as one `<svg>` element; equal figures give equal text.

    Args:
        fig: made and drawn inside `figure`.
        name: prefix of every id.
        description: what a screen reader says.
    """
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # Only measuring needs the glyph; the browser has its own font for it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        FigureCanvasSVG(fig).print_svg(buffer, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)
    return _in_tags(svg, r'(?<=\bid=")|(?<=href="#)|(?<=url\(#)', f"{name}-")


def with_variables(svg: str) -> str:
    """The SVG with the palette's colours as the style sheet's variables."""
    for color, name in PALETTE.items():
        svg = _in_tags(svg, f"(?<=fill: ){color}|(?<=stroke: ){color}", f"var(--{name})")
    return svg


def _in_tags(svg: str, pattern: str, replacement: str) -> str:
    """Replace inside tags only: what stands between them is the user's."""
    return re.sub(r"<[^>]*>", lambda tag: re.sub(pattern, replacement, tag[0]), svg)
