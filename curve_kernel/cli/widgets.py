"""The last state of widgets as text: a page without scripts can show no more of them."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from typing import Any

__all__ = ["Widgets"]

_VIEW = "application/vnd.jupyter.widget-view+json"
_REFERENCE = "IPY_MODEL_"
_MODELS = 2000
_DEPTH = 8
_TEXT = 4000
_BAR = 30


class Widgets:
    """The states of a kernel's widgets, fed with its comm messages."""

    def __init__(self) -> None:
        self._states: dict[str, dict[str, Any]] = {}

    def take(self, kind: str, content: dict[str, Any]) -> bool:
        """Take in a comm message; tell whether it changed a widget."""
        model, data = str(content["comm_id"]), content["data"]
        state = data.get("state")
        if not isinstance(state, dict):
            return False
        if kind == "comm_open":
            if content.get("target_name") != "jupyter.widget":
                return False
            self._states[model] = {}
            while len(self._states) > _MODELS:
                del self._states[next(iter(self._states))]
        if model not in self._states:
            return False
        self._states[model].update(
            {str(name): value for name, value in state.items() if _is_small(value)}
        )
        return True

    @staticmethod
    def is_widget(output: dict[str, Any]) -> bool:
        """Whether an output shows a widget."""
        return _VIEW in (output.get("data") or {})

    def make_static(self, output: dict[str, Any]) -> None:
        """Replace a widget in *output* by its state, as text, if it is known."""
        if self.is_widget(output):
            view = output["data"].pop(_VIEW)
            model = view.get("model_id") if isinstance(view, dict) else None
            output["data"].pop("text/html", None)
            if model in self._states:
                output["data"] = {"text/plain": "\n".join(self._lines(model, 0))[:_TEXT]}

    def _lines(self, model: str, depth: int) -> Iterator[str]:
        state = self._states.get(model, {})
        kind = str(state.get("_model_name", ""))
        children = state.get("children")
        if isinstance(children, (list, tuple)):
            if depth > _DEPTH:
                return
            inner = [
                " ".join(self._lines(child.removeprefix(_REFERENCE), depth + 1))
                for child in children[:100]
                if isinstance(child, str)
            ]
            if kind.startswith("HBox"):
                yield " ".join(filter(None, inner))
            else:
                yield from filter(None, inner)
            return
        yield _line(kind, state)


def _line(kind: str, state: dict[str, Any]) -> str:
    value, description = state.get("value"), str(state.get("description") or "")
    if "Progress" in kind:
        return f"{description} {_bar(value, state.get('min', 0), state.get('max', 1))}".strip()
    labels = state.get("_options_labels")
    if isinstance(labels, (list, tuple)) and isinstance(state.get("index"), int):
        value = labels[state["index"]] if 0 <= state["index"] < len(labels) else ""
    if "Button" in kind and value is None:
        return f"[{description}]"
    text = "" if value is None else str(value)
    if kind.startswith("HTML"):
        text = html.unescape(re.sub(r"<[^<>]{0,1000}>", "", text))
    return f"{description} {text}".strip()


def _bar(value: Any, low: Any, high: Any) -> str:
    try:
        share = min(max((float(value) - float(low)) / (float(high) - float(low)), 0), 1)
    except (TypeError, ValueError, ZeroDivisionError):
        return ""
    full = round(share * _BAR)
    return f"|{'█' * full}{' ' * (_BAR - full)}| {share:.0%}"


def _is_small(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) <= 1000 and all(isinstance(one, (str, int, float)) for one in value)
    return value is None or (isinstance(value, (str, int, float)) and len(str(value)) <= _TEXT)
