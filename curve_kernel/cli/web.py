"""``watch --web``: serves what a kernel shows as a page, on loopback, to whoever has the token.

What a kernel prints is hostile until shown otherwise. Each cell is a document of its own, in a frame
with no origin (``sandbox``), cleaned by `render`, under a policy (CSP) by which it loads nothing, runs
no script but the one that tells its height, and goes nowhere. The page itself only shows text.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import threading
from collections.abc import Callable
from functools import lru_cache
from importlib import resources
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.iostream import IOStream, StreamClosedError
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

from ..errors import CurveKernelError
from .page import Page
from .render import Renderer

__all__ = ["WebServer"]

_ADDRESS = "127.0.0.1"
_INTERVAL = 0.1
_KEEP_ALIVE = 15.0
# What whoever reaches the port, with the token or without, may take: bytes of each connection, seconds
# for a request, and connections.
_LIMITS = {
    "max_body_size": 1 << 10,
    "max_buffer_size": 1 << 16,
    "idle_connection_timeout": 60.0,
    "body_timeout": 10.0,
}
_CONNECTIONS = 500

_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; frame-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_CELL_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'nonce-{nonce}';"
    " style-src 'unsafe-inline' http://{host}/cell.css; img-src data:; base-uri 'none';"
    " form-action 'none'; frame-ancestors http://{host}"
)
_CELL = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>A cell</title><link rel="stylesheet" href="/cell.css">
<script nonce="{nonce}">
addEventListener("DOMContentLoaded", () => {{
  const cell = document.getElementById("cell");
  const tell = () => parent.postMessage({{height: cell.getBoundingClientRect().height}}, "*");
  new ResizeObserver(tell).observe(cell);
  addEventListener("load", tell);
}});
</script></head>
<body class="jp-Notebook" data-jp-theme-light="true"><div id="cell">{body}</div></body></html>"""


class WebServer:
    """Serves a page in a thread of its own.

    Parameters
    ----------
    page : Page
        What to show.
    port : int
        The port; 0 is any that is free.

    Raises
    ------
    CurveKernelError
        If the port can't be had.
    """

    def __init__(self, page: Page, port: int = 0) -> None:
        self.token = secrets.token_urlsafe(24)
        self._renderer = Renderer()
        try:
            if not 0 <= port < 1 << 16:
                raise OverflowError("ports end at 65535")
            self._sockets = bind_sockets(port, _ADDRESS)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CurveKernelError(
                f"port {port} can't be had: {reason}", "choose another --port, or leave it out"
            ) from None
        self.port = self._sockets[0].getsockname()[1]
        self._page = page
        self._thread = threading.Thread(target=self._run, name="watch --web", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """The page's address, with the token."""
        return f"http://{_ADDRESS}:{self.port}/?token={self.token}"

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        shared = {"server": self, "page": self._page, "renderer": self._renderer}
        application = Application(
            [
                (r"/", _PageHandler, shared),
                (r"/events", _EventsHandler, shared),
                (r"/cell/([A-Za-z0-9_-]{1,64})/[0-9]{1,20}", _CellHandler, shared),
                (r"/(page\.css|page\.js|cell\.css)", _StaticHandler, shared),
            ],
            default_handler_class=_NothingHandler,
            default_handler_args=shared,
            log_function=lambda _: None,  # addresses hold the token
        )
        # What strangers send would stand on the terminal.
        logging.getLogger("tornado").addHandler(logging.NullHandler())
        logging.getLogger("tornado").propagate = False
        _BoundedServer(application, **_LIMITS).add_sockets(self._sockets)
        await asyncio.Event().wait()


class _BoundedServer(HTTPServer):
    """Closes connections that are too many, rather than run out of open files."""

    _held = 0

    def handle_stream(self, stream: IOStream, address: Any) -> None:
        if self._held >= _CONNECTIONS:
            stream.close()
            return
        self._held += 1
        super().handle_stream(stream, address)

    def on_close(self, server_conn: Any) -> None:
        self._held -= 1
        super().on_close(server_conn)


class _Handler(RequestHandler):
    """Answers requests for this host only, in ways that no other page can use."""

    def initialize(self, server: WebServer, page: Page, renderer: Renderer) -> None:
        self.server, self.page, self.renderer = server, page, renderer

    def set_default_headers(self) -> None:
        for name, value in (
            ("Cache-Control", "no-store"),
            ("Content-Security-Policy", _PAGE_POLICY),
            ("Referrer-Policy", "no-referrer"),
            ("X-Content-Type-Options", "nosniff"),
            ("X-DNS-Prefetch-Control", "off"),
        ):
            self.set_header(name, value)
        self.clear_header("Server")

    def prepare(self) -> None:
        # A name that somebody else lets point here (DNS rebinding) is not this host.
        if self.request.host not in (f"{_ADDRESS}:{self.server.port}", f"localhost:{self.server.port}"):
            self.refuse("403: this page is at 127.0.0.1 only")

    def refuse(self, text: str, status: int = 403) -> None:
        self.set_status(status)
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(f"{text}\n")

    def has_token(self) -> bool:
        """Whether the request has the token; if not, it is answered."""
        given = self.get_query_argument("token", "")
        if secrets.compare_digest(given.encode(), self.server.token.encode()):
            return True
        self.refuse("403: open the whole address that `watch --web` prints, with its token")
        return False


class _NothingHandler(_Handler):
    def get(self) -> None:
        self.refuse("404: there is nothing here", 404)


class _PageHandler(_Handler):
    def get(self) -> None:
        if self.has_token():
            self.finish(_static("page.html"))


class _StaticHandler(_Handler):
    def get(self, name: str) -> None:
        kind = "text/javascript" if name.endswith(".js") else "text/css"
        self.set_header("Content-Type", f"{kind}; charset=utf-8")
        self.set_header("Cache-Control", "max-age=3600")
        self.finish(_style(self.renderer.style) if name == "cell.css" else _static(name))


class _EventsHandler(_Handler):
    async def get(self) -> None:
        """Send what changes, as server-sent events; a browser connects again by itself."""
        if not self.has_token():
            return
        self.set_header("Content-Type", "text/event-stream")
        last = self.request.headers.get("Last-Event-ID", "0")
        since, silence = int(last) if last.isascii() and last.isdecimal() else 0, 0.0
        try:
            while True:
                sequence = self.page.sequence
                if sequence != since:
                    change = json.dumps(self.page.changes(since if since < sequence else 0))
                    self.write(f"id: {sequence}\ndata: {change}\n\n")
                    since, silence = sequence, 0.0
                elif silence > _KEEP_ALIVE:
                    self.write(": still here\n\n")
                    silence = 0.0
                await self.flush()
                await asyncio.sleep(_INTERVAL)
                silence += _INTERVAL
        except StreamClosedError:
            pass


class _CellHandler(_Handler):
    def get(self, secret: str) -> None:
        found = self.page.find(secret)
        if found is None:
            self.refuse("404: this cell is not kept any more", 404)
            return
        try:
            body = self.renderer.render(*found)
        except Exception:  # noqa: BLE001  a kernel may send what no library expects
            body = "<p>This cell can't be shown.</p>"
        nonce = secrets.token_urlsafe(16)
        policy = _CELL_POLICY.format(nonce=nonce, host=self.request.host)
        self.set_header("Content-Security-Policy", policy)
        self.finish(_CELL.format(nonce=nonce, body=body))


@lru_cache
def _static(name: str) -> bytes:
    return resources.files(__package__).joinpath("static", name).read_bytes()


@lru_cache
def _style(make: Callable[[], Any]) -> str:
    return str(make())
