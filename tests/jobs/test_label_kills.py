"""Exactly once, whatever is killed whenever: real SIGKILLs on driver, CLIP actors and raylet."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.toyworld import scenes as toyworld

pytestmark = [pytest.mark.cluster, pytest.mark.long]

ROOT = Path(__file__).resolve().parents[2]
KILLS = 20
IMAGES = 600


def _victims(driver: psutil.Process, target: str) -> list[psutil.Process]:
    if target == "driver":
        return [driver]
    wanted = {"raylet": "raylet", "actor": "ray::MapWorker"}[target]
    found = []
    for process in driver.children(recursive=True):
        try:
            title = " ".join(process.cmdline()[:1])
        except psutil.Error:
            continue
        if title.startswith(wanted) or Path(title).name == wanted:
            found.append(process)
    return found


def _kill_somewhere(
    driver: subprocess.Popen[bytes], output: Path, target: str, rng: random.Random, deadline: float
) -> bool:
    """Kill one ``target`` at a random moment; whether there was one to kill."""
    if target == "actor" or rng.random() < 0.7:
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


def test_twenty_kills_lose_and_double_nothing(tmp_path: Path, maskmill_environment: dict[str, str]) -> None:
    images = tmp_path / "images"
    images.mkdir()
    scenes, _, _ = toyworld.generate(11, IMAGES, 64)
    for index, scene in enumerate(scenes):
        Image.fromarray(scene).save(images / f"scene_{index:04d}.png")
    (images / "broken.png").write_bytes(b"no image")
    output = tmp_path / "table"
    command = [
        sys.executable, "-m", "jobs.cli", "label", "--images", str(images), "--ontology", "toyworld",
        "--output", str(output), "--recipe", "toy",
        "--set", "scale=[1024, 256]",  # larger than the toy needs: there must be time to be killed in
    ]  # fmt: skip
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"kill seed {seed}")
    rng = random.Random(seed)
    # The death of an actor does not end a run, so more of them cost less time.
    targets = ["actor", "driver", "actor", "actor", "raylet"] * KILLS
    killed: Counter[str] = Counter()
    # How often Ray asks whether a raylet is alive; it tells of a dead one after five times, 15 s as it comes.
    environment = maskmill_environment | {"RAY_health_check_period_ms": "1000"}
    log = (tmp_path / "log.txt").open("wb")
    deadline = time.monotonic() + 2400
    runs = 0
    while True:
        assert time.monotonic() < deadline, f"no end in sight after {runs} runs, killed {killed}"
        runs += 1
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        while process.poll() is None:
            if sum(killed.values()) < KILLS:
                target = targets[sum(killed.values())]
                killed[target] += _kill_somewhere(process, output, target, rng, deadline)
            else:
                process.wait(timeout=max(1.0, deadline - time.monotonic()))
        if process.returncode == 0:
            if sum(killed.values()) >= KILLS:
                break
            _take_some_away(output, rng)
        else:
            assert process.returncode in (1, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGABRT), (
                tmp_path / "log.txt"
            ).read_text()[-4000:]
    log.close()

    assert sum(killed.values()) == KILLS and set(killed) == {"driver", "actor", "raylet"}
    rows = Counter(
        uri
        for part in (output / "labels").glob("*.parquet")
        for uri in pq.read_table(part)["uri"].to_pylist()
    )
    assert sorted(rows) == sorted(map(str, images.iterdir()))
    assert set(rows.values()) == {1}
    assert not list((output / "checkpoint").glob("*.pending.parquet"))


def _take_some_away(output: Path, rng: random.Random) -> None:
    """The table got whole before all kills were spent: lose most of its parts, as a user's mistake would."""
    parts = sorted((output / "labels").glob("*.parquet"))
    for part in rng.sample(parts, k=max(1, len(parts) * 3 // 4)):
        part.unlink()
