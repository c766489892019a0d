"""Exactly once, whatever is killed whenever: real SIGKILLs on driver, CLIP actors, tasks and raylet."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks.faults.processes import label_through
from benchmarks.faults.runs import Command, parts_of
from pipeline.toyworld import scenes as toyworld

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

Run = Callable[..., subprocess.CompletedProcess[str]]


def _label_through(
    targets: Sequence[str], folder: Path, environment: dict[str, str], maskmill_here: Run, *, count: int
) -> None:
    """Label ``count`` images, kill the targets one by one meanwhile, and count the rows.

    ``maskmill status`` knows of the first run that it goes on or was killed, and of the last that it is done.
    """
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
    runs: list[Command] = []

    def status() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(maskmill_here("status", output, "--json").stdout)
        return found

    def start() -> Command:
        if len(runs) == 1 and runs[0].wait() == -signal.SIGKILL:
            found = status()
            # A kill may come after a run has told its end.
            assert found["state"] in ("dead", "finished") and f"run {found['job']['run_id']}" in runs[0].said
            if found["state"] == "dead":
                assert "it was probably killed" in maskmill_here("status", output).stdout
        runs.append(Command(command, environment, folder / "log.txt"))
        if len(runs) == 1:
            assert runs[0].wait_until(lambda: parts_of(output)), runs[0].said
            running = maskmill_here("status", output)
            assert running.returncode == 0, running.stdout
            assert f"process {runs[0].driver.pid} on {os.uname().nodename}" in running.stdout
        return runs[-1]

    label_through(start, output, targets, random.Random(seed))
    rows = Counter(
        uri
        for part in (output / "labels").glob("*.parquet")
        for uri in pq.read_table(part)["uri"].to_pylist()
    )
    assert sorted(rows) == sorted(map(str, images.iterdir()))
    assert set(rows.values()) == {1}
    assert all(path.suffix == ".parquet" for path in (output / "labels").iterdir())
    end = status()
    assert end["state"] == "finished" and end["table"]["images"] == count + 1
    assert end["job"]["run_id"] in runs[-1].said
    assert maskmill_here("verify", output, "--images", images).returncode == 0


def test_a_kill_of_each_process_loses_and_doubles_nothing(
    tmp_path: Path, maskmill_environment: dict[str, str], maskmill_here: Run
) -> None:
    targets = ["task", "actor", "driver", "raylet"]
    _label_through(targets, tmp_path, maskmill_environment, maskmill_here, count=150)


@pytest.mark.long
def test_twenty_kills_lose_and_double_nothing(
    tmp_path: Path, maskmill_environment: dict[str, str], maskmill_here: Run
) -> None:
    # The death of an actor or a task does not end a run, so more of them cost less time.
    targets = ["actor", "driver", "task", "actor", "raylet"] * 4
    _label_through(targets, tmp_path, maskmill_environment, maskmill_here, count=600)
