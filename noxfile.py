"""The version matrix: ``nox`` runs the kernel's tests with each version; CI runs the ends of it."""

from __future__ import annotations

import nox

nox.options.default_venv_backend = "venv"

# Those that are not here are left out.
PYTHON = ("3.10", "3.11", "3.12", "3.13", "3.14")
IPYKERNEL = ("6.29.5", "6.31.0", "7.0.1", "7.2.0", "7.3.0", "7.4.0")
JUPYTER_CLIENT = ("8.9.0", "8.9.1", "8.10.0")
PYZMQ = ("26.0.0", "27.3.0")
TESTS = ["tests/kernel", "tests/access", "tests/launch"]


def kernel_tests(session: nox.Session, pin: str) -> None:
    """Install this package and *pin*, and run the tests."""
    session.install(".[test]", pin)
    session.run("python", "-m", "pytest", "-q", *(session.posargs or TESTS))


@nox.session(python=PYTHON)
@nox.parametrize("version", (IPYKERNEL[0], IPYKERNEL[-1]))
def python(session: nox.Session, version: str) -> None:
    """Run the kernel's tests on one Python, with the oldest and the newest ipykernel."""
    kernel_tests(session, f"ipykernel=={version}")


@nox.session
@nox.parametrize("version", IPYKERNEL)
def ipykernel(session: nox.Session, version: str) -> None:
    """Run the kernel's tests with one ipykernel."""
    kernel_tests(session, f"ipykernel=={version}")


@nox.session
@nox.parametrize("version", JUPYTER_CLIENT)
def jupyter_client(session: nox.Session, version: str) -> None:
    """Run the kernel's tests with one jupyter_client."""
    kernel_tests(session, f"jupyter_client=={version}")


@nox.session
@nox.parametrize("version", PYZMQ)
def pyzmq(session: nox.Session, version: str) -> None:
    """Run the kernel's tests with one pyzmq."""
    kernel_tests(session, f"pyzmq=={version}")
