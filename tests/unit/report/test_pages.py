"""The pages' templates: packaged, escaped, one style sheet."""

from __future__ import annotations

from importlib.resources import files

import pytest

from phi3_lora.report.pages import render_page

PAGES = {
    "heatmap.html.jinja": {
        "columns": ["</script>"],
        "rows": [],
        "largest": 0.0,
        "largest_text": "0",
        "stops": [],
        "zero": "zero",
        "absent": "absent",
    },
    "preview.html.jinja": {"documents": [], "space": "s", "line_end": "e", "tab": "t"},
}


def test_the_package_holds_every_template_and_the_style_sheet() -> None:
    found = {path.name for path in (files("phi3_lora.report") / "templates").iterdir()}
    assert found >= {*PAGES, "page.html.jinja", "style.css"}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_a_phone_follows_dark_mode_and_explains_the_usual_loss(name: str) -> None:
    text = render_page(name, title="Title", **PAGES[name]).decode()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "prefers-color-scheme: dark" in text
    assert "Usual: " in text


@pytest.mark.parametrize("name", PAGES)
def test_markup_and_quotes_in_a_title_are_text(name: str) -> None:
    text = render_page(name, title="</script><b>\"'&", **PAGES[name]).decode()
    assert "<h1>&lt;/script&gt;&lt;b&gt;&#34;&#39;&amp;</h1>" in text
    assert "</script>" not in text


def test_the_page_that_shows_data_forbids_scripts_and_loads() -> None:
    text = render_page("preview.html.jinja", title="t", **PAGES["preview.html.jinja"]).decode()
    assert "default-src 'none'; style-src 'unsafe-inline'" in text


def test_a_lone_surrogate_of_a_file_name_does_not_stop_a_page() -> None:
    text = render_page("preview.html.jinja", title="a\udcff", **PAGES["preview.html.jinja"])
    assert b"<h1>a?</h1>" in text
