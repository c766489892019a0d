"""What a labelling run reads: lists edited between runs, images edited, gone or replaced in mid-run."""

from __future__ import annotations

import functools
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults.processes import wait_for_parts
from benchmarks.faults.world import Injected, Verdict, World, wrong
from pipeline.corpus.manifest import build_manifest, write_manifest

Lines = list[str]


def _shuffled(rng: random.Random, lines: Lines) -> Lines:
    return rng.sample(lines, len(lines))


def _shortened(rng: random.Random, lines: Lines) -> Lines:
    return rng.sample(lines, rng.randint(1, len(lines)))


def _repeated(rng: random.Random, lines: Lines) -> Lines:
    return lines + rng.choices(lines, k=rng.randint(1, 10))


def _respelled(rng: random.Random, lines: Lines) -> Lines:
    """The same places by other spellings."""
    return [
        rng.choice((line, f"file://{line}", f"{os.path.dirname(line)}/./{os.path.basename(line)}"))
        for line in lines
    ]


def _commented(rng: random.Random, lines: Lines) -> Lines:
    return [word for line in lines for word in rng.choice(([line], ["# note", line], ["", line]))]


EDITS: tuple[Callable[[random.Random, Lines], Lines], ...] = (
    _shuffled, _shortened, _repeated, _respelled, _commented,
)  # fmt: skip


def manifest_edited(world: World, rng: random.Random, most: int) -> Injected:
    """A list or a manifest is edited between runs; what has a row keeps it, what is new gets one."""
    times, verdict = min(most, 8), Verdict()
    whole = world.everything.read_text().splitlines()
    source = world.folder("list").with_suffix(".txt")
    table = world.copy_of_reference()
    for number in range(times):
        if number % 4 == 3:
            verdict = verdict.plus(_forged(world, table, rng))
            continue
        # Of what is listed last, some is labelled already, and some is new.
        last = 0 < number == times - 1
        if last:
            for part in rng.sample(sorted((table / "labels").iterdir()), 3):
                part.unlink()
        source.write_text("\n".join(rng.choice(EDITS[:1] if last else EDITS)(rng, whole)) + "\n")
        command = world.label(table, images=source, pace_s=0)
        command.expect(0)
        if not last and "Nothing new" not in command.said:
            verdict = verdict.plus(wrong(f"after an edit of the list: {command.said[-500:]}"))
    world.finish(table, images=world.everything)
    return Injected(times, verdict.plus(world.judge_copy(table)))


def _forged(world: World, table: Path, rng: random.Random) -> Verdict:
    """A manifest with an id that belongs to another image is refused, and nothing is done."""
    import pyarrow as pa

    path = world.folder("manifest").with_suffix(".parquet")
    manifest = build_manifest(world.images)
    ids = manifest["id"].to_pylist()
    at = rng.randrange(len(ids))
    ids[at] = rng.choice((ids[at] + 1, ids[at - 1]))
    write_manifest(manifest.set_column(0, "id", pa.array(ids, pa.int64())), path)
    command = world.run(
        "label", "--manifest", path, "--ontology", "toyworld", "--recipe", "toy", "--output", table
    )
    status = command.wait()
    refused = status == 2 and "dataset_invalid" in command.said
    return Verdict() if refused else wrong(f"a forged id ended with {status}: {command.said[-500:]}")


def _disturbed(
    disturb: Callable[[World, random.Random, Path], None], world: World, rng: random.Random, most: int
) -> Injected:
    """Disturb images in mid-run; ``--changed`` then labels again those whose rows are of other content."""
    times = min(most, 8)
    images = world.folder("disturbed")
    shutil.copytree(world.images, images)
    output = world.folder("of-disturbed")
    command = world.label(output, images=images)
    wait_for_parts(command, output, 1)
    for path in rng.sample(sorted(images.glob("scene_*.png")), times):
        disturb(world, rng, path)
        time.sleep(rng.uniform(0, 0.4))
    status = command.expect(0, 1)
    verdict = Verdict() if status == 0 else wrong(f"the run failed: {command.said[-500:]}")
    for path in world.images.iterdir():  # what has gone comes back
        if not (images / path.name).exists():
            shutil.copy(path, images)
    world.finish(output, "--changed", images=images)
    return Injected(times, verdict.plus(world.judge(output, world.expected(images))))


def _edit(world: World, rng: random.Random, path: Path) -> None:
    """Written over in place, and slowly: a reader may see half of it."""
    data = rng.choice(world.spare)
    with path.open("wb", buffering=0) as file:
        file.write(data[: len(data) // 2])
        time.sleep(rng.uniform(0, 0.3))
        file.write(data[len(data) // 2 :])


def _vanish(world: World, rng: random.Random, path: Path) -> None:
    path.unlink()


def _replace(world: World, rng: random.Random, path: Path) -> None:
    """Another image takes its name, at once."""
    other = path.with_name(f".{path.name}")
    other.write_bytes(rng.choice(world.spare))
    other.rename(path)


images_edited, images_vanished, images_replaced = (
    functools.partial(_disturbed, disturb) for disturb in (_edit, _vanish, _replace)
)
