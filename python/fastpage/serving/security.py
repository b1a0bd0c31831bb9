"""Who may ask, and over what: TLS certificates and bearer tokens, for every server."""

from __future__ import annotations

import argparse
import hmac
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ssl

_logger = logging.getLogger("fastpage.serving")


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Security", "all files are PEM; none of it is on by default")
    group.add_argument(
        "--tls-cert", metavar="FILE", help="the server's certificate, and those that vouch for it"
    )
    group.add_argument("--tls-key", metavar="FILE", help="its private key")
    group.add_argument(
        "--tls-client-ca",
        metavar="FILE",
        help="clients must have a certificate that one of these vouches for (mTLS)",
    )
    group.add_argument(
        "--auth-token-file",
        metavar="FILE",
        help="requests must bring a line of this file: 'authorization: Bearer LINE'; health checks "
        "need not",
    )


@dataclass(frozen=True)
class TlsFiles:
    cert: Path
    key: Path
    client_ca: Path | None = None

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> TlsFiles | None:
        """None if there is to be no TLS. Raises ValueError: one line that names the option."""
        cert, key, client_ca = options.tls_cert, options.tls_key, options.tls_client_ca
        if cert is None and key is None and client_ca is None:
            return None
        if cert is None or key is None:
            missing = "--tls-cert" if cert is None else "--tls-key"
            raise ValueError(f"{missing} is missing: TLS needs --tls-cert and --tls-key")
        files = cls(Path(cert), Path(key), None if client_ca is None else Path(client_ca))
        files.check()
        return files

    def check(self) -> None:
        """Raises ValueError for files that are missing or not what they should be: TLS libraries
        would say so, if at all, when the first client comes."""
        import ssl

        for option, path in (
            ("--tls-cert", self.cert),
            ("--tls-key", self.key),
            ("--tls-client-ca", self.client_ca),
        ):
            if path is not None:
                _read(option, path)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # Without a password OpenSSL would ask the terminal for one.
            context.load_cert_chain(self.cert, self.key, password="")
        except (ssl.SSLError, ValueError, OSError):
            raise ValueError(
                f"--tls-cert {self.cert} and --tls-key {self.key} are no certificate and its key "
                "in PEM (the key without a password)"
            ) from None
        if self.client_ca is not None:
            try:
                context.load_verify_locations(self.client_ca)
            except (ssl.SSLError, OSError):
                raise ValueError(f"--tls-client-ca {self.client_ca} has no certificates") from None

    def server_context(self) -> ssl.SSLContext:
        """For servers that Python's own TLS stands before. Files that are replaced count from the
        next connection on; as long as they do not fit together, the old ones do."""
        modified = self.modified()  # first: what is replaced meanwhile is read again
        first = newest = self._context()

        def look_again(connection: Any, name: str | None, context: Any) -> None:
            nonlocal modified, newest
            try:
                now = self.modified()
                if now != modified:
                    self.check()
                    newest, modified = self._context(), now
            except (OSError, ValueError) as error:
                _logger.warning("the new TLS files are not used: %s", error)
            connection.context = newest

        first.sni_callback = look_again
        return first

    def _context(self) -> ssl.SSLContext:
        import ssl

        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.set_alpn_protocols(["http/1.1"])
        context.load_cert_chain(self.cert, self.key, password="")
        if self.client_ca is not None:
            context.load_verify_locations(self.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def modified(self) -> tuple[int, ...]:
        """Another value when a file has been replaced."""
        paths = [path for path in (self.cert, self.key, self.client_ca) if path is not None]
        return tuple(path.stat().st_mtime_ns for path in paths)


class BearerTokens:
    """What clients may bring as `authorization: Bearer TOKEN`: several, so that one can be replaced
    by another while both are in use."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = [token.encode() for token in tokens]

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> BearerTokens | None:
        """None if everybody may ask. Raises ValueError: one line that names the option."""
        if options.auth_token_file is None:
            return None
        text = read_text("--auth-token-file", Path(options.auth_token_file))
        tokens = [line.strip() for line in text.splitlines() if line.strip()]
        if not tokens:
            raise ValueError(f"--auth-token-file {options.auth_token_file} has no token in it")
        return cls(tokens)

    def accept(self, authorization: str | bytes | None) -> bool:
        """`authorization` is the header's value. Takes as long for a wrong token as for a right
        one."""
        if authorization is None:
            return False
        if isinstance(authorization, str):
            authorization = authorization.encode()
        scheme, _, token = authorization.partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        token = token.strip()
        # A list: all of them are looked at.
        return any([hmac.compare_digest(token, known) for known in self._tokens])


def read_text(option: str, path: Path) -> str:
    """Raises ValueError: one line that names the option."""
    try:
        return _read(option, path).decode()
    except UnicodeDecodeError:
        raise ValueError(f"{option} {path} is not a text file") from None


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise ValueError(f"{option} {path} cannot be read: {why}") from None
