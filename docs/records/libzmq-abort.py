"""A peer aborts a libzmq process: it resets a connection whose queue is full, with a PING in it.

libzmq 4.3.5 says "Assertion failed: !_io_error (src/stream_engine_base.cpp:310)". A plain ROUTER with
its default options is enough. The mechanism plays no part, except that with CURVE the peer must be
accepted first. With the argument 0, which becomes RCVHWM, the process lives.
"""

import socket
import struct
import sys
import time

import zmq

router = zmq.Context().socket(zmq.ROUTER)
if len(sys.argv) > 1:
    router.rcvhwm = int(sys.argv[1])
port = router.bind_to_random_port("tcp://127.0.0.1")

peer = socket.create_connection(("127.0.0.1", port))
peer.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32))
ready, ping = b"\x05READY\x0bSocket-Type\0\0\0\x06DEALER", b"\x04PING\0\0"
peer.sendall(b"\x04" + bytes([len(ready)]) + ready)
time.sleep(0.3)
# One read of 8 KiB takes all of it. The queue is full at 1,000 messages, and libzmq stops there.
peer.sendall(b"\0\x01m" * 2500 + b"\x04" + bytes([len(ping)]) + ping)
time.sleep(0.3)
peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
peer.close()  # a reset
time.sleep(0.3)
# With room in the queue libzmq goes on, and answers the PING on a connection that is gone.
while router.poll(300):
    router.recv_multipart()
print(f"libzmq {zmq.zmq_version()} lives")  # noqa: T201
