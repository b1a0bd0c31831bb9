"""The engine's process: loads the model that its front end names, then steps it until the front end
closes the socket. See process_core.py for the other side.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sys
import threading
import time
from typing import Any

from fastpage import _C, logs
from fastpage.checkpoints import Checkpoint
from fastpage.child_process import end_with
from fastpage.engine.args import EngineArgs
from fastpage.engine.core import EngineLost
from fastpage.engine.hello import BUILD, LENGTH, other_build
from fastpage.engine.loading import LoadedModel, load_model
from fastpage.engine.model_files import differences, digests, replaced_files
from fastpage.errors import FastpageError


def main() -> None:
    """sys.argv: the front end's process id, when that started this process (by time.monotonic()),
    the descriptor of its socket, and that of the one by which the sockets of other front ends
    come, if any do."""
    front_end, started, fileno = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    start_up = time.monotonic() - started
    # While it loads, nobody looks at the socket.
    end_with(front_end)
    door = socket.socket(fileno=int(sys.argv[4])) if len(sys.argv) > 4 else None
    with socket.socket(fileno=fileno) as channel:
        loaded = _load(channel, {"start": start_up})
        if loaded is None:
            sys.exit(1)
        server = _C.EngineServer(loaded.engine, [channel.detach()], takes_more=door is not None)
    if door is not None:
        threading.Thread(target=_let_in, args=(door, server), daemon=True).start()
    server.run()
    # The weights need no orderly end.
    sys.stdout.flush()
    os._exit(0)


def _let_in(door: socket.socket, server: _C.EngineServer) -> None:
    """Front ends, whenever they come."""
    while True:
        message, filenos, _, _ = socket.recv_fds(door, 1, 1)
        if not message:
            return
        for fileno in filenos:
            try:
                server.add_front_end(fileno)
            except (FastpageError, MemoryError):  # it sees the end of its socket
                os.close(fileno)


def _load(channel: socket.socket, phases: dict[str, float]) -> LoadedModel | None:
    (length,) = LENGTH.unpack(_read(channel, LENGTH.size))
    orders = json.loads(_read(channel, length))
    if orders["build"] != BUILD:
        _say_error(channel, EngineLost(other_build(BUILD, orders["build"])))
        return None
    if orders["logs"] is not None:
        logs.configure(logs.LogConfig(**orders["logs"]))
    args = EngineArgs(**orders["args"])
    files: dict[str, str] = {}

    def look_at(checkpoint: Checkpoint) -> None:
        files.update(digests(args, checkpoint))
        changed = [] if orders["files"] is None else differences(orders["files"], files)
        if changed:
            raise EngineLost(replaced_files(changed))

    try:
        loaded = load_model(args, look_at=look_at)
    except (FastpageError, OSError, MemoryError) as error:
        _say_error(channel, error)
        return None
    _say(
        channel,
        {
            "build": BUILD,
            "files": files,
            "info": dataclasses.asdict(loaded.info),
            "sampling_defaults": loaded.sampling_defaults,
            "phases": phases | loaded.phases,
        },
    )
    return loaded


def _say_error(channel: socket.socket, error: Exception) -> None:
    message = str(error) or type(error).__name__
    _say(channel, {"build": BUILD, "error": _error_name(error), "message": message})


def _error_name(error: Exception) -> str:
    return "OSError" if isinstance(error, OSError) else type(error).__name__


def _read(channel: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        # Less than that comes if this process is stopped and continued meanwhile.
        part = channel.recv(size - len(data), socket.MSG_WAITALL)
        if not part:
            os._exit(1)  # the front end has gone
        data += part
    return bytes(data)


def _say(channel: socket.socket, message: dict[str, Any]) -> None:
    text = json.dumps(message).encode()
    channel.sendall(LENGTH.pack(len(text)) + text)
