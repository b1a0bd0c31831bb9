"""The port of a grpc server: where it listens, with what certificate, and why it cannot."""

from __future__ import annotations

import contextlib
import logging
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

import grpc

from fastpage.errors import FastpageError
from fastpage.serving.security import TlsFiles

_logger = logging.getLogger("fastpage.serving.grpc")


@dataclass(frozen=True)
class Address:
    """A host and a port, or a Unix socket."""

    host: str = "127.0.0.1"
    port: int = 0  # the system's choice
    unix: str = ""  # "unix:PATH" or "unix-abstract:NAME", instead

    def __post_init__(self) -> None:
        """Raises ValueError for what can be no address."""
        if not 0 <= self.port < 65536:
            raise ValueError(f"--port {self.port} is not between 0 and 65535")
        scheme, _, name = self.unix.partition(":")
        if self.unix and (scheme not in ("unix", "unix-abstract") or not name):
            raise ValueError(f"--address {self.unix} is neither unix:PATH nor unix-abstract:NAME")

    def __str__(self) -> str:
        if self.unix:
            return self.unix
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def listen(server: grpc.aio.Server, address: Address, tls: TlsFiles | None) -> Address:
    """Returns the address with the port that was chosen. Raises FastpageError."""
    if address.unix:
        _refuse_socket_in_use(address)
    try:
        if tls is None:
            port = server.add_insecure_port(str(address))
        else:
            port = server.add_secure_port(str(address), _credentials(tls))
    except RuntimeError:
        port = 0
    if port == 0:
        raise FastpageError(f"cannot listen on {address}: {_why_not(address)}")
    return address if address.unix else Address(address.host, port)


def _refuse_socket_in_use(address: Address) -> None:
    """grpc removes whatever socket lies at its path, one that another server listens at too."""
    path = _socket_path(address)
    if path is None or not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise FastpageError(f"cannot listen on {address}: there is a file that is not a socket")
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.setblocking(False)
        # One that takes no connection for now is another server, too.
        with contextlib.suppress(BlockingIOError):
            probe.connect(str(path))
        raise FastpageError(f"cannot listen on {address}: another server does")


def _socket_path(address: Address) -> Path | None:
    scheme, _, name = address.unix.partition(":")
    if scheme != "unix":
        return None
    return Path(name[2:] if name.startswith("//") else name)


def _why_not(address: Address) -> str:
    """What the system says when asked for it directly; grpc does not pass it on."""
    try:
        if address.unix:
            path = _socket_path(address)
            name = "\0" + address.unix.partition(":")[2] if path is None else str(path)
            with socket.socket(socket.AF_UNIX) as probe:
                probe.bind(name)
            if path is not None:
                path.unlink()
        else:
            found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
            family, kind, proto, _, where = found[0]
            with socket.socket(family, kind, proto) as probe:
                probe.bind(where)
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return "the address is not usable"


def _credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    """Files that are replaced count from the next connection on."""
    current = tls.modified()

    def look_again() -> grpc.ServerCertificateConfiguration | None:
        # Called on grpc's threads; a file that is half written is looked at again later.
        nonlocal current
        try:
            modified = tls.modified()
            if modified == current:
                return None
            tls.check()
            configuration = _configuration(tls)
        except (OSError, ValueError) as error:
            _logger.warning("the new TLS files are not used: %s", error)
            return None
        current = modified
        _logger.info("TLS certificates read again")
        return configuration

    return grpc.dynamic_ssl_server_credentials(
        _configuration(tls), look_again, require_client_authentication=tls.client_ca is not None
    )


def _configuration(tls: TlsFiles) -> grpc.ServerCertificateConfiguration:
    roots = None if tls.client_ca is None else tls.client_ca.read_bytes()
    return grpc.ssl_server_certificate_configuration(
        [(tls.key.read_bytes(), tls.cert.read_bytes())], roots
    )
