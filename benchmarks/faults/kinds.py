"""All kinds of faults, by name."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from benchmarks.faults import corpus, leases, nodes, object_stores, processes, storage, tracking, training
from benchmarks.faults.world import Injected, World

Inject = Callable[[World, random.Random, int], Injected]
"""Injects between one and so many faults, at random moments, and judges what they cost."""

KINDS: Mapping[str, Inject] = {
    "driver": processes.driver,
    "actor": processes.actor,
    "task": processes.task,
    "raylet": processes.raylet,
    "gcs": processes.gcs,
    "sigterm": processes.sigterm,
    "ctrl_c": processes.ctrl_c,
    "poison_decode": processes.poison_decode,
    "poison_label": processes.poison_label,
    "node": nodes.node,
    "two_runs": leases.two_runs,
    "stale_lease": leases.stale_lease,
    "clock_skew": leases.clock_skew,
    "disk_full": storage.disk_full,
    "half_written": storage.half_written,
    "corrupt_part": storage.corrupt_part,
    "output_deleted": storage.output_deleted,
    "manifest_edited": corpus.manifest_edited,
    "images_edited": corpus.images_edited,
    "images_vanished": corpus.images_vanished,
    "images_replaced": corpus.images_replaced,
    "s3_503": object_stores.s3_503,
    "s3_denied": object_stores.s3_denied,
    "s3_expired": object_stores.s3_expired,
    "s3_cut": object_stores.s3_cut,
    "mlflow": tracking.mlflow,
    "train_worker": training.worker,
    "train_node": nodes.train_node,
    "train_disk_full": training.disk_full,
    "train_checkpoint_torn": training.checkpoint_torn,
}
