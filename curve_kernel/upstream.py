"""What this package takes of other packages that they do not call public.

The table says what to look at when one of them has a new version; tests/kernel/test_upstream.py says by
name what an installed version lacks, and fails for a private name that is used and not listed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType

__all__ = ["PRIVATE_NAMES", "SEEN", "replaced"]

SEEN = {
    "ipykernel": "6.29.5 to 7.4.0",
    "jupyter_client": "8.9.0 to 8.10.0",
    "jupyter_console": "6.6.3",
    "debugpy": "1.8.22",
    "pyzmq": "26.0.0 to 27.3.0",
    "ipython": "8.39.0 to 9.18.1",
    "traitlets": "5.16.1",
}
"""The oldest and the newest version in which the names below were seen, by distribution."""

PRIVATE_NAMES: Mapping[str, Mapping[str, str]] = {
    "ipykernel": {
        # Globals that methods of the application and of the debugger look up, which are replaced.
        "ipykernel.kernelapp:IOPubThread": "",
        "ipykernel.kernelapp:Heartbeat": "",
        "ipykernel.kernelapp:ZMQStream": "",
        "ipykernel.debugger:Debugger": "",
        "ipykernel.debugger:VariableExplorer": "",
        "ipykernel.debugger:_is_debugpy_available": "",
        # The application.
        "ipykernel.kernelapp:IPKernelApp._bind_socket": "",
        "ipykernel.kernelapp:IPKernelApp._ports": "",
        "ipykernel.kernelapp:IPKernelApp._apply_curve_server_options": ">=7.3",
        "ipykernel.kernelapp:IPKernelApp._apply_curve_client_options": ">=7.3",
        "ipykernel.heartbeat:Heartbeat._bind_socket": "",
        "ipykernel.heartbeat:Heartbeat._curve_publickey": ">=7.3",
        "ipykernel.heartbeat:Heartbeat._curve_secretkey": ">=7.3",
        # The iopub thread and the streams.
        "ipykernel.iostream:IOPubThread._setup_pipe_in": "",
        "ipykernel.iostream:IOPubThread._setup_pipe_out": "",
        "ipykernel.iostream:IOPubThread._handle_event": "",
        "ipykernel.iostream:IOPubThread._handle_pipe_msg": "",
        "ipykernel.iostream:IOPubThread._really_send": "",
        "ipykernel.iostream:IOPubThread._pipe_flag": "",
        "ipykernel.iostream:IOPubThread._pipe_in": "",
        "ipykernel.iostream:IOPubThread._pipe_port": "",
        "ipykernel.iostream:IOPubThread._pipe_uuid": "",
        "ipykernel.iostream:IOPubThread._setup_xpub_listener": ">=7.2",
        "ipykernel.iostream:IOPubThread._xpub_stream": ">=7.2",
        "ipykernel.iostream:IOPubThread._handle_subscription": ">=7.2",
        "ipykernel.iostream:IOPubThread._send_welcome_message": ">=7.2",
        "ipykernel.iostream:OutStream._flush_buffers": "",
        "ipykernel.iostream:OutStream._hooks": "",
        "ipykernel.iostream:OutStream._is_master_process": "",
        # The debugger.
        "ipykernel.debugger:Debugger._forward_message": "",
        "ipykernel.debugger:Debugger.debugpy_client": "",
        "ipykernel.debugger:Debugger.variable_explorer": "",
        "ipykernel.debugger:Debugger.kernel_modules": ">=7",
        "ipykernel.debugger:DebugpyClient.debugpy_stream": "",
        "ipykernel.debugger:DebugpyClient.debugpy_port": "",
        "ipykernel.debugger:DebugpyClient.receive_dap_frame": "",
    },
    "jupyter_client": {
        "jupyter_client.connect:ConnectionFileMixin._create_connected_socket": "",
        "jupyter_client.connect:ConnectionFileMixin._make_url": "",
        "jupyter_client.connect:ConnectionFileMixin._session_default": "",
        "jupyter_client.manager:KernelManager._close_control_socket": "",
        "jupyter_client.manager:KernelManager._control_socket": "",
        "jupyter_client.manager:KernelManager._ready": "",
        "jupyter_client.manager:KernelManager._connect_control_socket": "",
        "jupyter_client.manager:KernelManager._async_kill_kernel": "",
        "jupyter_client.manager:KernelManager._async_cleanup_resources": "",
        "jupyter_client.ioloop.manager:IOLoopKernelManager._restarter": "",
        "jupyter_client.restarter:KernelRestarter._fire_callbacks": "",
        "jupyter_client.channels:HBChannel._async_run": "",
        "jupyter_client.channels:HBChannel._beating": "",
        "jupyter_client.channels:HBChannel._create_socket": "",
        "jupyter_client.channels:HBChannel._exit": "",
        "jupyter_client.channels:HBChannel._running": "",
        "jupyter_client.client:KernelClient._context_default": "",
        "jupyter_client.client:KernelClient._created_context": "",
        "jupyter_client.client:KernelClient._control_channel": "",
        "jupyter_client.client:KernelClient._hb_channel": "",
        "jupyter_client.client:KernelClient._iopub_channel": "",
        "jupyter_client.client:KernelClient._shell_channel": "",
        "jupyter_client.client:KernelClient._stdin_channel": "",
        "jupyter_client.client:KernelClient._create_connected_socket": "",
        "jupyter_client.client:KernelClient._async_get_shell_msg": "",
        "jupyter_client.client:KernelClient._async_get_iopub_msg": "",
        "jupyter_client.client:KernelClient._async_get_stdin_msg": "",
        "jupyter_client.client:KernelClient._async_get_control_msg": "",
        "jupyter_client.client:KernelClient._async_is_alive": "",
        "jupyter_client.client:KernelClient._async_wait_for_ready": "",
        "jupyter_client.client:KernelClient._async_execute_interactive": "",
    },
    "jupyter_console": {
        "jupyter_console.ptshell:ZMQTerminalInteractiveShell._executing": "",
        "jupyter_console.ptshell:ZMQTerminalInteractiveShell._main_task": "",
        "jupyter_console.ptshell:ZMQTerminalInteractiveShell.keepkernel": "",
        "jupyter_console.ptshell:ZMQTerminalInteractiveShell.pt_cli": "",
        "jupyter_console.ptshell:ZMQTerminalInteractiveShell.use_kernel_is_complete": "",
        "jupyter_console.app:ZMQTerminalIPythonApp.handle_sigint": "",
    },
    "debugpy": {
        "debugpy.server.api:_settrace": "",
        "debugpy.server.api:_starts_debugging": "",
        "debugpy.adapter.clients:serve": "",
        "debugpy.adapter.servers:serve": "",
        "debugpy.common.sockets:serve": "",
        # pydevd, which debugpy brings along.
        "pydevd:start_client": "",
        "pydevd_tracing:SetTrace": "",
        "_pydevd_bundle.pydevd_frame_utils:create_frames_list_from_frame": "",
        "_pydevd_bundle.pydevd_suspended_frames:SuspendedFramesManager": "",
        "_pydevd_bundle.pydevd_suspended_frames:_FramesTracker": "",
    },
    "pyzmq": {"zmq.auth:Authenticator._send_zap_reply": ""},
    "ipython": {"IPython.core.application:ProfileAwareConfigLoader": ""},
    "traitlets": {
        "traitlets.config:Application._create_loader": "",
        "traitlets.config.loader:KVArgParseConfigLoader.parser_class": "",
        "traitlets.config.loader:class_trait_opt_pattern": "",
    },
}
"""``module:name`` or ``module:class.attribute`` by distribution, with the versions that have it."""


@contextmanager
def replaced(module: ModuleType, **values: object) -> Iterator[None]:
    """Let the code of *module* find *values* where it looks up its own names, inside the block."""
    before = {name: getattr(module, name) for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(before)
