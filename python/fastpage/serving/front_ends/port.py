"""One port for several processes."""

from __future__ import annotations

import socket

from fastpage.errors import FastpageError


def reserve_port(host: str, port: int) -> socket.socket:
    """A socket that holds the port (0: the system's choice) and takes no connections. Processes of
    this user that ask for SO_REUSEPORT may listen there. Raises FastpageError if somebody has the
    port already, even with SO_REUSEPORT: two servers are not to share it."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        held = socket.socket(family, kind, proto)
        try:
            # Of connections that linger, nobody has the port.
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind(address)
            # From now on, nobody else may take it for such a one.
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        except OSError:
            held.close()
            raise
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise FastpageError(f"cannot listen on {host}:{port}: {why}") from None
    return held
