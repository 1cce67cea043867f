"""HTML pages from the templates of this package: single files without scripts."""

from __future__ import annotations

from typing import Any


def render_page(template: str, **values: Any) -> bytes:
    """Fill a template and escape every value.

    Args:
        template: a file name in phi3_lora/report/templates.
        values: the variables of the template.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("phi3_lora.report"),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    page = environment.get_template(template).render(**values)
    # Python keeps an undecodable byte of a file name as a lone surrogate.
    return page.encode("utf-8", errors="replace")
