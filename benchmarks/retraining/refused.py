"""Candidates that must be refused, and how often one is promoted that was only lucky."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.retraining.judging import Cost, judge
from benchmarks.retraining.results import TICK, Result, result_of
from benchmarks.retraining.world import MANY, World
from pipeline.table.labels import LABEL_SCHEMA, decode_confidence, decode_mask, ok_row
from pipeline.toyworld.captions import CLASSES

Rows = list[dict[str, Any]]
LOST_CLASS = "orange"
LONGER = 3 * MANY
"""Steps of a candidate that is better on the whole, although it has lost a class."""
_MAPS = ("mask", "confidence", "segments", "quality")


def shuffled(world: World, rng: random.Random) -> Cost:
    """Every image has the labels of another one: a sound table, with the usual shares of the classes."""

    def spoil(rows: Rows) -> Rows:
        order = rng.sample(range(len(rows)), len(rows))
        return [row | {name: rows[at][name] for name in _MAPS} for row, at in zip(rows, order, strict=True)]

    world.begin("verify")
    result, cost = _tick_on(world, spoil)
    cost.add("wrong", "gain" not in result.failed, f"refused for {result.failed}, not for its gain")
    return cost


def without_class(world: World, rng: random.Random) -> Cost:
    """One class is called by the name of another; for the others the candidate trains longer than before."""
    lost = CLASSES.index(LOST_CLASS)
    instead = CLASSES.index("grass")

    def spoil(rows: Rows) -> Rows:
        return [renamed(row, lost, instead) for row in rows]

    world.begin("verify")
    world.configure(LONGER, gate={"max_seconds_ratio": None})
    result, cost = _tick_on(world, spoil)
    named = f"{LOST_CLASS} from" in result.text("classes")
    cost.add("wrong", result.failed != ["classes"] or not named, f"refused for {result.failed}: "
             f"{result.text('classes')} {result.text('gain')}")  # fmt: skip
    return cost


def renamed(row: dict[str, Any], lost: int, instead: int) -> dict[str, Any]:
    """A row whose pixels of one class have another one."""
    labels = decode_mask(row["mask"]["bytes"])
    return ok_row(
        **{name: row[name] for name in ("id", "uri", "sha256", "height", "width", "version")},
        labels=np.where(labels == lost, labels.dtype.type(instead), labels),
        confidence=decode_confidence(row["confidence"]["bytes"]),
        ignore_index=255,
    )


def _tick_on(world: World, spoil: Callable[[Rows], Rows]) -> tuple[Result, Cost]:
    """A tick whose driver is killed once the labels are written, and whose labels are spoilt then."""
    if world.at(TICK).step("label").state != "done":  # the moment was not caught
        command = world.tick()
        world.wait_for(command, "verify")
        command.kill()
    stopped = world.attempts()
    folder = Path(world.at(TICK).step("label").outputs["table"]) / "labels"
    parts = {part: pq.read_table(part).to_pylist() for part in sorted(folder.glob("*.parquet"))}
    spoilt = iter(spoil([row for rows in parts.values() for row in rows]))
    for part, rows in parts.items():
        pq.write_table(pa.Table.from_pylist([next(spoilt) for _ in rows], LABEL_SCHEMA), part)
    world.finish(world.tick, 0, 3)
    result = result_of(world.storage)
    return result, judge(world, champion="1", stopped=stopped)
