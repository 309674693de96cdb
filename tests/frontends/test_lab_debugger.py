"""JupyterLab's debugger, the same steps with this kernel and with ipykernel's own."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from attacker import attacker, listeners, reachable
from support import listening_ports

pytest.importorskip("playwright")
from browser import CHROMIUM, Lab, browser_page, jupyter_server
from playwright.sync_api import Locator, WebSocket, expect

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium"),
    pytest.mark.flaky(reruns=2),
]

# What a kernel of each kind is started with, and the name of its tile.
KERNELS = {
    "python3-curve": ("curve_kernel", "Python 3 (CurveZMQ)"),
    "python3": ("ipykernel_launcher", "Python 3 (ipykernel)"),
}
MESSAGE_ID = re.compile(rb'"msg_id": *"([^"]+)"')
HELPERS = """def add(first, second):
    both = [first, second]
    return sum(both)
"""
DEFINITIONS = """import helpers
class Rich:
    def _repr_html_(self): return '<b>rich</b> indeed'
def double(value):
    parts = {'once': value, 'rich': Rich()}
    rich = parts['rich']
    return value + parts['once']"""
LOOP = """total = 10
for n in range(2):
    total = double(total)
    total = helpers.add(total, n)
print('total is', total)"""
RAISES = """def fail():
    raise ValueError('on purpose')
try:
    fail()
except ValueError:
    print('caught it')"""


class Debugger:
    """The debugger's panels in one JupyterLab page."""

    def __init__(self, lab: Lab, kernel: str) -> None:
        self.lab, self.page, self.kernel = lab, lab.page, kernel
        self.shots = 0
        self.frames = self.page.locator(".jp-DebuggerCallstackFrame")
        self.breakpoints = self.page.locator(".jp-DebuggerBreakpoint")
        self.overlay = self.page.get_by_text("Paused in Debugger")
        # The module's source, which JupyterLab opens next to the notebook when the debugger enters it.
        self.source = self.page.locator(
            '#jp-main-dock-panel .jp-CodeMirrorEditor[data-jp-debugger="true"]'
        )

        self.asked = 0
        self.unanswered: set[bytes] = set()
        self.page.on("websocket", self._watch)

    def _watch(self, websocket: WebSocket) -> None:
        def sent(frame: str | bytes) -> None:
            if isinstance(frame, bytes) and b'"debug_request"' in frame:
                self.asked += 1
                self.unanswered |= set(MESSAGE_ID.findall(frame))

        def received(frame: str | bytes) -> None:
            if isinstance(frame, bytes) and b'"debug_reply"' in frame:
                self.unanswered -= set(MESSAGE_ID.findall(frame))

        websocket.on("framesent", sent)
        websocket.on("framereceived", received)

    def settle(self) -> None:
        """Wait until JupyterLab asks the debugger for nothing more.

        When the notebook comes to the front, it asks for the breakpoints, and forgets those that are
        set in the meantime.
        """
        deadline = time.monotonic() + 20
        quiet = 0
        while quiet < 2:
            assert time.monotonic() < deadline, self.unanswered
            asked = self.asked
            self.page.wait_for_timeout(50)
            quiet = quiet + 1 if asked and asked == self.asked and not self.unanswered else 0

    def step(self, what: str) -> None:
        """Take a picture, and look at the ports."""
        self.shots += 1
        self.lab.screenshot(f"debugger-{self.kernel}-{self.shots:02}-{what}")
        if self.kernel == "python3-curve":
            assert len(listening_ports(self.pid())) == 6, what

    def pid(self) -> int:
        pids = []
        for process in psutil.process_iter(["cmdline"]):
            with contextlib.suppress(psutil.NoSuchProcess):
                if KERNELS[self.kernel][0] in (process.info["cmdline"] or []):
                    pids += [process.pid] * (process.environ()["HOME"] == os.environ["HOME"])
        [pid] = pids
        return pid

    def toggle(self, *, on: bool) -> None:
        self.settle()
        self.page.locator(".jp-NotebookPanel:visible .jp-DebuggerBugButton").click()
        notebook = self.page.locator('.jp-NotebookPanel:visible[data-jp-debugger="true"]')
        expect(notebook).to_have_count(1 if on else 0)

    def command(self, name: str) -> None:
        button = self.page.locator(f'[data-command="debugger:{name}"]:visible').first
        expect(button).to_be_enabled()
        button.click()

    def gutter(self, editor: Locator, line: int) -> Locator:
        # The first element of the gutter is a spacer.
        return editor.locator(".cm-breakpoint-gutter.cm-gutter .cm-gutterElement").nth(line)

    def set_breakpoint(self, editor: Locator, line: int) -> None:
        icon = self.gutter(editor, line).locator(".cm-breakpoint-icon")
        for _ in range(3):
            self.settle()
            self.gutter(editor, line).click()
            expect(icon).to_be_visible()
            self.settle()
            # JupyterLab may take it back when it comes round to what was edited a second before.
            self.page.wait_for_timeout(500)
            if icon.count():
                return
        raise AssertionError("the breakpoint does not stay")

    def clear_breakpoint(self, editor: Locator, line: int) -> None:
        self.settle()
        self.gutter(editor, line).click()
        expect(self.gutter(editor, line).locator(".cm-breakpoint-icon")).to_have_count(0)

    def rerun(self, cell: Locator) -> None:
        """Run a cell again, where it is."""
        cell.locator(".cm-content").click()
        self.page.keyboard.press("Control+Enter")

    def runs_through(self, cell: Locator) -> None:
        """Run a cell again, where nothing stops it."""
        prompt = cell.locator(".jp-InputPrompt")
        before = re.escape(prompt.inner_text())
        self.rerun(cell)
        expect(prompt).to_have_text(re.compile(rf"^(?!{before})\[\d+\]:$"))
        self.lab.wait_idle()
        expect(self.overlay).to_have_count(0)

    def says(self, locator: Locator, text: str) -> None:
        """Wait for a text; playwright's own waiting looks once a second only."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if [found.strip() for found in locator.all_text_contents()] == [text.strip()]:
                break
            self.page.wait_for_timeout(50)
        expect(locator).to_have_text(text)

    def stops(self, name: str, where: str, line: int, code: str) -> None:
        """Wait until the debugger stands in front of *code*."""
        self.says(self.page.locator(".jp-DebuggerEditor-highlight:visible"), code)
        # The notebook, with its overlay, may be behind the tab of a module's source.
        expect(self.overlay).to_be_attached()
        top = self.frames.first
        self.says(top.locator(".jp-DebuggerCallstackFrame-name"), name)
        location = top.locator(".jp-DebuggerCallstackFrame-location")
        expect(location).to_have_text(re.compile(rf"{re.escape(where)}:{line}$"))

    def goes_on(self, cell: Locator, output: str) -> None:
        self.command("continue")
        self.ends(cell, output)

    def ends(self, cell: Locator, output: str) -> None:
        self.says(cell.locator(".jp-OutputArea-output"), output)
        expect(self.overlay).to_have_count(0)
        # JupyterLab closes it a second later.
        expect(self.source).to_have_count(0)
        self.lab.wait_idle()

    def close_tab(self, title: str) -> None:
        tab = self.page.locator("#jp-main-dock-panel .lm-TabBar-tab", has_text=title)
        tab.locator(".lm-TabBar-tabCloseIcon").click()
        expect(tab).to_have_count(0)

    def variable(self, name: str) -> Locator:
        label = self.page.locator(".jp-DebuggerVariables-name", has_text=re.compile(f"^{name}$"))
        return self.page.locator(".jp-DebuggerVariables .jp-TreeItem").filter(has=label).last

    def shows(self, **variables: str) -> None:
        for name, value in variables.items():
            self.says(self.variable(name).locator("> .jp-DebuggerVariables-detail"), value)


@pytest.fixture(autouse=True)
def _patience() -> Iterator[None]:
    expect.set_options(timeout=20_000)
    yield
    expect.set_options(timeout=5_000)


@pytest.mark.parametrize("kernel", KERNELS)
def test_debugger(tmp_path, kernel):
    folder, log = tmp_path / "notebooks", tmp_path / "server.log"
    folder.mkdir()
    (folder / "helpers.py").write_text(HELPERS)
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(jupyter_server(folder, log))
        page = stack.enter_context(browser_page())
        lab = Lab(page, address)
        debugger = Debugger(lab, kernel)
        if kernel == "python3-curve" and os.geteuid() == 0:
            # There before the kernel is, and until all is over. Stock would not survive it.
            stack.enter_context(undisturbed(tmp_path))
        lab.open_notebook(KERNELS[kernel][1])
        lab.run(DEFINITIONS)
        cell = lab.run(LOOP, "total is 41")
        lab.type_cell(RAISES)
        debugger.toggle(on=True)
        debugger.step("on")
        steps(debugger, cell)
        panels(debugger, cell)
        exceptions(debugger, lab.cells.last)
        off_and_on(debugger, cell)
        terminate(debugger, cell)
        restart(debugger, cell)


@contextlib.contextmanager
def undisturbed(tmp_path: Path) -> Iterator[None]:
    """Whatever happens inside, an attacker of another user tries to be part of it, and gets nothing."""
    reachable(tmp_path)
    with attacker(tmp_path, listeners(), rounds=30, seconds=200) as (marker, notes):
        yield
        text = notes.read_bytes()
    assert not marker.exists()
    # The kernel's six ports, and after the restart six new ones.
    assert len(set(re.findall(rb"port (\d+): ", text))) >= 6
    assert text.count(b"CURVE") > 100
    for what in (b"a token is in", b"it failed", b"success", b"pydevd", b"NULL"):
        assert what not in text


def steps(debugger: Debugger, cell: Locator) -> None:
    """Breakpoints in a cell and in a module; over, into and out of functions of both."""
    debugger.set_breakpoint(cell, 3)
    expect(debugger.breakpoints).to_have_count(1)
    debugger.rerun(cell)
    debugger.stops("<module>", "Cell [*]", 3, "    total = double(total)")
    debugger.shows(total="10", n="0")
    debugger.step("breakpoint")

    debugger.command("stepIn")
    debugger.stops("double", "Cell [1]", 5, "    parts = {'once': value, 'rich': Rich()}")
    debugger.shows(value="10")
    debugger.step("in-cell")
    debugger.command("next")
    debugger.stops("double", "Cell [1]", 6, "    rich = parts['rich']")
    debugger.shows(value="10", parts="dict")
    debugger.step("over-in-cell")
    debugger.command("stepOut")
    debugger.stops("<module>", "Cell [*]", 3, "    total = double(total)")
    debugger.step("out-of-cell")
    debugger.command("next")
    debugger.stops("<module>", "Cell [*]", 4, "    total = helpers.add(total, n)")
    debugger.shows(total="20", n="0")
    debugger.step("over")

    debugger.command("stepIn")
    debugger.stops("add", "helpers.py", 2, "    both = [first, second]")
    debugger.shows(first="20", second="0")
    debugger.step("in-module")
    debugger.set_breakpoint(debugger.source, 3)
    expect(debugger.breakpoints).to_have_count(2)
    debugger.step("breakpoint-in-module")
    debugger.command("continue")
    debugger.stops("add", "helpers.py", 3, "    return sum(both)")
    debugger.shows(first="20", second="0", both="list")
    debugger.step("breakpoint-in-module-hit")
    debugger.command("stepOut")
    debugger.stops("<module>", "Cell [*]", 4, "    total = helpers.add(total, n)")
    debugger.step("out-of-module")
    debugger.command("continue")
    debugger.stops("<module>", "Cell [*]", 3, "    total = double(total)")
    debugger.shows(total="20", n="1")
    debugger.clear_breakpoint(cell, 3)
    debugger.step("second-round")
    debugger.command("continue")
    debugger.stops("add", "helpers.py", 3, "    return sum(both)")
    debugger.shows(first="40", second="1", both="list")
    debugger.clear_breakpoint(debugger.source, 3)
    expect(debugger.breakpoints).to_have_count(0)
    debugger.step("second-round-in-module")
    debugger.goes_on(cell, "total is 41")
    debugger.step("went-on")


def panels(debugger: Debugger, cell: Locator) -> None:
    """The tree and the table of variables, a variable's rich view, and code for the frame."""
    page = debugger.page
    debugger.set_breakpoint(debugger.lab.cells.first, 7)
    debugger.rerun(cell)
    debugger.stops("double", "Cell [1]", 7, "    return value + parts['once']")
    debugger.shows(value="10", parts="dict", rich="Rich")
    debugger.variable("parts").click()
    debugger.shows(**{"'once'": "10"})
    debugger.step("tree")

    page.locator(".jp-TableView-Button:visible").click()
    grid = page.locator(".jp-DebuggerSidebar .jp-DebuggerVariables-grid")
    expect(grid).to_be_visible()
    debugger.step("table")
    # The table is a picture, in which the first row below the header is that of parts.
    grid.dblclick(position={"x": 30, "y": 34})
    inspected = page.locator("#jp-debugger-variable-parts")
    expect(inspected.locator(".jp-DebuggerVariables-grid")).to_be_visible()
    debugger.step("inspected")
    debugger.close_tab("Untitled.ipynb - parts")
    page.locator(".jp-TreeView-Button:visible").click()
    expect(grid).to_be_hidden()

    debugger.variable("rich").hover()
    page.get_by_title("Render variable: rich").click()
    rendered = page.locator(".jp-DebuggerRichVariable:visible")
    expect(rendered.locator(".jp-RenderedHTML")).to_have_text("rich indeed")
    debugger.step("rendered")
    debugger.close_tab("rich - Untitled.ipynb")

    debugger.command("evaluate")
    console = page.locator(".jp-DebugConsole")
    prompt = console.locator(".jp-CodeConsole-promptCell .cm-content")
    for code in ("value = 21", "value * 100"):
        prompt.click()
        page.keyboard.insert_text(code)
        page.keyboard.press("Shift+Enter")
        expect(prompt).not_to_contain_text("value")
    expect(console.locator(".jp-CodeConsole-content .jp-OutputArea").last).to_have_text("2100")
    debugger.step("evaluated")
    # JupyterLab has emptied the panel of variables.
    debugger.frames.first.click()
    debugger.shows(value="21")
    debugger.step("evaluated-variables")
    debugger.command("evaluate")
    expect(console).to_have_count(0)
    debugger.command("continue")
    debugger.stops("double", "Cell [1]", 7, "    return value + parts['once']")
    debugger.shows(value="31")
    debugger.clear_breakpoint(debugger.lab.cells.first, 7)
    debugger.goes_on(cell, "total is 63")
    debugger.step("evaluated-went-on")


def exceptions(debugger: Debugger, cell: Locator) -> None:
    """Stop where an exception is raised, and not if nobody asks for it."""
    page = debugger.page
    raised = page.locator(".jp-PauseOnExceptions-menu .lm-Menu-item", has_text="raised")
    page.locator(".jp-PauseOnExceptions:visible").click()
    debugger.step("exceptions-menu")
    raised.click()
    debugger.rerun(cell)
    debugger.stops("fail", "Cell [*]", 2, "    raise ValueError('on purpose')")
    debugger.step("exception")
    debugger.command("continue")
    debugger.stops("<module>", "Cell [*]", 4, "    fail()")
    debugger.step("exception-in-caller")
    debugger.goes_on(cell, "caught it")
    page.locator(".jp-PauseOnExceptions:visible").click()
    raised.click()
    debugger.runs_through(cell)
    debugger.step("exception-not-asked-for")


def off_and_on(debugger: Debugger, cell: Locator) -> None:
    """Off, on, off while the cell stands at a breakpoint, on."""
    for stopped in (False, True):
        debugger.set_breakpoint(cell, 5)
        if stopped:
            debugger.rerun(cell)
            debugger.stops("<module>", "Cell [*]", 5, "print('total is', total)")
        debugger.toggle(on=False)
        expect(debugger.breakpoints).to_have_count(0)
        if stopped:
            debugger.ends(cell, "total is 41")
        else:
            debugger.runs_through(cell)
        debugger.step("off")
        debugger.toggle(on=True)
        debugger.set_breakpoint(cell, 3)
        debugger.rerun(cell)
        debugger.stops("<module>", "Cell [*]", 3, "    total = double(total)")
        debugger.shows(total="10", n="0")
        debugger.step("on-again")
        debugger.clear_breakpoint(cell, 3)
        debugger.goes_on(cell, "total is 41")


def terminate(debugger: Debugger, cell: Locator) -> None:
    """The cell runs to its end, and the debugger comes back with its breakpoints."""
    debugger.set_breakpoint(cell, 5)
    for again in (False, True):
        debugger.rerun(cell)
        debugger.stops("<module>", "Cell [*]", 5, "print('total is', total)")
        debugger.shows(total="41", n="1")
        if again:
            debugger.clear_breakpoint(cell, 5)
            debugger.goes_on(cell, "total is 41")
        else:
            debugger.command("terminate")
            debugger.ends(cell, "total is 41")
            expect(debugger.breakpoints).to_have_count(1)
            debugger.step("terminated")
            debugger.settle()


def restart(debugger: Debugger, cell: Locator) -> None:
    """A new kernel, which is debugged as the one before."""
    page = debugger.page
    debugger.set_breakpoint(cell, 3)
    before = debugger.pid()
    debugger.lab.restart()
    assert debugger.pid() != before
    # What the old kernel has left unanswered.
    debugger.unanswered.clear()
    # JupyterLab turns the debugger on again, and sets the breakpoint.
    expect(debugger.variable("special variables")).to_be_visible()
    expect(debugger.variable("total")).to_have_count(0)
    expect(debugger.breakpoints).to_have_count(1)
    debugger.step("restarted")
    debugger.rerun(debugger.lab.cells.first)
    expect(debugger.variable("helpers")).to_be_visible()
    page.locator(".jp-Debugger-KernelSources-Filter input").fill("helpers")
    page.locator(".jp-DebuggerKernelSource-source", has_text=re.compile("^helpers$")).click()
    debugger.set_breakpoint(debugger.source, 2)
    debugger.step("restarted-sources")
    debugger.close_tab("helpers.py")
    debugger.rerun(cell)
    debugger.stops("<module>", "Cell [*]", 3, "    total = double(total)")
    debugger.shows(total="10", n="0")
    debugger.clear_breakpoint(cell, 3)
    debugger.step("restarted-breakpoint")
    debugger.command("continue")
    debugger.stops("add", "helpers.py", 2, "    both = [first, second]")
    debugger.shows(first="20", second="0")
    debugger.step("restarted-breakpoint-in-module")
    debugger.clear_breakpoint(debugger.source, 2)
    debugger.goes_on(cell, "total is 41")
    debugger.step("end")
