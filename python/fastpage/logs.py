"""What the servers, and the engine's process behind them, log: to stderr, as text for people or as
one JSON object a line.

A record may carry more than its message: `extra={"fields": {"request_id": ...}}`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")

# Whatever else goes in quotes: a client chooses its request ids.
_PLAIN = re.compile(r"[\w.:/@+-]+")


@dataclass(frozen=True)
class LogConfig:
    level: str = "info"
    format: str = "text"


_configured: LogConfig | None = None


def configure(config: LogConfig) -> None:
    """For this process: of all loggers, fastpage's and others'. Replaces what was there."""
    global _configured
    _configured = config
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(config))
    level = logging.getLevelName(config.level.upper())
    # What the libraries say to their own developers is of no use here.
    logging.basicConfig(handlers=[handler], level=max(level, logging.INFO), force=True)
    logging.getLogger("fastpage").setLevel(level)
    logging.captureWarnings(True)
    sys.excepthook = _log_exception


def configured() -> dict[str, str] | None:
    """Arguments of LogConfig, for a process that is to log as this one does. None: as Python does
    by itself."""
    return None if _configured is None else asdict(_configured)


def announce(text: str, level: int = logging.INFO) -> None:
    """What people and programs that start a server wait for: on stdout, or stderr if it is an
    error. As it is, or, in the JSON format, as a JSON line, too."""
    config = _configured or LogConfig()
    if config.format == "json":
        record = logging.LogRecord("fastpage", level, "", 0, text, None, None)
        text = _formatter(config).format(record)
    print(text, file=sys.stderr if level >= logging.ERROR else sys.stdout, flush=True)


def _formatter(config: LogConfig) -> logging.Formatter:
    return _JsonFormatter() if config.format == "json" else _TextFormatter()


def _log_exception(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    logging.getLogger("fastpage").critical("uncaught", exc_info=(kind, error, traceback))


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields


def _time(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"


class _TextFormatter(logging.Formatter):
    """2026-01-31T12:00:00.123Z INFO fastpage.requests: message request_id=abc n=1"""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_time(record)} {record.levelname} {record.name}: {record.getMessage()}"
        for name, value in _fields(record).items():
            line += f" {name}={_quoted(value)}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": os.getpid(),
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def _quoted(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
