"""Trainings whose workers are killed, whose disk is full, whose newest checkpoints are torn."""

from __future__ import annotations

import functools
import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.faults.disks import fill, mounted
from benchmarks.faults.processes import victims
from benchmarks.faults.runs import Command, Unexpected
from benchmarks.faults.world import NOTHING, OWN, Injected, Verdict, World, wrong

STEPS, EVERY, KEEP = 24, 3, 4
SETTINGS = (
    "augment.scale=[64, 64]", "crop=[64, 64]", f"iterations={STEPS}", "warmup=2", "guided=[1, 12]",
    "self_train=[13, -1]", f"checkpoint_every={EVERY}", f"keep={KEEP}", "log_every=1", "width=8",
    "max_failures=-1",
)  # fmt: skip
RESULTS = ("student.json", "model.safetensors", "report.html", "preview.png")


def train(world: World, output: Path, *more: object, environment: Mapping[str, str] = NOTHING) -> Command:
    """Start to train a student on the reference table."""
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    return world.run(
        "train", "maskclip-plus", "--labels", world.reference, "--output", output, "--recipe", "toy",
        *settings, *more, environment=environment,
    )  # fmt: skip


def finish(start: Callable[[], Command]) -> None:
    """Run the same command until it succeeds.

    Raises:
        Hung, Unexpected: it did not end, or not well.
    """
    for _ in range(4):
        command = start()
        if command.expect(0, 1) == 0:
            return
    raise Unexpected(f"4 trainings did not finish: {command.said[-1500:]}")


def undisturbed(world: World, workers: int, environment: Mapping[str, str] = NOTHING) -> Path:
    """The output of a training that nothing happens to, with this number of workers, on the same cluster.

    On another cluster workers have other numbers of threads, whose sums round differently.
    """
    key = workers, environment.get("RAY_ADDRESS")
    if key not in world.trained:
        output = world.folder("trained")
        train(world, output, "--workers", workers, environment=environment).expect(0)
        world.trained[key] = output
    return world.trained[key]


def checkpoints(output: Path) -> list[int]:
    """Steps of the whole checkpoints of a training."""
    return sorted(int(path.parent.name[5:]) for path in output.glob("checkpoints/step-*/manifest.json"))


def wait_for_checkpoint(command: Command, output: Path, rng: random.Random) -> bool:
    """Wait until there is another checkpoint, and some more; returns whether the training runs on."""
    there = max(checkpoints(output), default=0)
    command.wait_until(lambda: max(checkpoints(output), default=0) > there)
    time.sleep(rng.uniform(0, 0.3))
    return command.runs


def judge(output: Path, reference: Path) -> Verdict:
    """Compare a finished training with an undisturbed one: each step once, and the same weights."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    steps = Counter(json.loads(line)["step"] for line in lines)
    verdict = Verdict(
        lost=len(set(range(1, STEPS + 1)) - set(steps)), doubled=sum(count - 1 for count in steps.values())
    )
    if verdict.lost or verdict.doubled:
        verdict.notes.append(f"steps in metrics.jsonl: {sorted(steps.items())}")
    if (output / "model.safetensors").read_bytes() != (reference / "model.safetensors").read_bytes():
        verdict = verdict.plus(wrong("the trained weights differ"))
    return verdict


def worker(world: World, rng: random.Random, most: int) -> Injected:
    """A training process is killed: all go on from the newest checkpoint."""
    reference, output, left = undisturbed(world, 2), world.folder("train"), min(most, 4)
    start = functools.partial(train, world, output, "--workers", 2)
    times, command = 0, start()
    while times < left and wait_for_checkpoint(command, output, rng):
        found = victims(world.standing[1], "trainer")
        if found:
            rng.choice(found).kill()
            times += 1
    command.expect(0)
    if not times:
        raise Unexpected("the training ended before a worker could be killed")
    return Injected(times, judge(output, reference))


def disk_full(world: World, rng: random.Random, most: int) -> Injected:
    """All room is taken while a training runs, so that a checkpoint cannot be written."""
    reference, verdict, times = undisturbed(world, 0, OWN), Verdict(), 0
    with mounted(world.folder("disk"), "size=64m") as disk:
        output, filler = disk / "train", disk / "filler"
        start = functools.partial(train, world, output, "--workers", 0, environment=OWN)
        while times < min(most, 3):
            command = start()
            if not wait_for_checkpoint(command, output, rng):
                break
            fill(filler)
            times += 1
            status = command.expect(0, 1)
            if status and "no space is left" not in command.said:
                verdict = verdict.plus(wrong(f"of a full disk it is said: {command.said[-500:]}"))
            filler.unlink()
        finish(start)
        return Injected(max(times, 1), verdict.plus(judge(output, reference)))


def _torn(rng: random.Random, folder: Path) -> None:
    file = rng.choice([path for path in sorted(folder.iterdir()) if path.name != "metrics.jsonl"])
    data = file.read_bytes()
    match rng.randrange(4):
        case 0:
            file.write_bytes(data[: rng.randrange(len(data))])
        case 1:
            file.write_bytes(b"")
        case 2:
            file.unlink()
        case 3:
            at = rng.randrange(len(data))
            file.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])


def checkpoint_torn(world: World, rng: random.Random, most: int) -> Injected:
    """The newest checkpoints are torn before a training could write its result."""
    reference, output, times = undisturbed(world, 0, OWN), world.folder("train"), min(most, KEEP)
    shutil.copytree(reference, output)
    for name in RESULTS:
        (output / name).unlink(missing_ok=True)
    for step in checkpoints(output)[-times:]:
        _torn(rng, output / "checkpoints" / f"step-{step:07d}")
    command = train(world, output, "--workers", 0, environment=OWN)
    command.expect(0)
    return Injected(times, judge(output, reference))
