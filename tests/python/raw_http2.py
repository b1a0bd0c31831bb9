"""HTTP/2 by hand, to send half of it."""

from __future__ import annotations

import socket
import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, CONTINUATION = 0, 1, 3, 4, 6, 7, 9
END_STREAM, END_HEADERS, ACK = 1, 4, 1
INITIAL_WINDOW_SIZE = 4


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack("!I", len(payload))[1:] + struct.pack("!BBI", kind, flags, stream) + payload


def settings(**values: int) -> bytes:
    numbers = {"initial_window_size": INITIAL_WINDOW_SIZE}
    payload = b"".join(struct.pack("!HI", numbers[name], value) for name, value in values.items())
    return frame(SETTINGS, 0, 0, payload)


def call_headers(path: str, stream: int, flags: int = END_HEADERS) -> bytes:
    """The beginning of a gRPC call."""
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    block = b""
    for name, value in headers.items():  # literals that no table keeps
        block += b"\0" + bytes([len(name)]) + name.encode()
        block += bytes([len(value)]) + value.encode()
    return frame(HEADERS, flags, stream, block)


def call_message(message: bytes, stream: int, flags: int = END_STREAM) -> bytes:
    return frame(DATA, flags, stream, b"\0" + len(message).to_bytes(4, "big") + message)


def connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)))


def read_frame(connection: socket.socket) -> tuple[int, int, bytes]:
    """Its kind, flags and payload. EOFError: there is none any more."""
    head = _read(connection, 9)
    return head[3], head[4], _read(connection, int.from_bytes(head[:3], "big"))


def _read(connection: socket.socket, size: int) -> bytes:
    data = connection.recv(size, socket.MSG_WAITALL)
    if len(data) < size:
        raise EOFError
    return data


def reset(connection: socket.socket) -> None:
    """Closes it with a TCP reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
