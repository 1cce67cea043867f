"""Heat maps of delta norms, as a picture and as a page."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from phi3_lora.errors import AdapterError, ConfigError, StorageError
from phi3_lora.report.heatmap import check_name, write_heat_map

NORMS = {
    "model.layers.0.mlp.down_proj": 1.0,
    "model.layers.0.self_attn.qkv_proj": 0.5,
    "model.layers.10.self_attn.qkv_proj": 4.0,
    "model.layers.2.self_attn.qkv_proj": 0.0,
    "model.layers.2.mlp.down_proj": 2.0,
    "lm_head": 3.0,
    "model.embed_tokens": 0.25,
}


class Page(HTMLParser):
    """Collects the attributes and text of each cell of the table, row by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[tuple[dict[str, str | None], str]]] = []
        self.tags: set[str] = set()
        self._is_in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        self._is_in_cell = tag in ("td", "th")
        if self._is_in_cell:
            self.rows[-1].append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self._is_in_cell = False

    def handle_data(self, data: str) -> None:
        if self._is_in_cell:
            attrs, text = self.rows[-1][-1]
            self.rows[-1][-1] = (attrs, text + data)


def write_page(folder: Path, norms: dict[str, float], title: str = "Norms") -> tuple[str, Page]:
    path = folder / "map.html"
    write_heat_map(path, norms, title)
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_a_page_has_layers_down_and_modules_across(tmp_path: Path) -> None:
    _, page = write_page(tmp_path, NORMS)
    assert [[text for _, text in row] for row in page.rows] == [
        ["layer", "qkv_proj", "down_proj"],
        ["model.embed_tokens", "0.25"],
        ["0", "0.5", "1"],
        ["2", "0", "2"],
        ["10", "4", "\u2013"],
        ["lm_head", "3"],
    ]
    assert [row[1][0].get("colspan") for row in page.rows] == [None, "2", None, None, None, "2"]


def test_each_cell_names_its_module_and_its_norm(tmp_path: Path) -> None:
    _, page = write_page(tmp_path, NORMS | {"lm_head": 1.23456789})
    titles = {cell["title"] for row in page.rows[1:] for cell, _ in row[1:]}
    assert {"lm_head: 1.23457", "model.layers.10.self_attn.qkv_proj: 4"} <= titles
    assert "model.layers.10.mlp.down_proj: not adapted" in titles


def test_modules_that_change_nothing_and_modules_not_adapted_are_marked(tmp_path: Path) -> None:
    text, page = write_page(tmp_path, NORMS)
    (zero, _), (absent, _) = page.rows[3][1], page.rows[4][2]
    assert zero["class"] == "zero" and "changes nothing (norm 0)" in (zero["title"] or "")
    assert absent["class"] == "absent"
    assert "style" not in zero and "style" not in absent, "neither is on the scale of colours"
    legend = text.split('class="legend"')[1].split("</div>")[0]
    assert "changes nothing (norm 0)" in legend and "not adapted" in legend


def test_one_scale_of_colours_goes_from_0_to_the_largest_norm(tmp_path: Path) -> None:
    text, page = write_page(tmp_path, NORMS)
    colours = {
        content: re.findall(r"\d+", str(cell.get("style")).split(";")[0])
        for row in page.rows[1:]
        for cell, content in row[1:]
        if "style" in cell
    }
    assert colours["4"] == ["8", "48", "107"]
    ordered = [sum(map(int, colours[norm])) for norm in ("0.25", "0.5", "1", "2", "3", "4")]
    assert ordered == sorted(ordered, reverse=True), "the larger the darker"
    legend = text.split('class="legend"')[1].split("</div>")[0]
    assert "<span>0</span>" in legend and "<span>4</span>" in legend
    assert "linear-gradient" in legend


def test_text_is_light_on_dark_cells_and_dark_on_light_ones(tmp_path: Path) -> None:
    _, page = write_page(tmp_path, NORMS)
    ink = {text: str(cell.get("style")) for row in page.rows[1:] for cell, text in row[1:]}
    assert ink["4"].endswith("color:#fff") and ink["0.25"].endswith("color:#222")


def test_an_adapter_that_changes_nothing_has_a_map_without_a_scale(tmp_path: Path) -> None:
    text, page = write_page(tmp_path, {"lm_head": 0.0})
    assert page.rows[1][1][0]["class"] == "zero" and 'class="bar"' not in text
    write_heat_map(tmp_path / "map.png", {"lm_head": 0.0}, "Norms")
    assert (tmp_path / "map.png").exists()


def test_a_page_is_one_file_and_runs_nothing(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>'
    text, page = write_page(tmp_path, {f'x"{evil}': 1.0, "lm_head": 0.5}, title=evil)
    assert page.tags.isdisjoint({"script", "link", "img", "iframe"})
    assert "http" not in text and "url(" not in text and "&lt;script&gt;" in text
    assert page.rows[1][0][1] == f'x"{evil}' == (page.rows[1][1][0]["title"] or "")[:-3]


def test_columns_with_the_same_ending_have_their_paths_as_titles(tmp_path: Path) -> None:
    norms = {"model.layers.0.a.proj": 1.0, "model.layers.0.b.proj": 2.0}
    _, page = write_page(tmp_path, norms)
    assert [text for _, text in page.rows[0]] == ["layer", "a.proj", "b.proj"]


def test_a_picture_shows_the_largest_darkest_and_hatches_zeros(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    norms = {f"model.layers.{i}.self_attn.qkv_proj": float(i) for i in range(4)}
    write_heat_map(tmp_path / "map.png", norms, "Norms")
    pixels = image.imread(tmp_path / "map.png")[..., :3]
    assert pixels.shape[0] > 300 and pixels.shape[1] > 300
    darkest, hatch = np.array([8, 48, 107]) / 255, np.array([0xF0, 0xB0, 0xB0]) / 255

    def rows_of(colour: np.ndarray) -> np.ndarray:
        # The area left of the scale, since the scale has every colour.
        area = pixels[:, : int(0.7 * pixels.shape[1])]
        counts = (np.abs(area - colour).max(axis=-1) < 0.02).sum(axis=1)
        return np.flatnonzero(counts > 5)

    assert len(rows_of(darkest)) > 20, "layer 3 is filled"
    in_cells = rows_of(hatch)[rows_of(hatch) < rows_of(darkest).min()]
    assert len(in_cells) > 5, "above layer 3, where layer 0 is, and not in the legend alone"


def test_a_title_is_text_and_not_a_formula(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_heat_map(tmp_path / "map.png", NORMS, r"runs/$\frac{$/adapter")


def test_a_picture_needs_no_display_and_leaves_matplotlibs_state_alone(tmp_path: Path) -> None:
    sys.modules.pop("matplotlib.pyplot", None)
    write_heat_map(tmp_path / "map.PNG", NORMS, "Norms")
    assert (tmp_path / "map.PNG").read_bytes().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize("name", ["map", "map.svg", "map.pdf", "png"])
def test_another_suffix_is_refused_and_the_two_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"\.png or an \.html, got .*" + name):
        write_heat_map(tmp_path / name, NORMS, "Norms")
    assert not any(tmp_path.iterdir())


def test_without_matplotlib_a_picture_is_refused_with_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'phi3-lora\[plots\]'.*\.html"):
        write_heat_map(tmp_path / "map.png", NORMS, "Norms")
    check_name(tmp_path / "map.html")
    write_page(tmp_path, NORMS)


@pytest.mark.parametrize("norm", [float("nan"), float("inf"), -1.0])
def test_an_invalid_norm_is_refused_with_its_module(tmp_path: Path, norm: float) -> None:
    with pytest.raises(AdapterError, match=f"lm_head: {norm}"):
        write_page(tmp_path, {"lm_head": norm})


def test_a_map_without_norms_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="nothing to draw"):
        write_page(tmp_path, {})


def test_a_map_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot write"):
        write_heat_map(tmp_path / "nowhere" / "map.html", NORMS, "Norms")
