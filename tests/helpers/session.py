"""A session to record: `session.py stock|curve CONNECTION_FILE MARKERS`, on the client's host."""

from __future__ import annotations

import json
import sys
from typing import Any

import jupyter_client

from curve_kernel.client import BlockingKernelClient


def main() -> None:
    kind, file, markers = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    client: Any = (BlockingKernelClient if kind == "curve" else jupyter_client.BlockingKernelClient)()
    client.load_connection_info(json.loads(open(file).read()))  # noqa: PTH123, SIM115
    client.start_channels()
    client.wait_for_ready(timeout=30)
    code = (
        f"code = '{markers['code']}'\n"
        "name = input()\n"
        "from comm import create_comm\n"
        f"comm = create_comm(target_name='{markers['comm']}', buffers=[b'{markers['buffer']}'])\n"
        f"open('/tmp/{markers['file']}', 'w').close()\n"
        f"import os; print(os.listdir('/tmp')); os.remove('/tmp/{markers['file']}')\n"
        # Put together in the kernel, so that it goes out as output only.
        f"print('{markers['output'][:10]}' + '{markers['output'][10:]}', name)"
    )
    texts = []
    client.execute_interactive(
        code,
        timeout=30,
        stdin_hook=lambda _: client.input(markers["stdin"]),
        output_hook=lambda message: texts.append(message["content"].get("text", "")),
    )
    client.control_channel.send(client.session.msg("kernel_info_request"))
    client.control_channel.get_msg(timeout=60)
    print("".join(texts))
    client.stop_channels()


if __name__ == "__main__":
    main()
