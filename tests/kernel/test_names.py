"""No name of ours is a name of a base class that is not meant to be overridden.

Python 3.13's Thread has an attribute ``_handle``; a thread of this package had a method of that
name, and died of it. Base classes differ from one Python or ipykernel to the next, so this runs with
each.
"""

from __future__ import annotations

import ast
import enum
import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Iterable
from functools import cache

import pytest
from ipykernel.heartbeat import Heartbeat

import curve_kernel

# What each class means to override, or sets in the place of its base class. Versions of the base class
# differ, so a name may be missing there.
MEANT: dict[str, set[str]] = {
    "AsyncKernelClient": {
        "execute_interactive",
        "get_control_msg",
        "get_iopub_msg",
        "get_shell_msg",
        "get_stdin_msg",
        "is_alive",
        "start_channels",
        "wait_for_ready",
    },
    "AsyncContext": set(),
    "AttachApp": {"name"},
    "AttachProvisioner": {
        "cleanup",
        "connection_info",
        "has_process",
        "kill",
        "launch_kernel",
        "poll",
        "post_launch",
        "pre_launch",
        "send_signal",
        "shutdown_requested",
        "terminate",
        "wait",
    },
    "AuthorizeApp": {"name"},
    "BlockingKernelClient": {
        "execute_interactive",
        "get_control_msg",
        "get_iopub_msg",
        "get_shell_msg",
        "get_stdin_msg",
        "is_alive",
        "wait_for_ready",
    },
    "<locals>.Client": {"hb_channel", "hb_channel_class"},
    "<locals>.Manager": {"client", "client_factory"},
    "<locals>.JoinedClient": {"shutdown"},
    "<locals>.KeyedClient": {
        "_create_connected_socket",
        "blocking_class",
        "blocking_client",
        "curve_publickey",
        "curve_secretkey",
        "hb_channel_class",
    },
    "ClientAuthenticator": {"curve_user_id", "handle_zap_message"},
    "ClientsApp": {"name"},
    "Command": {"initialize", "start"},
    "ConsoleApp": {"name"},
    "ConsoleClient": {"is_alive"},
    "Context": {"destroy", "socket"},
    "CleanSession": {"deserialize"},
    "CurveConsoleApp": {
        "_session_default",
        "exit",
        "handle_sigint",
        "init_connection_file",
        "init_kernel_client",
        "init_kernel_manager",
        "init_shell",
        "init_ssh",
        "kernel_client",
        "kernel_manager",
        "load_config_file",
        "raise_config_file_errors",
        "shell",
    },
    "CurveHeartbeat": {
        "_bind_socket",
        "_curve_publickey",
        "_curve_secretkey",
        "pick_port",
        "port",
        "run",
    },
    "CurveIOPubThread": {
        "_handle_event",
        "_handle_pipe_msg",
        "_handle_subscription",
        "_pipe_flag",
        "_pipe_in",
        "_pipe_port",
        "_pipe_uuid",
        "_really_send",
        "_setup_pipe_in",
        "_setup_pipe_out",
        "_setup_xpub_listener",
        "_xpub_stream",
    },
    "CurveKernelApp": {
        "_apply_curve_client_options",
        "_apply_curve_server_options",
        "_bind_socket",
        "_ports",
        "_session_default",
        "aliases",
        "cleanup_connection_file",
        "close",
        "connection_file",
        "curve_secretkey",
        "description",
        "examples",
        "flags",
        "hb_port",
        "init_connection_file",
        "init_control",
        "init_heartbeat",
        "init_iopub",
        "init_kernel",
        "init_shell",
        "init_sockets",
        "initialize",
        "log_connection_info",
        "log_format",
        "outstream_class",
        "start",
        "subcommand_description",
        "subcommands",
        "version",
        "write_connection_file",
    },
    "CurveOutStream": {"_flush_buffers"},
    "CurveProvisioner": {"cleanup", "connection_info", "launch_kernel", "post_launch", "pre_launch"},
    "CurveSession": {"deserialize", "recv"},
    "CurveShell": {
        "_executing",
        "check_complete",
        "handle_execute_reply",
        "handle_iopub",
        "include_output",
        "init_kernel_info",
        "interact",
        "keepkernel",
        "mainloop",
        "other_output_prefix",
        "parent",
        "print_out_prompt",
        "print_remote_prompt",
        "run_cell",
        "show_banner",
        "use_kernel_is_complete",
    },
    "DoctorApp": {"name"},
    "HeardStream": {"on_recv"},
    "InstallApp": {"name"},
    "JSONConfigFile": {"load_config"},
    "KeygenApp": {"name"},
    "LaunchApp": {"name"},
    "OptionLoader": {"load_config", "parser_class"},
    "PortlessDebugger": {"_forward_message", "process_request", "start", "variable_explorer"},
    "PyConfigFile": {"load_config"},
    "RemoteProvisioner": {
        "cleanup",
        "connection_info",
        "get_provisioner_info",
        "get_stable_start_time",
        "has_process",
        "kill",
        "launch_kernel",
        "poll",
        "post_launch",
        "pre_launch",
        "send_signal",
        "terminate",
        "wait",
    },
    "RevokeApp": {"name"},
    "ShareApp": {"name"},
    "StatusApp": {"name"},
    "StrictApplication": {
        "_create_loader",
        "connection_file",
        "json_config_loader_class",
        "load_config_file",
        "parse_command_line",
        "python_config_loader_class",
        "update_config",
    },
    "ThreadedKernelClient": {"is_alive"},
    "UninstallApp": {"name"},
    "WatchApp": {"name"},
    "_File": {"emit"},
    "_CurveClient": {
        "_context_default",
        "_created_context",
        "_async_execute_interactive",
        "_async_get_control_msg",
        "_async_get_iopub_msg",
        "_async_get_shell_msg",
        "_async_get_stdin_msg",
        "_async_is_alive",
        "_async_wait_for_ready",
        "_create_connected_socket",
        "curve_publickey",
        "curve_secretkey",
        "hb_channel",
        "hb_channel_class",
        "load_connection_file",
        "load_connection_info",
        "start_channels",
        "stop_channels",
    },
    "WholeSession": {"deserialize"},
    "_BoundedServer": {"handle_stream", "on_close"},
    "_CellHandler": {"get"},
    "_EventsHandler": {"get"},
    "_Handler": {"initialize", "prepare", "set_default_headers"},
    "_NothingHandler": {"get"},
    "_PageHandler": {"get"},
    "_StaticHandler": {"get"},
    "_KeyedHBChannel": {"_async_run", "_beating", "_create_socket", "socket"},
    "_CommandParser": {"error", "print_help"},
    "_Parser": {"error"},
    "QueuedLog": {"getEffectiveLevel", "handle", "isEnabledFor"},
}
# Classes that are made inside a function, and their base class.
INSIDE = {
    "<locals>.Client": "jupyter_client.AsyncKernelClient",
    "<locals>.Manager": "jupyter_client.KernelManager",
    "<locals>.JoinedClient": "jupyter_client.AsyncKernelClient",
    "<locals>.KeyedClient": "jupyter_client.AsyncKernelClient",
}


def bound(node: ast.ClassDef) -> set[str]:
    """The names that a class's source defines, in its body and on ``self``."""
    names: set[str] = set()
    todo: list[ast.AST] = list(node.body)
    while todo:
        match one := todo.pop():
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                names |= {one.name} | set_on_self(one)
            case ast.ClassDef():
                names.add(one.name)
            case ast.Name(ctx=ast.Store()):
                names.add(one.id)
            case ast.AST():
                todo += ast.iter_child_nodes(one)
    return {name for name in names if not (name.startswith("__") and name.endswith("__"))}


def set_on_self(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    arguments = [*function.args.posonlyargs, *function.args.args]
    if not arguments:
        return set()
    return {
        node.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == arguments[0].arg
    }


def mangled(names: set[str], cls: type) -> set[str]:
    """As Python stores names that begin with two underscores."""
    return {f"_{cls.__name__.lstrip('_')}{one}" if one.startswith("__") else one for one in names}


def source(cls: type) -> ast.ClassDef:
    [node] = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    return node


@cache
def names_of(cls: type) -> set[str]:
    """All names of a class; of one in C, what it has itself."""
    try:
        return mangled(bound(source(cls)), cls) | set(vars(cls))
    except (OSError, TypeError):
        return set(vars(cls))


def is_ours(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "curve_kernel"


def foreign(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if base is not object and not is_ours(base)]


MODULES = [
    importlib.import_module(found.name)
    for found in pkgutil.walk_packages(curve_kernel.__path__, "curve_kernel.")
    if not found.name.endswith("__main__")
]
CLASSES = [
    cls
    for module in MODULES
    for cls in vars(module).values()
    if isinstance(cls, type) and cls.__module__ == module.__name__ and foreign(cls)
]


def shared(names: set[str], bases: Iterable[type]) -> dict[str, str]:
    """Which of *names* a base class has too, and which that is."""
    found = {}
    for base in bases:
        if issubclass(base, enum.Enum):  # what begins so is for Enum to define
            names = {name for name in names if not name.startswith("_")}
        found |= dict.fromkeys(names & names_of(base), f"{base.__module__}.{base.__qualname__}")
    return found


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__qualname__)
def test_no_name_is_a_base_classs_by_accident(cls):
    for one in filter(is_ours, cls.__mro__):
        names = mangled(bound(source(one)), one) - MEANT.get(one.__name__, set())
        assert shared(names, foreign(cls)) == {}, "rename it, or add it to MEANT if it is meant"


def test_a_class_that_is_made_inside_a_function():
    found = {
        f"<locals>.{node.name}": bound(node)
        for module in MODULES
        for function in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.ClassDef) and node.bases
    }
    assert set(found) <= set(INSIDE), "name its base class in INSIDE"
    for name, names in found.items():
        bases = pytest.importorskip(INSIDE[name].rpartition(".")[0])
        base = getattr(bases, INSIDE[name].rpartition(".")[2])
        assert shared(names - MEANT.get(name, set()), foreign(base)) == {}


def test_what_is_meant_is_there():
    have = {one.__name__: bound(source(one)) for cls in CLASSES for one in cls.__mro__ if is_ours(one)}
    gone = {name: MEANT[name] - have[name] for name in MEANT if name in have}
    assert {name: names for name, names in gone.items() if names} == {}
    assert set(MEANT) <= set(have) | set(INSIDE)


class Watching(Heartbeat):
    """What the tests have to find, on each Python: names of a thread's, and of upstream's."""

    _target = None

    def join(self, *_: object) -> None:
        self._started, self.pick_port, (self._mine, self.ip) = 1, 2, (3, 4)


def test_the_tests_find_a_collision():
    assert set(shared(bound(source(Watching)), foreign(Watching)[1:])) == {
        "_target",
        "join",
        "_started",
        "pick_port",
        "ip",
    }
