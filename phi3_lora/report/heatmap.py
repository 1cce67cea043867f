"""Heat maps of delta norms: one row for each layer, one column for each module."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_lora.adapters.names import split_layer
from phi3_lora.errors import AdapterError, ConfigError, listing
from phi3_lora.report.pages import render_page
from phi3_lora.storage.atomic import replace_file
from phi3_lora.storage.optional import optional_package

_SUFFIXES = (".png", ".html")
_STOPS = ("#f7fbff", "#c6dbef", "#6baed6", "#2171b5", "#08306b")
"""Colours from norm 0 to the largest norm, evenly spaced. Source: ColorBrewer, Blues."""
_ORDER = (
    *("qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_up_proj", "gate_proj", "up_proj", "down_proj"),
)
"""Columns in the order in which a layer runs its modules; others follow by name."""
_ZERO = "changes nothing (norm 0)"
_ABSENT = "not adapted"


@dataclass(frozen=True, slots=True)
class _Row:
    label: str
    cells: tuple[float | None, ...]
    """One norm for each column, None without a delta; a single cell spans all columns."""
    modules: tuple[str, ...]
    """The full path of each cell's module."""


def check_name(path: Path) -> None:
    """Check that a heat map can be written under a name.

    Raises:
        ConfigError: when the suffix is not .png or .html, or matplotlib is missing.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"a heat map is a .png or an .html, got {path} (--plot)")
    if path.suffix.lower() == ".png":
        optional_package(
            "matplotlib",
            extra="plots",
            need="a .png needs matplotlib",
            error=ConfigError,
            otherwise=", or give a name that ends in .html, which needs nothing",
        )


def write_heat_map(path: Path, norms: Mapping[str, float], title: str) -> None:
    """Write the norms of an adapter's deltas as a heat map.

    Each decoder layer is a row and each module a column; a module outside the layers has its own
    row. Colours go from 0 to the largest norm. A norm of 0 and a module without a delta have marks
    in place of a colour.

    Args:
        path: a .png (drawn by matplotlib) or .html file (one page without scripts).
        norms: full path of a module -> Frobenius norm of its delta.
        title: the text above the map.

    Raises:
        AdapterError: when there are no norms, or one is not finite.
        ConfigError: when the suffix is not .png or .html, or matplotlib is missing.
        StorageError: when the file cannot be written.
    """
    check_name(path)
    wrong = [f"{name}: {norm}" for name, norm in norms.items() if not 0 <= norm < math.inf]
    if wrong:
        raise AdapterError(listing("these norms are not finite numbers >= 0:", wrong))
    if not norms:
        raise AdapterError("nothing to draw: the adapter has no module with A and B")
    columns, rows = _table(norms)
    draw = _png if path.suffix.lower() == ".png" else _html
    replace_file(path, draw(columns, rows, max(norms.values()), title))


def _table(norms: Mapping[str, float]) -> tuple[list[str], list[_Row]]:
    """Return column titles and rows: the embedding, the layers, then the head and others."""
    places = {name: split_layer(name) for name in norms}
    inside = {place: name for name, place in places.items() if place is not None}
    paths = sorted({path for _, path in inside}, key=_rank)
    outside = [
        _Row(name, (norms[name],), (name,)) for name, place in places.items() if place is None
    ]
    first = [row for row in outside if row.label.endswith("embed_tokens")]
    layers = [
        _Row(
            str(layer),
            tuple(norms[inside[layer, p]] if (layer, p) in inside else None for p in paths),
            tuple(f"model.layers.{layer}.{p}" for p in paths),
        )
        for layer in sorted({layer for layer, _ in inside})
    ]
    endings = [path.rsplit(".", 1)[-1] for path in paths]
    titles = endings if len(set(endings)) == len(endings) else paths
    return titles, [*first, *layers, *(row for row in outside if row not in first)]


def _rank(path: str) -> tuple[int, str]:
    ending = path.rsplit(".", 1)[-1]
    return _ORDER.index(ending) if ending in _ORDER else len(_ORDER), path


def _colour(share: float) -> tuple[int, int, int]:
    """Return red, green and blue for a norm's share of the largest norm."""
    place = min(max(share, 0.0), 1.0) * (len(_STOPS) - 1)
    index = min(int(place), len(_STOPS) - 2)
    low, high = (
        [int(stop[i : i + 2], 16) for i in (1, 3, 5)] for stop in _STOPS[index : index + 2]
    )
    red, green, blue = (
        round(a + (b - a) * (place - index)) for a, b in zip(low, high, strict=True)
    )
    return red, green, blue


def _is_dark(share: float) -> bool:
    red, green, blue = _colour(share)
    return 0.299 * red + 0.587 * green + 0.114 * blue < 140


def _text(norm: float | None) -> str:
    return "\u2013" if norm is None else "0" if norm == 0 else f"{norm:.3g}"


@dataclass(frozen=True, slots=True)
class _Cell:
    """A cell of the page's table."""

    text: str
    title: str
    kind: str = ""
    """zero or absent; empty if the norm gives the colour."""
    colour: str = ""
    ink: str = ""


@dataclass(frozen=True, slots=True)
class _PageRow:
    """A row of the page's table."""

    label: str
    span: int
    """Number of columns that each cell spans."""
    cells: list[_Cell]


def _html(columns: list[str], rows: list[_Row], largest: float, title: str) -> bytes:
    """Draw the map as an HTML table; each cell shows its module's path on hover."""
    return render_page(
        "heatmap.html.jinja",
        title=title,
        columns=columns,
        rows=[_page_row(row, len(columns), largest) for row in rows],
        largest=largest,
        largest_text=f"{largest:.3g}",
        stops=_STOPS,
        zero=_ZERO,
        absent=_ABSENT,
    )


def _page_row(row: _Row, num_columns: int, largest: float) -> _PageRow:
    span = num_columns if len(row.cells) == 1 else 1
    pairs = zip(row.modules, row.cells, strict=True)
    return _PageRow(row.label, span, [_cell(module, norm, largest) for module, norm in pairs])


def _cell(module: str, norm: float | None, largest: float) -> _Cell:
    if norm is None:
        return _Cell(_text(norm), f"{module}: {_ABSENT}", kind="absent")
    if norm == 0:
        return _Cell(_text(norm), f"{module}: {_ZERO}", kind="zero")
    share = norm / largest
    colour = "rgb({},{},{})".format(*_colour(share))
    ink = "#fff" if _is_dark(share) else "#222"
    return _Cell(_text(norm), f"{module}: {norm:.6g}", colour=colour, ink=ink)


def _look(norm: float | None, largest: float) -> tuple[str, dict[str, Any]]:
    """Return the text colour of a cell and matplotlib's settings for its fill."""
    if norm is None:
        return "#999999", {"facecolor": "#f4f4f4", "edgecolor": "#ffffff"}
    if norm == 0:
        return "#aa3333", {"facecolor": "#ffffff", "edgecolor": "#f0b0b0", "hatch": "////"}
    share = norm / largest
    face = [part / 255 for part in _colour(share)]
    ink = "#ffffff" if _is_dark(share) else "#222222"
    return ink, {"facecolor": face, "edgecolor": "#ffffff"}


def _png(columns: list[str], rows: list[_Row], largest: float, title: str) -> bytes:
    """Draw the map with matplotlib, without a display or matplotlib's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    across = max(1, len(columns))
    figure = Figure(figsize=(3.2 + 1.1 * across, 1.9 + 0.3 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for y, row in enumerate(rows):
        width = across if len(row.cells) == 1 else 1
        for x, norm in enumerate(row.cells):
            ink, look = _look(norm, largest)
            axes.add_patch(Rectangle((x, y), width, 1, linewidth=1, **look))
            middle = (x + width / 2, y + 0.5)
            axes.text(*middle, _text(norm), ha="center", va="center", size=8, color=ink)
    axes.set(xlim=(0, across), ylim=(len(rows), 0), ylabel="layer")
    axes.set_xticks([x + 0.5 for x in range(len(columns))], columns)
    axes.set_yticks([y + 0.5 for y in range(len(rows))], [row.label for row in rows])
    axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False, bottom=False)
    axes.spines[:].set_visible(False)
    axes.set_title(title, size=11, pad=10, parse_math=False, wrap=True)
    if largest:
        colours = LinearSegmentedColormap.from_list("norms", list(_STOPS))
        scale = ScalarMappable(Normalize(0, largest), colours)
        bar = figure.colorbar(scale, ax=axes, fraction=0.05, aspect=30)
        bar.set_label("Frobenius norm of the delta")
    marks = [
        Patch(label=_ZERO, **_look(0.0, largest)[1]),
        Patch(label=_ABSENT, **_look(None, largest)[1] | {"edgecolor": "#cccccc"}),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
