"""A cell as HTML, by nbconvert and bleach."""

from __future__ import annotations

import logging
import re
from typing import Any

import bleach
import nbformat.v4
from bleach.css_sanitizer import CSSSanitizer
from bs4 import BeautifulSoup
from nbconvert import HTMLExporter
from nbconvert.preprocessors.coalescestreams import CoalesceStreamsPreprocessor
from traitlets.config import Config

__all__ = ["Renderer"]

_SILENT = logging.getLogger("curve_kernel.watch")
_SILENT.addHandler(logging.NullHandler())
_SILENT.propagate = False

# A browser shows the first that an output has; what needs a script is left out.
_KINDS = (
    "text/html",
    "text/markdown",
    "image/svg+xml",
    "image/png",
    "image/jpeg",
    "text/latex",
    "text/plain",
)
# Elements of which not even the text is shown.
_DROPPED = ("script", "style", "template", "noscript", "iframe", "object", "embed", "title")
_TAGS = (
    *(
        "a",
        "abbr",
        "b",
        "blockquote",
        "br",
        "caption",
        "code",
        "col",
        "colgroup",
        "dd",
        "del",
        "details",
    ),
    *("div", "dl", "dt", "em", "figcaption", "figure", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "i"),
    *(
        "img",
        "ins",
        "kbd",
        "li",
        "mark",
        "meter",
        "ol",
        "p",
        "pre",
        "progress",
        "q",
        "s",
        "samp",
        "small",
        "span",
    ),
    *(
        "strong",
        "sub",
        "summary",
        "sup",
        "table",
        "tbody",
        "td",
        "tfoot",
        "th",
        "thead",
        "tr",
        "u",
        "ul",
    ),
    "var",
)
_ATTRIBUTES = {"align", "border", "class", "colspan", "dir", "rowspan", "scope", "style", "title"}
_MORE = {
    "img": {"alt", "height", "width"},
    "meter": {"max", "min", "value"},
    "progress": {"max", "value"},
    "ol": {"start"},
}


# No href: a frame goes nowhere, and a browser connects to where a link leads before it is followed.
def _is_allowed(tag: str, name: str, value: str) -> bool:
    if tag == "img" and name == "src":
        return bool(re.match(r"data:image/(png|jpeg|gif|webp|svg\+xml)[;,]", value))
    return name in _ATTRIBUTES or name in _MORE.get(tag, ())


class Renderer:
    """Renders cells with nbconvert's template of JupyterLab; no script and no address survives."""

    def __init__(self) -> None:
        self._exporter = HTMLExporter(
            config=Config({"NbConvertBase": {"display_data_priority": list(_KINDS)}}),
            template_name="lab",
            template_file="base.html.j2",
            sanitize_html=True,
            exclude_input_prompt=True,
            exclude_output_prompt=True,
            exclude_anchor_links=True,
            log=_SILENT,
        )
        self._exporter.register_preprocessor(CoalesceStreamsPreprocessor, enabled=True)
        self._cleaner = bleach.Cleaner(
            tags=frozenset(_TAGS),
            attributes=_is_allowed,
            protocols=frozenset({"data"}),
            css_sanitizer=CSSSanitizer(),
            strip=True,
        )
        # nbconvert's own knows no table headings.
        self._exporter.register_filter("clean_html", self._clean)

    def _clean(self, text: object) -> str:
        soup = BeautifulSoup(
            text.decode() if isinstance(text, bytes) else str(text), features="html.parser"
        )
        for element in soup(_DROPPED):
            element.decompose()
        return str(self._cleaner.clean(str(soup)))

    def render(self, code: str, outputs: list[dict[str, Any]]) -> str:
        """Return the HTML of a cell, for a document's body."""
        shown = []
        for output in outputs:
            output.pop("transient", None)
            if "data" in output:
                output["data"] = {
                    kind: output["data"][kind] for kind in _KINDS if kind in output["data"]
                }
            shown.append(nbformat.from_dict(output))
        cell = nbformat.v4.new_code_cell(code, outputs=shown)
        metadata = {"language_info": {"name": "python", "pygments_lexer": "ipython3"}}
        notebook = nbformat.v4.new_notebook(cells=[cell], metadata=metadata)
        body, _ = self._exporter.from_notebook_node(notebook)
        return str(body)

    def style(self) -> str:
        """Return the style sheet of the documents."""
        _, resources = self._exporter.from_notebook_node(nbformat.v4.new_notebook())
        loader = self._exporter.environment.loader
        names = ("static/theme-light.css", "static/index.css")
        sheets = [loader.get_source(self._exporter.environment, name)[0] for name in names]
        return "\n".join([*sheets, *resources["inlining"]["css"], _OWN_STYLE])


_OWN_STYLE = """
html, body { margin: 0; height: auto; overflow-y: hidden; background: #fff; }
body.jp-Notebook { padding: 0; }
.jp-Cell { padding: 2px 0 2px 8px; }
.jp-Collapser { display: none; }
.jp-OutputArea-output { overflow-x: auto; padding-left: 0; }
.jp-OutputArea-output img { max-width: 100%; height: auto; }
.jp-InputArea-editor { overflow-x: auto; }
"""
