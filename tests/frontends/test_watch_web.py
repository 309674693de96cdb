"""``watch --web`` in a real browser: what it shows, to whom, and what a hostile output reaches."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import MODULE, check_error, headless, run_code, started

pytest.importorskip("playwright")
pytest.importorskip("nbconvert")
from browser import CHROMIUM, SCREENSHOTS, browser_page
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")

PLOT = "import matplotlib.pyplot as plt\nplt.figure(figsize=(5, 2)); plt.plot([1, 3, 2]); plt.show()"
TABLE = """from IPython.display import HTML, Markdown, display
class Frame:
    def _repr_html_(self):
        return ('<div><style scoped>.dataframe {color: red}</style><table border="1" class="dataframe">'
                '<thead><tr><th>epoch</th><th>loss</th></tr></thead>'
                '<tbody><tr><td>1</td><td>0.8341</td></tr></tbody></table></div>')
display(Markdown('# Training')); Frame()"""
PROGRESS = """import time
for n in range(21):
    print(f'\\r{n * 5} %', end='', flush=True); time.sleep(0.02)
print()"""
WIDGET = """import ipywidgets
bar = ipywidgets.IntProgress(value=1, max=10, description='Fit')
display(ipywidgets.HBox([ipywidgets.Label('epoch'), bar])); bar.value = 7"""


@contextlib.contextmanager
def watching(file: str, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [*MODULE, "watch", "--web", "--existing", file, *words]
    with subprocess.Popen(
        command, stdout=-1, stderr=-1, stdin=subprocess.DEVNULL, text=True
    ) as process:
        try:
            lines = iter(process.stdout.readline, "")
            url = next(found[0] for line in lines if (found := re.search(r"http://\S+", line)))
            yield process, url
        finally:
            process.terminate()
            process.communicate(timeout=20)


def status(url: str, **headers: str) -> int:
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def frame(page: Page, label: str):
    # The last: one that is being replaced is still there.
    return page.frame_locator(f'iframe[title="{label}"]:not(.next)')


def test_what_it_shows():
    subprocess.run([*MODULE, "keygen"], check=True, timeout=30, stdout=subprocess.DEVNULL)
    with (
        started("python3-curve") as (km, client),
        watching(km.connection_file) as (process, url),
        browser_page() as page,
    ):
        page.goto(url)
        expect(page.get_by_text("What the kernel runs from now on appears here.")).to_be_visible()
        for code in (PLOT, TABLE, PROGRESS, WIDGET, "print('\\x1b[31mred\\x1b[0m <b>'); 1 / 0"):
            run_code(client, code)
        expect(frame(page, "In [1]").locator("img")).to_be_visible()
        table = frame(page, "In [2]")
        expect(table.locator("th").first).to_have_text("epoch")
        expect(table.locator("h1")).to_have_text("Training")
        expect(table.locator(".jp-OutputArea")).not_to_contain_text("dataframe {")
        expect(frame(page, "In [3]").get_by_text("100 %", exact=True)).to_be_visible()
        expect(frame(page, "In [3]").locator(".jp-OutputArea")).not_to_contain_text("95 %")
        expect(frame(page, "In [4]").locator(".jp-OutputArea")).to_contain_text("epoch Fit |█")
        expect(frame(page, "In [4]").locator(".jp-OutputArea")).to_contain_text("70%")
        expect(frame(page, "In [5]").locator("body")).to_contain_text("red <b>")
        expect(frame(page, "In [5]").locator(".ansi-red-fg").first).to_be_visible()
        expect(frame(page, "In [5]").locator("body")).to_contain_text("ZeroDivisionError")
        expect(page.get_by_role("status")).to_have_text("the kernel is idle")

        # An output that changes later changes here too.
        run_code(client, "handle = display(HTML('<b>before</b>'), display_id=True)")
        expect(frame(page, "In [6]").locator("b", has_text="before")).to_be_visible()
        run_code(client, "handle.update(HTML('<b>after</b>'))")
        expect(frame(page, "In [6]").locator("b", has_text="after")).to_be_visible()

        # A page that comes later sees what was there.
        later = page.context.browser.new_page()
        later.goto(url)
        expect(frame(later, "In [2]").locator("th").first).to_have_text("epoch")
        later.close()

        keyboard(page)
        on_a_phone(page)

        # Whoever has no token gets nothing; nor does a page that lets a name of its own point here.
        bare = url.partition("?")[0]
        token = url.partition("=")[2]
        assert status(url) == 200
        assert status(bare) == status(f"{bare}?token=x") == status(f"{bare}events") == 403
        assert status(url, Host="evil.example") == 403
        assert status(f"{bare}cell/x/1") == 404
        source = page.locator("iframe").first.get_attribute("src")
        assert token not in source
        with urllib.request.urlopen(bare.rstrip("/") + source, timeout=10) as response:
            policy = response.headers["Content-Security-Policy"]
            assert re.search(
                r"^sandbox allow-scripts; default-src 'none'; script-src 'nonce-[\w-]+';", policy
            )

        km.restart_kernel()
        client.wait_for_ready(timeout=60)
        expect(page.get_by_text("the kernel was restarted")).to_be_visible()
        assert process.poll() is None


def keyboard(page: Page) -> None:
    cells = page.locator("article")
    page.keyboard.press("j")
    expect(cells.nth(0)).to_be_focused()
    page.keyboard.press("j")
    expect(cells.nth(1)).to_be_focused()
    expect(cells.nth(1)).to_have_attribute("aria-label", "In [2]")
    page.keyboard.press("k")
    expect(cells.nth(0)).to_be_focused()
    button = page.get_by_role("button", name="Follow the newest")
    expect(button).to_have_attribute("aria-pressed", "false")
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / "watch-web.png")
    button.focus()
    page.keyboard.press("Enter")
    expect(button).to_have_attribute("aria-pressed", "true")
    expect(cells.last).to_be_in_viewport()


def on_a_phone(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 720})
    assert page.evaluate("document.documentElement.scrollWidth <= 360")
    expect(page.get_by_role("button", name="Follow the newest")).to_be_in_viewport()
    page.locator("article").nth(1).scroll_into_view_if_needed()
    page.screenshot(path=SCREENSHOTS / "watch-web-phone.png")
    page.set_viewport_size({"width": 1280, "height": 800})


HOSTILE = [
    "<script>parent.document.title = 'hacked'; fetch('URL'); parent.postMessage('x', '*')</script>",
    "<img src=x onerror=\"fetch('URL')\"><img src='URL/i'><svg onload=\"fetch('URL')\"></svg>",
    "<iframe src='URL/f'></iframe><object data='URL/o'></object><embed src='URL/e'>",
    "<form action='URL/form' method=post><input name=a><button>Log in again</button></form>",
    "<meta http-equiv=refresh content='0;url=URL/m'><base href='URL/'>",
    "<link rel=stylesheet href='URL/c'>",
    "<link rel=preconnect href='URL'><link rel=dns-prefetch href='URL'><style>@import 'URL/s'</style>",
    "<div style=\"position: fixed; inset: 0; background: url('URL/b')\">over everything</div>",
    "<a href=\"javascript:fetch('URL')\">click</a> <a target=_top href='URL/top'>me</a>",
    "<video src='URL/v' autoplay></video><audio src='URL/a'></audio><img srcset='URL/ss 1x'>",
    "<svg><foreignObject><script>fetch('URL')</script></foreignObject><use href='URL/u'/></svg>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=x()&gt;'>",
    "<!-- <b>unclosed",
    "<textarea><plaintext>",
    "</div></div></body></html><script>fetch('URL')</script>",
    "<div>" * 3000,
]


@contextlib.contextmanager
def evil_server() -> Iterator[tuple[str, list[bytes]]]:
    """An address that no output may reach, and what came."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            with contextlib.suppress(OSError):
                while True:
                    peer, _ = server.accept()
                    heard.append(peer.recv(100))
                    peer.close()

        threading.Thread(target=listen, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", heard
        server.shutdown(socket.SHUT_RDWR)


def test_a_hostile_output_reaches_nothing():
    subprocess.run([*MODULE, "keygen"], check=True, timeout=30, stdout=subprocess.DEVNULL)
    with (
        evil_server() as (evil, heard),
        started("python3-curve") as (km, client),
        watching(km.connection_file) as (_, url),
        browser_page() as page,
    ):
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("dialog", lambda dialog: asked.append(dialog.message))
        page.goto(url)
        outputs = [text.replace("URL", evil) for text in HOSTILE]
        run_code(client, "from IPython.display import *")
        for text in outputs:
            run_code(client, f"display(HTML({text!r}))")
            run_code(client, f"display(Markdown({text!r}))")
            run_code(client, f"display(SVG(data={('<svg>' + text + '</svg>')!r}))")
            run_code(client, f"display(Javascript({text!r})); print({text!r})")
        run_code(client, "display(HTML('<p>huge</p>' * 2_000_000)); print('x' * 30_000_000)")
        run_code(client, "for n in range(3000): display(n)")
        run_code(client, "display({'text/html': 7, 'x': None, 'image/png': ['a', 'b']}, raw=True)")
        run_code(client, "print('still', 'here')")
        last = page.locator("article").last
        expect(
            page.frame_locator("article:last-child iframe:not(.next)").locator("body")
        ).to_contain_text("still here", timeout=60_000)
        expect(last).to_be_in_viewport()
        for n in range(page.locator("article").count()):
            page.locator("article").nth(n).scroll_into_view_if_needed()
        huge = page.locator("article").filter(has=page.locator("iframe[title]")).nth(-4)
        expect(huge).to_be_attached()

        assert page.title().startswith("Watching kernel-")
        assert page.url == url
        own = url.partition("?")[0]
        assert {address for address in asked if not address.startswith((own, "data:"))} == set()
        assert heard == []
        for one in page.locator("iframe").all():
            assert one.get_attribute("sandbox") == "allow-scripts"
            assert one.bounding_box()["height"] <= 2400
        # In its frame an output has no origin, no script of its own runs, and links lead nowhere.
        inner = [one for one in page.frames if one != page.main_frame]
        assert inner
        assert all(one.evaluate("origin") == "null" for one in inner[:5])
        assert not any(one.locator("a[href], area[href]").count() for one in inner)
        links = [one.get_by_text("me", exact=True) for one in inner]
        next(one for one in links if one.count()).first.click()
        page.wait_for_timeout(300)
        assert page.url == url
        assert heard == []


def test_wrong_uses(tmp_path):
    with headless() as (process, _):
        name = f"kernel-{process.pid}.json"
        file = str(Path(os.environ["JUPYTER_RUNTIME_DIR"], name))
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            for words, says, hint in (
                (("--web", "--port", port), f"port {port} can't be had: ", "another --port"),
                (("--web", "--port", "70000"), "port 70000 can't be had: ", "another --port"),
                (("--port", "8000"), "--port is the page's", "--web"),
                (("--web", "--prot", "1"), "there is no option --prot", "--port"),
            ):
                done = subprocess.run(
                    [*MODULE, "watch", file, *words], capture_output=True, text=True, timeout=60
                )
                assert (done.returncode, done.stdout) == (1, "")
                err = done.stderr.partition("identity.key\n")
                check_error(err[2] or err[0], says, hint)
