"""Two hosts with a cable between them: network namespaces, for root with iproute2."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

KERNEL_ADDRESS, CLIENT_ADDRESS = "10.213.97.1", "10.213.97.2"

needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2"
)


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, timeout=10)


@dataclass
class Host:
    """A network namespace with one address."""

    namespace: str

    @property
    def prefix(self) -> list[str]:
        """What comes before a command that is to run here."""
        return ["ip", "netns", "exec", self.namespace]

    def link(self, state: str) -> None:
        """Pull the cable out of this host ("down"), or put it back ("up")."""
        ip("-n", self.namespace, "link", "set", "cable", state)


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """The kernel's host and the client's."""
    name = f"curve{secrets.token_hex(3)}"
    kernel, client = Host(f"{name}k"), Host(f"{name}c")
    try:
        for host in (kernel, client):
            ip("netns", "add", host.namespace)
        ip(
            *("link", "add", "cable", "netns", kernel.namespace, "type", "veth"),
            *("peer", "name", "cable", "netns", client.namespace),
        )
        for host, address in ((kernel, KERNEL_ADDRESS), (client, CLIENT_ADDRESS)):
            ip("-n", host.namespace, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", host.namespace, "link", "set", "lo", "up")
            host.link("up")
        yield kernel, client
    finally:
        for host in (kernel, client):
            ip("netns", "delete", host.namespace, check=False)
