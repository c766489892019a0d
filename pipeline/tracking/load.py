"""The load of this machine as metrics, under the names that MLflow's system metrics page expects."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

SAMPLE_EVERY_S = 5.0
SAMPLES = 2
"""Number of samples averaged into one value."""


def watch_load(
    log_metrics: Callable[[Mapping[str, float | None], int | None], None], done: threading.Event
) -> None:
    """Sample CPU, memory, disk, network and any GPU until ``done`` is set."""
    monitors = _monitors()
    step = 0
    while not done.is_set():
        for _ in range(SAMPLES):
            for monitor in monitors:
                monitor.collect_metrics()
            if done.wait(SAMPLE_EVERY_S):
                break
        values = {f"system/{key}": value for m in monitors for key, value in m.aggregate_metrics().items()}
        for monitor in monitors:
            monitor.clear_metrics()
        log_metrics(values, step)
        step += 1


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        monitors.append(GPUMonitor())
    except Exception:  # no GPU or missing package: MLflow raises various exceptions
        return monitors
    return monitors
