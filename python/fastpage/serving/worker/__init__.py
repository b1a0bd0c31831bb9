"""vllm.grpc.engine.VllmEngine: the protocol by which gateways drive a worker (extra `smg`)."""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastpage.serving.worker.service import VllmEngineService

_logger = logging.getLogger("fastpage.serving")


def create_worker_service(slow_client_timeout: float = 60.0) -> VllmEngineService | None:
    """None if the extra is not installed. The engine that it is given needs enable_kv_events."""
    if importlib.util.find_spec("smg_grpc_proto") is None:
        return None
    try:
        from fastpage.serving.worker.service import VllmEngineService
    except (ImportError, RuntimeError, TypeError) as error:
        # Made for other versions of grpcio or protobuf; a common.proto of somebody else's.
        _logger.warning("vllm.grpc.engine.VllmEngine is not served: smg-grpc-proto: %s", error)
        return None
    return VllmEngineService(slow_client_timeout)
