"""What ``watch --web`` shows: a kernel's cells, as they have become by now, within limits."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from .widgets import Widgets

__all__ = ["Item", "Page"]

# What one kernel may make its watchers keep.
_ITEMS = 300
_OUTPUTS = 200
_TEXT = 1 << 18
_DATA = 1 << 19
_METADATA = 1 << 16
_NAME = 200
_IMAGE = 1 << 23
_TOTAL = 1 << 26


@dataclass
class Item:
    """A cell with its outputs, or a note of the watcher's own.

    ``secret`` is its part of the address of its frame, which no other frame can know; ``changed`` is
    the number of the page's change that was its last.
    """

    key: int
    label: str = ""
    who: str = ""
    note: str = ""
    code: str = ""
    busy: bool = False
    outputs: list[dict[str, Any]] = field(default_factory=list)
    changed: int = 0
    secret: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    clear_next: bool = False

    @property
    def size(self) -> int:
        """How many characters it holds."""
        return len(self.code) + sum(map(_size, self.outputs))


class Page:
    """The cells of a kernel, fed with its messages in one thread and read in another.

    Parameters
    ----------
    name : str
        What the kernel is called.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._items: dict[str, Item] = {}  # by the id of the request
        self._widgets = Widgets()
        self._status = "nothing is known of the kernel yet"
        self._last_key = 0
        self._added = 0  # characters, since the last look at how many there are
        self.sequence = 1
        """The number of the last change."""

    def note(self, text: str) -> None:
        """Show a line of this program's own."""
        with self._lock:
            self._touch(self._new(f"note {self._last_key}", note=text))
            self._trim()

    def show(self, message: dict[str, Any]) -> None:
        """Take in a message from iopub."""
        with self._lock:
            self._take(message)

    def changes(self, since: int) -> dict[str, Any]:
        """Return what has changed after the change number *since*, as the page's script takes it."""
        with self._lock:
            items = [item for item in self._items.values() if item.changed > since]
            first = next(iter(self._items.values())).key if self._items else self._last_key + 1
            return {
                "name": self._name,
                "status": self._status,
                "first": first,
                "items": [_for_script(item) for item in sorted(items, key=lambda item: item.key)],
            }

    def find(self, secret: str) -> tuple[str, list[dict[str, Any]]] | None:
        """Return code and outputs of the cell with that secret, None if there is none (any more)."""
        with self._lock:
            for item in self._items.values():
                if not item.note and secrets.compare_digest(item.secret, secret):
                    outputs = deepcopy(item.outputs)
                    self._widgets.make_static(outputs)
                    return item.code, outputs
        return None

    def _take(self, message: dict[str, Any]) -> None:
        content, parent = message["content"], message["parent_header"]
        request = str(parent.get("msg_id", ""))[:_NAME]
        match message["msg_type"]:
            case "execute_input":
                item = self._item(request)
                item.label = f"In [{int(content['execution_count'])}]"
                who = str(parent.get("username", ""))[:80]
                item.who = "" if who == "username" else who  # what clients say that say nothing
                item.code = str(content["code"])[:_TEXT]
                item.busy = True
            case "status":
                self._status = f"the kernel is {str(content['execution_state'])[:20]}"
                found = self._items.get(request)
                self.sequence += 1
                if found is None or content["execution_state"] != "idle":
                    return
                item, item.busy = found, False
            case "stream":
                item = self._item(request)
                self._add_text(item, str(content["name"])[:_NAME], str(content["text"]))
            case "execute_result" | "display_data" | "error" as kind:
                item = self._item(request)
                self._add(item, {"output_type": kind, **_checked(kind, content)})
            case "update_display_data":
                self._update(_display_id(content), _checked("display_data", content))
                return
            case "clear_output":
                item = self._item(request)
                item.clear_next = bool(content.get("wait"))
                if not item.clear_next:
                    item.outputs.clear()
            case "comm_open" | "comm_msg" as kind:
                if self._widgets.take(kind, content):
                    for item in self._items.values():
                        if any(map(self._widgets.is_widget, item.outputs)):
                            self._touch(item)
                return
            case _:
                return
        self._touch(item)
        if len(self._items) > _ITEMS or self._added > _DATA:
            self._trim()

    def _item(self, request: str) -> Item:
        return self._items.get(request) or self._new(request, label="output")

    def _new(self, request: str, **fields: Any) -> Item:
        self._last_key += 1
        item = self._items[request] = Item(self._last_key, **fields)
        return item

    def _touch(self, item: Item) -> None:
        self.sequence += 1
        item.changed = self.sequence

    def _add(self, item: Item, output: dict[str, Any]) -> None:
        if item.clear_next:
            item.outputs.clear()
            item.clear_next = False
        item.outputs.append(output)
        self._added += _size(output)
        del item.outputs[:-_OUTPUTS]

    def _add_text(self, item: Item, name: str, text: str) -> None:
        last = item.outputs[-1] if item.outputs and not item.clear_next else {}
        if last.get("name") == name:
            last["text"] = (last["text"] + text)[-_TEXT:]
            self._added += len(text)
        else:
            self._add(item, {"output_type": "stream", "name": name, "text": text[-_TEXT:]})

    def _update(self, display_id: str, fields: dict[str, Any]) -> None:
        for item, output in self._shown(display_id):
            output.update(fields)
            self._added += _size(output)
            self._touch(item)
        if self._added > _DATA:
            self._trim()

    def _shown(self, display_id: str) -> Iterator[tuple[Item, dict[str, Any]]]:
        for item in self._items.values():
            for output in item.outputs:
                if display_id and _display_id(output) == display_id:
                    yield item, output

    def _trim(self) -> None:
        """Leave out the oldest items."""
        self._added = 0
        total = sum(item.size for item in self._items.values())
        while len(self._items) > _ITEMS or (total > _TOTAL and len(self._items) > 1):
            total -= self._items.pop(next(iter(self._items))).size


def _for_script(item: Item) -> dict[str, Any]:
    if item.note:
        return {"key": item.key, "note": item.note}
    fields = {name: getattr(item, name) for name in ("key", "label", "who", "busy")}
    return {**fields, "url": f"/cell/{item.secret}/{item.changed}"}


def _display_id(output: dict[str, Any]) -> str:
    return str((output.get("transient") or {}).get("display_id") or "")[:_NAME]


def _checked(kind: str, content: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an output in the form that nbformat has, each within its limit."""
    if kind == "error":
        lines = [str(line)[:_TEXT] for line in content["traceback"]][:_OUTPUTS]
        fields = {"ename": str(content["ename"])[:200], "evalue": str(content["evalue"])[:_TEXT]}
        return {**fields, "traceback": lines}
    data: dict[str, Any] = {}
    held = 0
    for mime, value in dict(content["data"]).items():
        text = "".join(value) if isinstance(value, list) and mime != "application/json" else value
        text = text if isinstance(text, str) or "json" in mime else str(text)
        size = len(text) if isinstance(text, str) else len(json.dumps(text))
        if size <= (_IMAGE if mime.startswith("image/") else _DATA):
            data[str(mime)] = text
            held += len(mime) + size
        else:
            data.setdefault(
                "text/plain", f"[{str(mime)[:80]}, {size >> 10} KiB: too large for this page]"
            )
    metadata = content.get("metadata")
    size = len(json.dumps(metadata))
    if not isinstance(metadata, dict) or size > _METADATA:
        metadata, size = {}, 0
    checked: dict[str, Any] = {
        "data": data,
        "metadata": metadata,
        "transient": {"display_id": _display_id(content), "size": held + size},
    }
    if kind == "execute_result":
        checked["execution_count"] = int(content["execution_count"])
    return checked


def _size(output: dict[str, Any]) -> int:
    texts = (output.get("text", ""), *output.get("traceback", ()))
    return int(output.get("transient", {}).get("size", 0)) + sum(map(len, texts))
