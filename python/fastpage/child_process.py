"""Processes that a server starts, and that must not outlive it: the engine, and front ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

# The process is given the caller's own way to find modules, and none to find others.
_COMMAND = "import sys; sys.path[:] = {path!r}; from {module} import main; main()"
_PR_SET_PDEATHSIG = 1
_PF_EXITING = 4  # of the flags in /proc/PID/stat, proc(5)


def start_child(
    module: str, arguments: Sequence[object], filenos: Sequence[int]
) -> subprocess.Popen[bytes]:
    """A fresh interpreter that runs the module's main(), with sys.argv[1:] the caller's process id,
    time.monotonic() of now and `arguments`. It inherits the descriptors, and what it prints goes to
    stderr."""
    command = _COMMAND.format(path=sys.path, module=module)
    own = (os.getpid(), time.monotonic())
    # Not start_new_session: whoever kills the whole group means the child too.
    with _signals_blocked():
        return subprocess.Popen(
            [sys.executable, "-c", command, *map(str, (*own, *arguments))],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno() if _has_fileno(sys.stderr) else subprocess.DEVNULL,
            pass_fds=filenos,
        )


def end_with(parent: int) -> None:
    """Called by the child: it is killed when the process that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def is_exiting(pid: int) -> bool:
    """It has ended, and the kernel is about to clear it away."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return bool(int(file.read().rpartition(")")[2].split()[6]) & _PF_EXITING)
    except (OSError, ValueError, IndexError):
        return False


def how_it_ended(returncode: int) -> str:
    if returncode >= 0:
        return f"exit status {returncode}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-returncode).name
        hint = ": out of memory?" if name == "SIGKILL" else ""
        return f"{name}{hint}"
    return f"signal {-returncode}"


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """A process that is started meanwhile never gets them: a terminal's Ctrl-C and service managers
    signal all processes of a server, and it is the first one that drains and then closes the
    sockets of the others."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _has_fileno(stream: Any) -> bool:
    try:
        stream.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True
