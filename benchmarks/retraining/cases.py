"""All cases, by name."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping

from benchmarks.retraining import killed, nodes, refused, rivals
from benchmarks.retraining.judging import Cost
from benchmarks.retraining.results import STEPS
from benchmarks.retraining.world import World, Worlds

Case = Callable[[Worlds, random.Random], Cost]
"""Disturbs one tick at random moments, and judges what it has cost."""


def _local(case: Callable[[World, random.Random], Cost]) -> Case:
    return lambda worlds, rng: case(worlds.local, rng)


def _in_store(case: Callable[[World, random.Random], Cost]) -> Case:
    return lambda worlds, rng: case(worlds.in_store, rng)


CASES: Mapping[str, Case] = {
    **{f"driver_{step}": _local(functools.partial(killed.driver, step=step)) for step in STEPS},
    "shuffled_labels": _local(refused.shuffled),
    "lost_class": _local(refused.without_class),
    "registry_another": _local(functools.partial(rivals.registry_changed, to="another")),
    "registry_nothing": _local(functools.partial(rivals.registry_changed, to="nothing")),
    "registry_and_back": _local(functools.partial(rivals.registry_changed, to="back")),
    "mlflow_evaluate": _local(functools.partial(killed.server, step="evaluate")),
    "mlflow_promote": _local(functools.partial(killed.server, step="promote")),
    "second_tick": _local(rivals.second_tick),
    "rolled_back": _local(rivals.rolled_back),
    **{
        f"s3_driver_{step}": _in_store(functools.partial(killed.driver, step=step))
        for step in ("label", "train", "promote")
    },
    "s3_mlflow_register": _in_store(functools.partial(killed.server, step="register")),
    **{f"node_{step}": functools.partial(nodes.lost, step=step) for step in ("label", "train")},
}
