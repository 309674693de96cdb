"""A cable that takes its time, where Linux has no netem: two TUN devices, and this process between.

Run as ``python delay.py HERE NAMESPACE THERE SECONDS`` by root. It makes the device *HERE*, and in
*NAMESPACE* the device *THERE*; each packet arrives at the other one *SECONDS* later. It says "ready",
and both devices end with it. Packets pass in Linux's segments of 64 KiB, or Python would be too slow.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import os
import select
import struct
import subprocess
import sys
import time

_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_TUN, _NO_PI, _VNET_HDR = 0x0001, 0x1000, 0x4000
_CHECKSUMS_AND_SEGMENTS = 0x01 | 0x02 | 0x04
_LARGEST = 1 << 17


def device(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(
        descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TUN | _NO_PI | _VNET_HDR)
    )
    fcntl.ioctl(descriptor, _TUNSETOFFLOAD, _CHECKSUMS_AND_SEGMENTS)
    subprocess.run(["ip", "link", "set", name, "txqueuelen", "10000"], check=True, timeout=20)
    return descriptor


def carry(here: int, there: int, delay: float) -> None:
    other, queue = {here: there, there: here}, collections.deque[tuple[float, int, bytes]]()
    while True:
        pause = max(queue[0][0] - time.monotonic(), 0) if queue else None
        for descriptor in select.select([here, there], [], [], pause)[0]:
            with contextlib.suppress(BlockingIOError):
                while True:
                    packet = os.read(descriptor, _LARGEST)
                    queue.append((time.monotonic() + delay, other[descriptor], packet))
        while queue and queue[0][0] <= time.monotonic():
            _, descriptor, packet = queue.popleft()
            # A device that is down, or full, loses the packet, as a cable does.
            with contextlib.suppress(OSError):
                os.write(descriptor, packet)


def main() -> None:
    name, namespace, far_name, delay = sys.argv[1:]
    here, there = device(name), device(f"{name}b")
    move = ["ip", "link", "set", f"{name}b", "netns", namespace, "name", far_name]
    subprocess.run(move, check=True, timeout=20)
    print("ready", flush=True)
    carry(here, there, float(delay))


if __name__ == "__main__":
    main()
