"""One variable for a whole site: every kernelspec that names no provisioner goes through ours."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ipykernel
import psutil
import pytest
from jupyter_client import KernelManager
from jupyter_client.provisioning import KernelProvisionerFactory
from support import CHANNELS, MODULE, run_code, started, stock_ports
from traitlets.config import Config

from curve_kernel.distribution import distribution_for
from curve_kernel.errors import CurveKernelError
from curve_kernel.wire import read_mechanism

VARIABLE = "JUPYTER_DEFAULT_PROVISIONER_NAME"
NATIVE = pytest.mark.skipif(ipykernel.version_info < (7, 3), reason="this ipykernel has no CURVE")


@pytest.fixture(autouse=True)
def _site(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(VARIABLE, "curve-provisioner")
    KernelProvisionerFactory.clear_instance()
    yield
    KernelProvisionerFactory.clear_instance()


def write_spec(name: str, *argv: str, **metadata: Any) -> str:
    folder = Path(os.environ["JUPYTER_DATA_DIR"]) / "kernels" / name
    folder.mkdir(parents=True)
    spec = {
        "argv": [*(argv or (sys.executable, "-m", "ipykernel_launcher")), "-f", "{connection_file}"],
        "display_name": name,
        "language": "python",
        "metadata": metadata,
    }
    (folder / "kernel.json").write_text(json.dumps(spec))
    return name


def mechanisms(km: KernelManager) -> set[str]:
    return {read_mechanism(km._make_url(channel)) for channel in CHANNELS}


def refusal(name: str, **kwargs: Any) -> CurveKernelError:
    """A start that has to fail, with no process and no port, and soon."""
    km = KernelManager(kernel_name=name, **kwargs)
    begin = time.monotonic()
    with pytest.raises(CurveKernelError) as raised:
        km.start_kernel()
    assert time.monotonic() - begin < 1
    assert not km.has_kernel
    assert not Path(km.connection_file or "/nowhere").exists()
    assert not [one for one in psutil.Process().children() if "ipykernel_launcher" in one.cmdline()]
    return raised.value


@NATIVE
def test_stock_is_encrypted():
    with started("python3") as (km, client):
        assert mechanisms(km) == {"CURVE"}
        assert run_code(client, "kept = 6 * 7; kept") == ("ok", "42")
        km.restart_kernel()
        client.wait_for_ready(timeout=60)
        assert run_code(client, "'kept' in globals()") == ("ok", "False")
        assert mechanisms(km) == {"CURVE"}


def test_this_kernel_keeps_its_secret_off_the_disk_with_and_without_a_provisioner_of_its_own():
    command = [*MODULE, "install", "--user", "--no-provisioner", "--name", "unnamed"]
    subprocess.run(command, check=True, timeout=60, stdout=subprocess.DEVNULL)
    for name in ("unnamed", "python3-curve"):
        with started(name) as (km, client):
            assert mechanisms(km) == {"CURVE"}
            assert "curve_secretkey" not in json.loads(Path(km.connection_file).read_text())
            assert run_code(client, "1 + 1") == ("ok", "2")


def test_what_cannot_encrypt_does_not_start():
    error = refusal(write_spec("old"))
    assert "kernel old does not start" in error.message
    assert f"{sys.executable} -m ipykernel install --user --name old" in error.hint
    assert "plaintext_kernels" in error.hint
    assert max(map(len, str(error).splitlines())) <= 100
    error = refusal(write_spec("other", "/usr/bin/env", "other-kernel"))
    assert "kernel other does not start" in error.message
    assert "ipykernel" not in error.hint
    # What it says, done.
    if ipykernel.version_info >= (7, 3):
        command = [sys.executable, "-m", "ipykernel", "install", "--user", "--name", "old"]
        subprocess.run(command, check=True, timeout=60, capture_output=True)
        with started("old") as (km, _):
            assert mechanisms(km) == {"CURVE"}


def test_what_only_promises_to_encrypt_is_ended():
    """A kernelspec that stayed when its package was replaced by an older one, for instance."""
    deaf = (
        "import json, sys; from ipykernel.kernelapp import IPKernelApp\n"
        "info = json.load(open(sys.argv[2])); del info['curve_publickey'], info['curve_secretkey']\n"
        "sys.argv[2] += '-copy'; json.dump(info, open(sys.argv[2], 'w'))\n"
        "IPKernelApp.launch_instance()"
    )
    name = write_spec("promises", sys.executable, "-c", deaf, supported_encryption=["curve"])
    km = KernelManager(kernel_name=name)
    with pytest.raises(CurveKernelError) as raised:
        km.start_kernel()
    assert "kernel promises ignores its CURVE keys, so it was ended" in raised.value.message
    assert "ipykernel encrypts from 7.3 on" in raised.value.hint
    assert not km.has_kernel


def test_a_site_allows_some_by_name(tmp_path, monkeypatch, caplog):
    name = write_spec("old")
    # As /etc/jupyter/jupyter_config.json does, in a program that reads no configuration.
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", str(tmp_path))
    file = tmp_path / "jupyter_config.json"
    file.write_text(json.dumps({"CurveProvisioner": {"plaintext_kernels": ["Old", "further"]}}))
    logging.getLogger("traitlets").propagate = True
    with started(name, **stock_ports()) as (km, client):
        assert mechanisms(km) == {"NULL"}
        assert run_code(client, "1 + 1") == ("ok", "2")
        for starts in (1, 2):
            said = [one for one in caplog.records if "old speaks PLAINTEXT" in one.getMessage()]
            assert [one.levelname for one in said] == ["WARNING"] * starts
            km.restart_kernel()
            client.wait_for_ready(timeout=60)
        assert "curve" not in Path(km.connection_file).read_text()
    refusal(write_spec("another"))
    # A list of the wrong kind allows nobody.
    file.write_text(json.dumps({"CurveProvisioner": {"plaintext_kernels": "old"}}))
    assert "plaintext_kernels" in str(refusal(name))


def test_a_configuration_of_the_program_itself(tmp_path):
    """What JupyterLab, nbconvert and others hand to their managers."""
    name = write_spec("old")
    config = Config({"CurveProvisioner": {"plaintext_kernels": ["old"]}})
    with started(name, config=config, **stock_ports()) as (km, _):
        assert mechanisms(km) == {"NULL"}
    # What can encrypt does so, whatever is listed.
    with started("python3-curve", config=config) as (km, _):
        assert mechanisms(km) == {"CURVE"}


@pytest.mark.parametrize(
    ("argv", "metadata", "distribution"),
    [
        (["python", "-m", "curve_kernel", "-f", "{connection_file}"], {}, "env"),
        (["/opt/x/bin/curve-kernel", "-f", "{connection_file}"], {}, "env"),
        (["sh", "-c", 'exec python -m curve_kernel -f "$0"', "{connection_file}"], {}, "env"),
        (["runner", "--", "python", "-mcurve_kernel", "-f", "{connection_file}"], {}, "env"),
        (["/opt/curve_kernel/python", "-m", "other", "{connection_file}"], {}, None),
        (["other", "{connection_file}"], {"supported_encryption": "CURVE"}, "file"),
        (["other", "{connection_file}"], {"supported_encryption": ["tls", "curve"]}, "file"),
        (["other", "{connection_file}"], {"supported_encryption": []}, None),
        (["other", "{connection_file}"], {"supported_encryption": None}, None),
        (["other", "{connection_file}"], {"supported_encryption": {"curve": False}}, None),
    ],
)
def test_kernelspecs(argv, metadata, distribution):
    class Spec:
        pass

    spec: Any = Spec()
    spec.argv, spec.metadata = argv, metadata
    assert distribution_for(spec) == distribution
