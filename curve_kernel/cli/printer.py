"""What a kernel says, on a terminal: what ``watch`` prints, and the filter for it and ``console``."""

from __future__ import annotations

import re
import sys
from typing import Any

from jupyter_client.session import Session
from pygments import highlight
from pygments.formatters import TerminalFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from .whose import whose

__all__ = ["CleanSession", "Printer", "clean"]

# What the kernel's user prints must not steer the terminal of who reads it: of all control characters
# only those for text pass, and of all sequences only those for color and for clearing the line.
_KEPT = r"\x1b\[[0-9;:]*m|\x1b\[[0-2]?K"
_CONTROL = re.compile(rf"({_KEPT})|\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def clean(value: Any) -> Any:
    """Return a message's content, or a part of it, without what steers a terminal in its texts."""
    match value:
        case str():
            return _CONTROL.sub(lambda match: match[1] or "", value)
        case dict():
            return {name: clean(part) for name, part in value.items()}
        case list():
            return list(map(clean, value))
    return value


class CleanSession(Session):
    """Lets nothing through that steers a terminal, in whatever message it comes."""

    def deserialize(self, msg_list: list[Any], content: bool = True, copy: bool = True) -> Any:
        """Return the message that the frames are, with its texts cleaned."""
        message: dict[str, Any] = super().deserialize(msg_list, content, copy)
        return {**message, "content": clean(message["content"])}


class Printer:
    """Prints iopub messages."""

    _SEQUENCE = re.compile(_KEPT)

    def __init__(self, *, color: bool) -> None:
        self._color = color
        self._lexer: Any = None
        self._at_line_start = True

    def note(self, text: str) -> None:
        """Print a line of this program's own."""
        self._lines(f"[{text}]", "2")

    def show(self, message: dict[str, Any]) -> None:
        """Print what *message* has for a person."""
        content = message["content"]
        match message["msg_type"]:
            case "execute_input":
                label = f"{whose(message)} In [{content['execution_count']}]: ".lstrip()
                self._label(label, "32", content["code"])
                self._lines(self._highlighted(content["code"]))
            case "stream":
                self._write(content["text"], "31" if content["name"] == "stderr" else "")
            case "execute_result":
                label = f"Out[{content['execution_count']}]: "
                self._label(label, "31", str(content["data"].get("text/plain", "")))
                self._data(content["data"])
            case "display_data" | "update_display_data":
                self._data(content["data"])
            case "error":
                self._lines("\n".join(content["traceback"]))

    def _label(self, label: str, color: str, text: str) -> None:
        self._lines("")
        self._write(label + ("\n" if "\n" in text else ""), color)
        self._at_line_start = True

    def _data(self, data: dict[str, Any]) -> None:
        if "text/plain" in data:
            self._lines(str(data["text/plain"]))
        for kind, value in data.items():
            if kind.startswith("image/"):
                # Binary images are Base64: four characters for three bytes.
                size = len(value) if "svg" in kind else len(value) * 3 // 4
                self._lines(f"[{kind}, {max(size // 1024, 1)} KiB]", "2")

    def _highlighted(self, code: str) -> str:
        if not self._color:
            return code
        try:
            self._lexer = self._lexer or get_lexer_by_name("ipython3")
        except ClassNotFound:
            self._lexer = get_lexer_by_name("python3")
        return str(highlight(code, self._lexer, TerminalFormatter()))

    def _lines(self, text: str, color: str = "") -> None:
        start = "" if self._at_line_start else "\n"
        self._write(start + (text.rstrip("\n") + "\n" if text else ""), color)

    def _write(self, text: str, color: str = "") -> None:
        text = clean(text)
        if not self._color:
            text = self._SEQUENCE.sub("", text)
        elif color:
            text = f"\x1b[{color}m{text}\x1b[0m"
        sys.stdout.write(text)
        sys.stdout.flush()
        plain = self._SEQUENCE.sub("", text)
        if plain:
            self._at_line_start = plain.endswith("\n")
