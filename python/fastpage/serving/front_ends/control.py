"""Between the parent and a front end: calls as JSON over a Unix socket, which can carry sockets.

    stream  = message*
    message = size:fixed32 JSON[size]

A message with a socket has it as SCM_RIGHTS of its first byte.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

_SIZE = struct.Struct("=I")
_MOST_BYTES = 1 << 16  # received at once
_MOST_SOCKETS = 8

Handler = Callable[..., Any]
"""Is called with the fields of a message, and `sock` if a socket came along. What it returns, or
awaits, is the answer if it was asked."""


class ControlClosed(Exception):
    """The other side has gone."""


class Control:
    """One end. Belongs to the event loop that it is made on. No call waits, but ask() for the
    answer."""

    def __init__(
        self, sock: socket.socket, handlers: Mapping[str, Handler], on_end: Callable[[], None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket = sock
        self._handlers = handlers
        self._on_end = on_end
        self._received = bytearray()
        self._received_sockets: deque[socket.socket] = deque()
        self._unsent: deque[tuple[memoryview, socket.socket | None]] = deque()
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self.closed = False
        sock.setblocking(False)
        self._loop.add_reader(sock, self._on_readable)

    def tell(self, name: str, sock: socket.socket | None = None, **fields: Any) -> None:
        """Nothing happens if the other side has gone. Takes `sock` over."""
        self._send({"name": name, "fields": fields, "sock": sock is not None}, sock)

    async def ask(self, name: str, **fields: Any) -> Any:
        """What the handler there returns. Raises ControlClosed."""
        if self.closed:
            raise ControlClosed
        number = next(self._numbers)
        answer = self._asked[number] = self._loop.create_future()
        self._send({"name": name, "fields": fields, "number": number})
        try:
            return await answer
        finally:
            self._asked.pop(number, None)

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        for sock in (*self._received_sockets, *(sock for _, sock in self._unsent)):
            if sock is not None:
                sock.close()
        self._unsent.clear()
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(ControlClosed())
                answer.exception()

    # ---- sending

    def _send(self, message: dict[str, Any], sock: socket.socket | None = None) -> None:
        if self.closed:
            if sock is not None:
                sock.close()
            return
        text = json.dumps(message).encode()
        self._unsent.append((memoryview(_SIZE.pack(len(text)) + text), sock))
        self._flush()

    def _flush(self) -> None:
        while self._unsent:
            data, sock = self._unsent[0]
            try:
                count = socket.send_fds(
                    self._socket, [data], [] if sock is None else [sock.fileno()]
                )
            except BlockingIOError:
                self._loop.add_writer(self._socket, self._flush)
                return
            except OSError:  # its end is read
                break
            if sock is not None:
                sock.close()
            self._unsent.popleft()
            if count < len(data):
                self._unsent.appendleft((data[count:], None))
        self._loop.remove_writer(self._socket)

    # ---- receiving

    def _on_readable(self) -> None:
        try:
            data, filenos, _, _ = socket.recv_fds(self._socket, _MOST_BYTES, _MOST_SOCKETS)
        except BlockingIOError:
            return
        except OSError:
            data, filenos = b"", []
        self._received_sockets += (_socket_of(fileno) for fileno in filenos)
        if not data:
            self.close()
            self._on_end()
            return
        self._received += data
        while not self.closed and (text := self._next_message()) is not None:
            self._take(json.loads(text))

    def _next_message(self) -> bytes | None:
        if len(self._received) < _SIZE.size:
            return None
        (size,) = _SIZE.unpack_from(self._received)
        end = _SIZE.size + size
        if len(self._received) < end:
            return None
        text = bytes(self._received[_SIZE.size : end])
        del self._received[:end]
        return text

    def _take(self, message: dict[str, Any]) -> None:
        if "answer" in message:
            answer = self._asked.get(message["number"])
            if answer is not None and not answer.done():
                answer.set_result(message["answer"])
            return
        fields = message["fields"]
        if message.get("sock"):
            fields["sock"] = self._received_sockets.popleft()
        value = self._handlers[message["name"]](**fields)
        if (number := message.get("number")) is not None:
            task = asyncio.ensure_future(self._answer(value, number))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, value: Any, number: int) -> None:
        if inspect.isawaitable(value):
            value = await value
        self._send({"answer": value, "number": number})


def _socket_of(fileno: int) -> socket.socket:
    os.set_inheritable(fileno, False)
    return socket.socket(fileno=fileno)
