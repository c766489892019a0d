"""Exactly once, whatever is killed whenever: real SIGKILLs on driver, CLIP actors, tasks and raylet."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks.faults.processes import label_through
from benchmarks.faults.runs import Command
from pipeline.toyworld import scenes as toyworld

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def _label_through(targets: Sequence[str], folder: Path, environment: dict[str, str], *, count: int) -> None:
    """Label ``count`` images, kill the targets one by one meanwhile, and count the rows."""
    images = folder / "images"
    images.mkdir()
    scenes, _, _ = toyworld.generate(11, count, 64)
    for index, scene in enumerate(scenes):
        Image.fromarray(scene).save(images / f"scene_{index:04d}.png")
    (images / "broken.png").write_bytes(b"no image")
    output = folder / "table"
    command = [
        "label", "--images", str(images), "--ontology", "toyworld", "--output", str(output),
        "--recipe", "toy",
        "--set", "scale=[1024, 256]",  # larger than the toy needs: there must be time to be killed in
    ]  # fmt: skip
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"kill seed {seed}")
    # How often Ray asks whether a raylet is alive; it takes one for dead after five times, 15 s by default.
    environment = environment | {"RAY_health_check_period_ms": "1000"}
    label_through(
        lambda: Command(command, environment, folder / "log.txt"), output, targets, random.Random(seed)
    )
    rows = Counter(
        uri
        for part in (output / "labels").glob("*.parquet")
        for uri in pq.read_table(part)["uri"].to_pylist()
    )
    assert sorted(rows) == sorted(map(str, images.iterdir()))
    assert set(rows.values()) == {1}
    assert all(path.suffix == ".parquet" for path in (output / "labels").iterdir())


def test_a_kill_of_each_process_loses_and_doubles_nothing(
    tmp_path: Path, maskmill_environment: dict[str, str]
) -> None:
    targets = ["task", "actor", "driver", "raylet"]
    _label_through(targets, tmp_path, maskmill_environment, count=300)


@pytest.mark.long
def test_twenty_kills_lose_and_double_nothing(tmp_path: Path, maskmill_environment: dict[str, str]) -> None:
    # The death of an actor or a task does not end a run, so more of them cost less time.
    targets = ["actor", "driver", "task", "actor", "raylet"] * 4
    _label_through(targets, tmp_path, maskmill_environment, count=600)
