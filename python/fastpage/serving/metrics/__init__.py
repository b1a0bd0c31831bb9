"""Prometheus metrics of an AsyncEngine: plain numbers, rendered when they are scraped."""

from fastpage.serving.metrics.exposition import Exposition
from fastpage.serving.metrics.recorder import EngineMetrics

__all__ = ["EngineMetrics", "Exposition"]
