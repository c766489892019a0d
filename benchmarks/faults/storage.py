"""The output of a labelling run: full, damaged, deleted."""

from __future__ import annotations

import random
import shutil

from benchmarks.faults.damage import DAMAGES, parts
from benchmarks.faults.disks import fill, mounted
from benchmarks.faults.processes import MOST, take_some_away, wait_for_parts
from benchmarks.faults.world import Injected, Verdict, World, wrong


def disk_full(world: World, rng: random.Random, most: int) -> Injected:
    """Another program takes all room in mid-run, and gives it back later."""
    times, verdict = 0, Verdict()
    with mounted(world.folder("disk"), "size=8m") as disk:
        output, filler = disk / "table", disk / "filler"
        while times < min(most, MOST):
            command = world.label(output)
            wait_for_parts(command, output, rng.randint(1, 3))
            fill(filler)
            status = command.expect(0, 1)
            filler.unlink()
            if status == 0:  # it was done already
                take_some_away(output, rng)
                continue
            times += 1
            if "no space is left" not in command.said:
                verdict = verdict.plus(wrong(f"of a full disk it is said: {command.said[-500:]}"))
        world.finish(output)
        return Injected(times, verdict.plus(world.judge(output)))


def half_written(world: World, rng: random.Random, most: int) -> Injected:
    """A machine goes down while parts are written: their temporary files stay, in part."""
    table = world.copy_of_reference()
    times = min(most, len(parts(table)) - 1)
    for part in rng.sample(parts(table), times):
        data = part.read_bytes()
        half = part.with_name(f".{part.name}.{rng.randrange(1 << 40):x}.tmp")
        half.write_bytes(data[: rng.randrange(len(data))])
        part.unlink()
    world.finish(table, images=world.everything)
    return Injected(times, world.judge_copy(table))


def corrupt_part(world: World, rng: random.Random, most: int) -> Injected:
    """Parts are torn, flipped, copied, renamed, rewritten; found, set aside, and labelled again."""
    table, verdict = world.copy_of_reference(), Verdict()
    chosen = [part for part in parts(table) if b"IDAT" in part.read_bytes()]
    times = min(most, len(chosen) // 2)
    names = rng.sample(sorted(DAMAGES), times)
    for part, name in zip(rng.sample(chosen, times), names, strict=True):
        DAMAGES[name][0](part)
    found = world.run("verify", table, "--images", world.everything, "--repair")
    # It may end with 0: what is there twice is repaired at once.
    if found.expect(0, 1) == 0 and "Nothing is wrong" in found.said:
        verdict = verdict.plus(wrong(f"{', '.join(names)} not found: {found.said[-500:]}"))
    world.finish(table, images=world.everything)
    if world.run("verify", table, "--images", world.everything).wait():
        verdict = verdict.plus(wrong(f"{', '.join(names)} not repaired"))
    shutil.rmtree(table / "set_aside", ignore_errors=True)
    return Injected(times, verdict.plus(world.judge_copy(table)))


def output_deleted(world: World, rng: random.Random, most: int) -> Injected:
    """Somebody deletes the output while a run writes to it."""
    times, output = 0, world.folder("deleted")
    while times < min(most, MOST):
        command = world.label(output)
        times += wait_for_parts(command, output, rng.randint(1, 6))
        shutil.rmtree(output, ignore_errors=True)
        command.expect(0, 1)
    world.finish(output)
    return Injected(times, world.judge(output))
