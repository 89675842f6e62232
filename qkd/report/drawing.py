"""Draw with matplotlib, and convert a figure to SVG for any page or to a PNG file.

matplotlib is imported only when something is drawn, since this takes a second. Figures are created without pyplot, and
settings apply only within :func:`drawing`, so nothing global changes and the user's own settings have no effect.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

from qkd.foreign.shown import shown_line

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 72  # one point is one pixel in the SVG's coordinates
INK, RULE, AXIS = "#1d2430", "#d7dce3", "#888888"
CURVES = ("#2563b8", "#c2410c", "#15803d", "#7e3fb4")
# colors that follow the page's light or dark theme; without a page, the value after the comma
_OF_PAGE = {
    INK: "currentColor",
    RULE: f"var(--rule, {RULE})",
    **{color: f"var(--c{number}, {color})" for number, color in enumerate(CURVES, 1)},
}
_NOTE = "note: "
_NO_XML = re.compile("[\ufffe\uffff]")  # the only characters that `shown_line` keeps but XML does not allow
_SETTINGS: Any = {  # matplotlib declares a type for every name
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "qkd",  # the same figure gives the same bytes
    "text.parse_math": False,  # a dollar sign in a name is just that
    "path.simplify": False,
    "lines.solid_capstyle": "butt",
    "font.size": 11,
    **dict.fromkeys(("text.color", "xtick.labelcolor", "ytick.labelcolor", "axes.labelcolor"), INK),
    "grid.color": RULE,
    "axes.axisbelow": True,
    "axes.titley": 1,  # a fixed position; otherwise matplotlib spends half of its time searching for one
    **dict.fromkeys(("xtick.bottom", "ytick.left", "legend.frameon"), False),
    "legend.fontsize": 11,
    "legend.borderpad": 0.2,
    "legend.borderaxespad": 0.2,
    "legend.labelspacing": 0.3,
    "legend.columnspacing": 1.2,
    "legend.handletextpad": 0.4,
}


@dataclass(frozen=True)
class Picture:
    """A figure with a name.

    Args:
        title: What it shows, for readers who cannot see it.
        figure: The figure.
    """

    title: str
    figure: Figure

    def inline(self) -> Markup:
        """Return an SVG element for a page, as wide as there is room, with text and axes in the page's colors."""
        root = ElementTree.fromstring(self._saved("svg", metadata={"Date": None}))
        _tidy(root)
        root.attrib = {
            "viewBox": root.attrib["viewBox"],
            "role": "img",
            "aria-label": clean(self.title),
            "font-family": "system-ui, sans-serif",
            "stroke-linejoin": "round",
        }
        return Markup(ElementTree.tostring(root, encoding="unicode"))  # the XML writer has escaped the text

    def to_svg(self) -> str:
        """Return the content of an SVG file; text has the color of its surroundings."""
        return svg_file(self.inline())

    def to_png(self, scale: int = 2) -> bytes:
        """Return a PNG file on white, scaled up by ``scale``."""
        return self._saved("png", dpi=scale * DPI, facecolor="white")

    def _saved(self, kind: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        with drawing():
            self.figure.savefig(buffer, format=kind, **options)
        return buffer.getvalue()


def svg_file(element: Markup) -> str:
    """Return the content of an SVG file that holds an SVG element of a page."""
    return str(element).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


@contextmanager
def drawing() -> Iterator[None]:
    """Use matplotlib's defaults with a few changes within the context, so that everybody gets the same picture."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        # letters that matplotlib's font lacks are in the reader's font
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure without a background; sizes are in pixels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="none")


def panel(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Return axes without a frame or tick marks in a figure, positioned in pixels from its top left corner."""
    across, down = figure.get_size_inches() * DPI
    place = (left / across, 1 - (top + height) / down, width / across, height / down)
    return figure.add_axes(place, frame_on=False)


def write(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    """Write text whose baseline starts at a point, in pixels from the figure's top left corner."""
    across, down = figure.get_size_inches() * DPI
    figure.text(x / across, 1 - y / down, clean(text), **style)


def name_ends(axes: Axes, ends: tuple[float, float], names: tuple[str, str]) -> None:
    """Set a panel's range, and write a name below each end, inside the panel's width."""
    axes.set_xlim(*ends)
    axes.set_xticks(ends, [clean(name) for name in names])
    first, last = axes.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")


def dot(axes: Axes, x: float, y: float, radius: float, color: int, words: str) -> None:
    """Draw a circle around a point; a matplotlib marker would need references within the page.

    Args:
        axes: Where to draw.
        x, y: The point, in the units of the axes.
        radius: Radius in pixels.
        color: Index into the page's colors.
        words: The tooltip.
    """
    from matplotlib.patches import Circle
    from matplotlib.transforms import Affine2D, ScaledTranslation

    data: Any = axes.transData
    place = Affine2D().scale(radius) + ScaledTranslation(x, y, data)
    dot = Circle((0, 0), 1, transform=place, facecolor=CURVES[color % len(CURVES)], clip_on=False)
    note(dot, words)
    axes.add_artist(dot)


def note(artist: Artist, text: str) -> None:
    """Show text in the SVG as a tooltip of an artist."""
    artist.set_gid(_NOTE + clean(text))


def clean(text: str) -> str:
    r"""Return text as one line with control characters written out (``\x1b``), as XML can hold it."""
    return _NO_XML.sub(lambda match: f"\\u{ord(match[0]):04x}", shown_line(text))


def _tidy(root: ElementTree.Element) -> None:
    """Make an element safe to embed with others in a page: no ids, references, style sheet or metadata."""
    for child in list(root):
        if child.tag.endswith(("}metadata", "}defs")):
            root.remove(child)
    for element in list(root.iter()):
        element.tag = element.tag.rpartition("}")[2]
        element.attrib.pop("clip-path", None)
        name = element.attrib.pop("id", "")
        if name.startswith(_NOTE):
            title = ElementTree.Element("title")
            title.text = name.removeprefix(_NOTE)
            element.insert(0, title)
        if "style" in element.attrib:
            element.attrib["style"] = _style(element.attrib["style"])


def _style(style: str) -> str:
    parts = [part for part in style.split("; ") if not part.startswith("font-family")]
    return "; ".join(re.sub("#[0-9a-f]{6}", lambda match: _OF_PAGE.get(match[0], match[0]), part) for part in parts)
