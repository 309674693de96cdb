"""The last state of widgets as text: a page without scripts can show no more of them."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from typing import Any

__all__ = ["Widgets"]

_VIEW = "application/vnd.jupyter.widget-view+json"
_REFERENCE = "IPY_MODEL_"
# What one kernel may make its watchers keep: models, what each has, and characters in all.
_MODELS = 2000
_FIELDS = 200
_NAME = 200
_TEXT = 4000
_LIST = 1 << 16
_TOTAL = 1 << 24
# And show: a box may hold boxes, and each of them a hundred times.
_SHOWN = 1000
_DEPTH = 8
_BAR = 30


class Widgets:
    """The states of a kernel's widgets, fed with its comm messages."""

    def __init__(self) -> None:
        self._states: dict[str, dict[str, Any]] = {}
        self._sizes: dict[str, int] = {}

    def take(self, kind: str, content: dict[str, Any]) -> bool:
        """Take in a comm message; tell whether it changed a widget."""
        model, data = str(content["comm_id"]), content["data"]
        state = data.get("state")
        if not isinstance(state, dict) or len(model) > _NAME:
            return False
        if kind == "comm_open":
            if content.get("target_name") != "jupyter.widget":
                return False
            self._states[model] = {}
            if len(self._states) > _MODELS:
                self._forget_first()
        if (known := self._states.get(model)) is None:
            return False
        for name, value in state.items():
            if (name in known or len(known) < _FIELDS) and len(name) <= _NAME and _is_small(value):
                known[name] = value
        self._sizes[model] = sum(len(name) + _size(value) for name, value in known.items())
        while sum(self._sizes.values()) > _TOTAL:
            self._forget_first()
        return True

    def _forget_first(self) -> None:
        model = next(iter(self._states))
        del self._states[model]
        self._sizes.pop(model, None)

    @staticmethod
    def is_widget(output: dict[str, Any]) -> bool:
        """Whether an output shows a widget."""
        return _VIEW in (output.get("data") or {})

    def make_static(self, outputs: list[dict[str, Any]]) -> None:
        """Replace each widget in *outputs* by its state, as text, if it is known."""
        budget = iter(range(_SHOWN))
        for output in filter(self.is_widget, outputs):
            view = output["data"].pop(_VIEW)
            model = view.get("model_id") if isinstance(view, dict) else None
            output["data"].pop("text/html", None)
            if isinstance(model, str) and model in self._states:
                text = "\n".join(self._lines(model, 0, budget))
                output["data"] = {"text/plain": text[:_TEXT]}

    def _lines(self, model: str, depth: int, budget: Iterator[int]) -> Iterator[str]:
        if next(budget, None) is None:
            return
        state = self._states.get(model, {})
        kind = str(state.get("_model_name", ""))
        children = state.get("children")
        if isinstance(children, (list, tuple)):
            if depth > _DEPTH:
                return
            inner = [
                " ".join(self._lines(child.removeprefix(_REFERENCE), depth + 1, budget))
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
        full = round(share * _BAR)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return ""
    return f"|{'█' * full}{' ' * (_BAR - full)}| {share:.0%}"


def _is_small(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        plain = all(isinstance(one, (str, int, float)) for one in value)
        return plain and len(value) <= 1000 and _size(value) <= _LIST
    return value is None or (isinstance(value, (str, int, float)) and _size(value) <= _TEXT)


def _size(value: Any) -> int:
    """How many characters *value* is."""
    return sum(map(_size, value)) if isinstance(value, (list, tuple)) else len(str(value))
