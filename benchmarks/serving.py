"""What the benchmarks of the servers share: server processes, and clients that cost little.

They speak just enough HTTP/2, for gRPC, or HTTP/1.1 to stream calls and to keep what comes, with
its time: they share the cores with the server, and grpcio's own client takes as long for a message
as the server does. Messages are decoded when all calls are done.
"""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_TICKS = os.sysconf("SC_CLK_TCK")


class ServerProcess:
    """A server's command, and the processes that it starts."""

    def __init__(self, module: str, *options: str) -> None:
        self._is_grpc = "openai" not in module
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--port", "0", *options],
            stdout=subprocess.PIPE,
            text=True,
        )
        self.printed = ""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.printed += line
            if listening := re.search(r"listening on (\S+:\d+)", line):
                self.address = listening[1].removeprefix("http://")
                return
        sys.exit(f"error: {module} did not start, exit status {self.process.wait()}")

    def wait_until_serving(self) -> None:
        if not self._is_grpc:
            while not self._is_healthy():
                time.sleep(0.05)
            return
        with grpc.insecure_channel(self.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for response in health.Watch(health_pb2.HealthCheckRequest()):
                if response.status == health_pb2.HealthCheckResponse.SERVING:
                    return

    def _is_healthy(self) -> bool:
        try:
            return urllib.request.urlopen(f"http://{self.address}/health").status == 200
        except urllib.error.HTTPError:
            return False

    def pids(self) -> list[int]:
        """Its own first, then those of its children."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [self.process.pid, *map(int, children.read_text().split())]

    def stop(self) -> str:
        """Returns all that it printed."""
        self.process.send_signal(signal.SIGTERM)
        self.printed += self.process.communicate()[0]
        return self.printed


def cpu_seconds(pid: int) -> float:
    """User and system time that a process has taken so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


@dataclass
class Call:
    """One call's answer: pieces of it with the time.perf_counter() at which they came."""

    began: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    ended: bool = False

    def messages(self) -> list[tuple[float, bytes]]:
        """Each message when its last byte had come."""
        found, rest = [], b""
        for when, piece in self.pieces:
            rest += piece
            while len(rest) >= 5 and len(rest) >= (end := 5 + int.from_bytes(rest[1:5], "big")):
                found.append((when, rest[5:end]))
                rest = rest[end:]
        return found


class StreamingClient:
    """gRPC calls of one request and many responses. Not checked: statuses; a call that failed has
    no messages."""

    _MOST = 2**31 - 1
    _DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
    _END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
    # Of a frame: its length (16 bits, 8 bits), kind, flags, stream.
    _HEADER = struct.Struct("!HBBBI")

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._authority = address
        self._next_stream = 1
        self._calls: dict[int, Call] = {}
        self._received = b""
        self._window = 65535  # of the connection; requests are smaller than a stream's own
        settings = struct.pack("!HI", 4, self._MOST)  # initial window of each stream
        self._socket.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + self._frame(self._SETTINGS, 0, 0, settings)
            + self._frame(self._WINDOW, 0, 0, struct.pack("!I", self._MOST - 65535))
        )

    def close(self) -> None:
        self._socket.close()

    def call_all(self, method: str, requests: list[bytes]) -> list[Call]:
        """Makes all calls at once; returns when all have ended."""
        calls = []
        for request in requests:
            while self._window < len(request) + 5:
                self._receive()
            calls.append(self._call(method, request))
        while self._calls:
            self._receive()
        return calls

    def _call(self, method: str, request: bytes) -> Call:
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        call = self._calls[stream] = Call(time.perf_counter())
        headers = (
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", method.encode()),
            (b":authority", self._authority.encode()),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
        )
        # Each header as a literal that no table keeps.
        block = b"".join(
            b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value
            for name, value in headers
        )
        data = b"\x00" + len(request).to_bytes(4, "big") + request
        self._window -= len(data)
        self._socket.sendall(
            self._frame(self._HEADERS, self._END_HEADERS, stream, block)
            + self._frame(self._DATA, self._END_STREAM, stream, data)
        )
        return call

    def _receive(self) -> None:
        received = self._socket.recv(1 << 15)
        now = time.perf_counter()
        if not received:
            raise ConnectionError("the server closed the connection")
        if self._received:  # the rest of the last time
            received = self._received + received
        begin, end = 0, len(received)
        while end - begin >= 9:
            high, low, kind, flags, stream = self._HEADER.unpack_from(received, begin)
            past = begin + 9 + (high << 8 | low)
            if past > end:
                break
            self._take_in(kind, flags, stream, received[begin + 9 : past], now)
            begin = past
        self._received = received[begin:]

    def _take_in(self, kind: int, flags: int, stream: int, payload: bytes, now: float) -> None:
        if kind == self._DATA:
            self._calls[stream].pieces.append((now, payload))
            if not flags:
                return
        elif kind == self._SETTINGS and not flags & self._ACK:
            self._socket.sendall(self._frame(self._SETTINGS, self._ACK, 0, b""))
        elif kind == self._PING and not flags & self._ACK:
            self._socket.sendall(self._frame(self._PING, self._ACK, 0, payload))
        elif kind == self._WINDOW and stream == 0:
            self._window += int.from_bytes(payload, "big")
        elif kind == self._GOAWAY:
            raise ConnectionError("the server ends the connection")
        ends = kind in (self._DATA, self._HEADERS) and flags & self._END_STREAM
        if ends or kind == self._RESET:
            self._calls.pop(stream).ended = True

    @staticmethod
    def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return (
            struct.pack("!I", len(payload))[1:] + struct.pack("!BBI", kind, flags, stream) + payload
        )


class EventsClient:
    """POSTs that are answered with server-sent events, each over a connection of its own. Not
    checked: statuses; a call that failed has no events."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._host, self._port = host, int(port)

    def call_all(self, path: str, bodies: list[bytes]) -> list[Call]:
        """Makes all calls at once; returns when all have ended."""
        poll = select.epoll()
        calls: dict[int, Call] = {}
        sockets = {}
        for body in bodies:
            connection = socket.create_connection((self._host, self._port))
            connection.sendall(
                b"POST %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                % (path.encode(), len(body), body)
            )
            sockets[connection.fileno()] = connection
            calls[connection.fileno()] = Call(time.perf_counter())
            poll.register(connection, select.EPOLLIN)
        while sockets:
            for fileno, _ in poll.poll():
                received = sockets[fileno].recv(1 << 16)
                if received:
                    calls[fileno].pieces.append((time.perf_counter(), received))
                else:
                    calls[fileno].ended = True
                    poll.unregister(fileno)
                    sockets.pop(fileno).close()
        return list(calls.values())


def events_of(call: Call) -> list[tuple[float, bytes]]:
    """The data of each server-sent event of an answer in HTTP chunks, when its last byte had
    come."""
    found, rest = [], b""
    for when, piece in call.pieces:
        rest += piece
        while (end := rest.find(b"\n\n")) >= 0:
            data = rest[:end].rpartition(b"data: ")[2]
            rest = rest[end + 2 :]
            if data.startswith(b"{"):
                found.append((when, data))
    return found
