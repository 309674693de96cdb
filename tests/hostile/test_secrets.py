"""After a hard day: no secret key anywhere, and the HMAC key in the connection file only."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
from jupyter_client import KernelManager
from support import MODULE, connection_info, run_code, wait_for
from test_handshake import GREETINGS
from victim import victim
from zmtp import Peer, frame

from curve_kernel.client import AsyncKernelClient, BlockingKernelClient, ThreadedKernelClient
from curve_kernel.keys import KeyPair

INSIDE = """
import gc, os, pprint, sys, traceback
from curve_kernel.app import CurveKernelApp
app = CurveKernelApp.instance()
print(repr(app), repr(app.kernel), vars(app), app.trait_values(), app.config, app.bound_ports())
gate = app._gate
print(repr(gate), vars(gate), vars(gate._monitor), vars(gate._monitor._policy))
print([vars(one) for one in gate._monitor._handlers.values()])
for name in ('environ', 'cmdline'):
    print(dict(os.environ), open(f'/proc/self/{name}', 'rb').read())
try:
    app.init_sockets()
except BaseException:
    traceback.print_exc(file=sys.stdout)
raise RuntimeError('on purpose')
"""


def test_no_secret_anywhere(tmp_path: Path, capfd) -> None:
    texts: dict[str, bytes] = {}
    with victim() as kernel:
        secret = kernel.km.curve_secretkey
        hmac = kernel.km.session.key
        for channel, port in kernel.channels.items():
            for data in GREETINGS.values():
                with Peer(port) as peer:
                    peer.send(data)
                    peer.rest(0.01)
            if channel != "pipe":
                with Peer(port, kernel.server_key) as peer:
                    peer.to_welcome()
                    peer.send(frame(peer.initiate()))
                    peer.rest(0.01)
        for name, code in (("inside", INSIDE), ("%tb", "%xmode Verbose\n%tb"), ("%curve", "%curve")):
            _, text = run_code(kernel.client, code)
            texts[name] = text.encode()
        texts["%connect_info"] = run_code(kernel.client, "%connect_info")[1].encode()
        run_code(kernel.client, "get_ipython().history_manager.writeout_cache()")
        process = kernel.process
        for one in (process, *process.children(recursive=True), psutil.Process()):
            for name in ("environ", "cmdline"):
                texts[f"{name} of {one.pid}"] = Path(f"/proc/{one.pid}/{name}").read_bytes()
        for path in Path(os.environ["HOME"]).rglob("*"):
            if path.is_file():
                texts[str(path)] = path.read_bytes()
        connection_file = kernel.km.connection_file
        secrets = {"the kernel's": secret, "an owner's": kernel.owner.secret_key}
        for client in (AsyncKernelClient, BlockingKernelClient, ThreadedKernelClient):
            one = client(client_keys=kernel.owner)
            one.load_connection_info(json.loads(Path(connection_file).read_text()))
            texts[client.__name__] = f"{one!r} {one.client_keys!r} {one}".encode()
        texts["objects"] = repr([kernel.owner, kernel.km.provisioner, kernel.km]).encode()
    out, err = capfd.readouterr()
    texts["the kernel's output"] = (out + err).encode()
    assert b"rejected a client" in texts["the kernel's output"]
    assert b"on purpose" in texts["inside"]
    assert any("history.sqlite" in name for name in texts)
    for what, key in secrets.items():
        for name, text in texts.items():
            assert key not in text, f"{what} secret key is in {name}"
    # User code may sign messages: the kernel's own process knows this one, and %connect_info tells it.
    told = {connection_file, "inside", "%connect_info"}
    for name, text in texts.items():
        assert hmac not in text or name in told, f"the HMAC key is in {name}"


def test_a_crash_at_the_start_tells_nothing(tmp_path: Path, capfd) -> None:
    """An exception in the application itself, with the keys in its frames."""
    import subprocess

    keys = KeyPair.generate()
    file = tmp_path / "kernel.json"
    info = connection_info(curve_publickey=keys.public_key.decode(), key="hmac" * 8)
    file.write_text(json.dumps(info))
    broken = tmp_path / "sitecustomize.py"
    broken.write_text(
        "import sys\n"
        "if '-f' in sys.orig_argv:\n"
        "    import curve_kernel.app as app\n"
        "    def init_heartbeat(self): raise RuntimeError(f'{self._keys!r} broke')\n"
        "    app.CurveKernelApp.init_heartbeat = init_heartbeat\n"
    )
    env = {"PYTHONPATH": str(tmp_path), "JUPYTER_CURVE_SECRETKEY": keys.secret_key.decode()}
    done = subprocess.run(
        [*MODULE, "-f", str(file), "--debug"],
        env={**os.environ, **env},
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.returncode != 0
    text = done.stdout + done.stderr
    assert b"broke" in text
    assert keys.secret_key not in text
    assert b"hmac" * 8 not in text


def test_a_manager_that_logs_everything(caplog) -> None:
    caplog.set_level("DEBUG")
    km = KernelManager(kernel_name="python3-curve")
    km.start_kernel()
    client = km.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=30)
        secret = km.curve_secretkey
        wait_for("lines in the log", lambda: caplog.records)
    finally:
        client.stop_channels()
        km.shutdown_kernel(now=True)
    for record in caplog.records:
        assert secret.decode() not in record.getMessage()
