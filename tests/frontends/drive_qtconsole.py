"""Run the Qt console as ``jupyter qtconsole`` does, with keys typed into its window.

Takes how long to wait for each text, then lines to type and texts to wait for, then the console's own
options: ``SECONDS LINE TEXT LINE TEXT ... -- OPTIONS``. The line INTERRUPT is the menu's entry.
"""

import sys

from qtconsole.qtconsoleapp import JupyterQtConsoleApp
from qtpy.QtCore import Qt
from qtpy.QtTest import QTest

end = sys.argv.index("--")
app = JupyterQtConsoleApp()
app.initialize(sys.argv[end + 1 :])
window = app.widget._control


def wait(text: str) -> None:
    for _ in range(int(sys.argv[1]) * 20):
        if text in window.toPlainText():
            return
        QTest.qWait(50)
    sys.exit(f"no {text!r} in the window:\n{window.toPlainText()}")


wait("In [")  # a kernel that runs already has a higher number
for line, text in zip(sys.argv[2:end:2], sys.argv[3:end:2], strict=True):
    if line == "INTERRUPT":
        app.widget.request_interrupt_kernel()
    else:
        QTest.keyClicks(window, line)
        QTest.keyClick(window, Qt.Key.Key_Return)
    wait(text)
print(window.toPlainText())
app.kernel_client.stop_channels()
if app.kernel_manager:
    app.kernel_manager.shutdown_kernel(now=True)
