"""Exactly once, whatever is killed whenever: real SIGKILLs on driver, CLIP actors, tasks and raylet."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.toyworld import scenes as toyworld

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
TARGETS = {
    "actor": ("ray::MapWorker",),
    "task": ("ray::MapBatches", "ray::IDLE"),  # decode and write in the same workers
    "raylet": ("raylet",),
}
"""How the processes are called that may be killed, besides the driver."""


def _victims(driver: psutil.Process, target: str) -> list[psutil.Process]:
    if target == "driver":
        return [driver]
    found = []
    for process in driver.children(recursive=True):
        try:
            title = " ".join(process.cmdline()[:1])
        except psutil.Error:
            continue
        if Path(title).name.startswith(TARGETS[target]):
            found.append(process)
    return found


def _kill_somewhere(
    driver: subprocess.Popen[bytes], output: Path, target: str, rng: random.Random, deadline: float
) -> bool:
    """Kill one ``target`` at a random moment; whether there was one to kill."""
    if target in ("actor", "task") or rng.random() < 0.7:
        # Most kills fall where rows are being written, the others into the start.
        before = len(list((output / "labels").glob("*.parquet")))
        while driver.poll() is None and len(list((output / "labels").glob("*.parquet"))) == before:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1.5))
    else:
        time.sleep(rng.uniform(0.2, 8))
    if driver.poll() is not None:
        return False
    victims = _victims(psutil.Process(driver.pid), target)
    if not victims:
        return False
    try:
        rng.choice(victims).kill()
    except psutil.NoSuchProcess:
        return False
    return True


def _label_through(
    targets: Sequence[str], folder: Path, environment: dict[str, str], *, count: int, patience_s: float
) -> None:
    """Label ``count`` images, kill the targets one by one meanwhile, and count the rows."""
    images = folder / "images"
    images.mkdir()
    scenes, _, _ = toyworld.generate(11, count, 64)
    for index, scene in enumerate(scenes):
        Image.fromarray(scene).save(images / f"scene_{index:04d}.png")
    (images / "broken.png").write_bytes(b"no image")
    output = folder / "table"
    command = [
        sys.executable, "-m", "jobs.cli", "label", "--images", str(images), "--ontology", "toyworld",
        "--output", str(output), "--recipe", "toy",
        "--set", "scale=[1024, 256]",  # larger than the toy needs: there must be time to be killed in
    ]  # fmt: skip
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"kill seed {seed}")
    rng = random.Random(seed)
    left = list(targets)
    # How often Ray asks whether a raylet is alive; it takes one for dead after five times, 15 s by default.
    environment = environment | {"RAY_health_check_period_ms": "1000"}
    deadline = time.monotonic() + patience_s
    with (folder / "log.txt").open("wb") as log:
        while True:
            assert time.monotonic() < deadline, f"no end in sight, still to be killed: {left}"
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
            while process.poll() is None:
                if not left:
                    process.wait(timeout=max(1.0, deadline - time.monotonic()))
                elif _kill_somewhere(process, output, left[0], rng, deadline):
                    del left[0]
            if process.returncode == 0:
                if not left:
                    break
                _take_some_away(output, rng)
            else:
                assert process.returncode in (1, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGABRT), (
                    folder / "log.txt"
                ).read_text()[-4000:]
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
    _label_through(targets, tmp_path, maskmill_environment, count=300, patience_s=900)


@pytest.mark.long
def test_twenty_kills_lose_and_double_nothing(tmp_path: Path, maskmill_environment: dict[str, str]) -> None:
    # The death of an actor or a task does not end a run, so more of them cost less time.
    targets = ["actor", "driver", "task", "actor", "raylet"] * 4
    _label_through(targets, tmp_path, maskmill_environment, count=600, patience_s=2400)


def _take_some_away(output: Path, rng: random.Random) -> None:
    """The table got whole before all kills were spent: lose most of its parts, as a user's mistake would."""
    parts = sorted((output / "labels").glob("*.parquet"))
    for part in rng.sample(parts, k=max(1, len(parts) * 3 // 4)):
        part.unlink()
