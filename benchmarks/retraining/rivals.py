"""Others who want the same: a second tick, somebody who moves the alias, a person who rolls back."""

from __future__ import annotations

import random
import signal
import time

from benchmarks.faults.runs import Command, Unexpected
from benchmarks.retraining.judging import Cost, judge
from benchmarks.retraining.results import MODEL
from benchmarks.retraining.world import AFTER, NAME, World
from pipeline.retraining.ledger import Ledger
from pipeline.retraining.registry import CHAMPION


def second_tick(world: World, rng: random.Random) -> Cost:
    """A tick begins while another one runs: it is refused, and told who runs."""
    reference = world.reference
    world.begin()
    first = world.tick()
    world.wait_for(first, rng.choice(("label", f"train {MODEL}")))
    second = world.tick()
    status = second.expect(0, 1)
    ran = first.runs
    first.expect(0)
    cost = judge(world, champion="2", reference=reference)
    named = "output_in_use" in second.said and f"process {first.driver.pid} on " in second.said
    cost.add("wrong", not ran, "the first tick ended before the second was refused")
    cost.add("wrong", status != 1 or not named, f"the second ended with {status}: {second.said[-500:]}")
    third = world.tick()
    cost.add("wrong", third.expect(0, 1) != 0, f"a tick without new images: {third.said[-500:]}")
    return cost


def registry_changed(world: World, rng: random.Random, to: str) -> Cost:
    """Another process moves the alias between evaluation and promotion.

    Args:
        world: is put back.
        rng: chooses the moment.
        to: ``another`` version, ``nothing``, or another one and ``back`` again.
    """
    world.begin(f"gate {MODEL}")
    earlier = world.attempts()
    client = world.client
    other = str(client.copy_model_version(f"models:/{NAME}/1", NAME).version)
    command = world.tick()
    moment = rng.choice((f"gate {MODEL}", f"register {MODEL}"))
    if not world.wait_for(command, moment):
        raise Unexpected(f"the tick ended before {moment}: {command.said[-1500:]}")
    command.send(signal.SIGSTOP)
    if to == "nothing":
        client.delete_registered_model_alias(NAME, CHAMPION)
    else:
        client.set_registered_model_alias(NAME, CHAMPION, other)
    if to == "back":
        client.set_registered_model_alias(NAME, CHAMPION, "1")
    command.send(signal.SIGCONT)
    if to == "back":
        command.expect(0)
        return judge(world, champion="3", allowed=[other], stopped=earlier)
    cost = Cost()
    _left_alone(world, command, other if to == "another" else None, cost)
    _left_alone(world, world.tick(), other if to == "another" else None, cost)
    # A person looks at it, and says what is to be compared with.
    if to == "another":
        _run(world, "promote", world.output, "--version", other, "--force", "--why", "it was moved by hand")
    else:
        client.set_registered_model_alias(NAME, CHAMPION, "1")
    world.finish(world.tick, 0)
    entries = ["promoting", "failed", "promoting", "promoted"]
    tick = [f"{step} {MODEL}" for step in ("evaluate", "gate", "promote", "register")]
    found = judge(world, champion="3", allowed=[other], stopped=[*earlier, *tick], entries=entries)
    found.notes += cost.notes
    found.promoted, found.wrong = found.promoted + cost.promoted, found.wrong + cost.wrong
    return found


def _left_alone(world: World, command: Command, champion: str | None, cost: Cost) -> None:
    """The tick fails, says why, and leaves the alias where somebody else has put it."""
    status = command.expect(0, 1, 3)
    told = status == 1 and "champion_changed" in command.said
    cost.add("wrong", not told, f"a changed registry ended with {status}: {command.said[-500:]}")
    cost.add("promoted", world.champion != champion, f"champion is {world.champion}, not {champion}")


def rolled_back(world: World, rng: random.Random) -> Cost:
    """Rolled back with a kill in the middle, forced, rolled back twice, and once more in vain."""
    world.begin(AFTER)
    cost = Cost()
    before = len(Ledger(world.storage).entries())
    command = world.run("rollback", world.output, "--why", "it is worse at night")
    command.wait_until(lambda: len(Ledger(world.storage).entries()) > before, every_s=0.001)
    time.sleep(rng.uniform(0, 0.05))
    command.kill()
    _run(world, "rollback", world.output, "--why", "it is worse at night")  # or it was done already
    _expect_champion(world, "1", cost, "after a rollback")
    for version, why in (("2", "it was not"), ("1", "it was")):
        _run(world, "promote", world.output, "--version", version, "--force", "--why", why)
        _run(world, "promote", world.output, "--version", version, "--force", "--why", why)
        _expect_champion(world, version, cost, "after it was forced, twice")
    for version, further in (("2", ()), ("2", ()), ("1", ("--to", "1"))):
        _run(world, "rollback", world.output, *further)
        _expect_champion(world, version, cost, "after a rollback")
    last = world.run("rollback", world.output, "--to", "2")
    status = last.expect(0, 2)
    told = status == 2 and "was not champion before" in last.said
    cost.add("wrong", not told, f"nothing before: {status}, {last.said[-500:]}")
    _expect_champion(world, "1", cost, "after a rollback in vain")
    kinds = [entry.kind for entry in Ledger(world.storage).entries()[before:]]
    moves = ("rolled_back", "forced", "forced", "rolled_back", "rolled_back")
    done = [kind for kind in kinds if kind in moves]
    cost.add("doubled", max(0, len(done) - len(moves)), f"entries {kinds}")
    cost.add("lost", max(0, len(moves) - len(done)), f"entries {kinds}")
    aliases = [version for alias, version in world.moves() if alias == CHAMPION]
    expected = ["1", "2", "1", "2", "1", "2", "1"]
    cost.add("doubled", max(0, len(aliases) - len(expected)), f"moves {aliases}")
    cost.add("wrong", aliases != expected and len(aliases) <= len(expected), f"moves {aliases}")
    again = world.tick()
    cost.add("wrong", again.expect(0, 1, 3) != 0, f"a tick without new images: {again.said[-500:]}")
    _expect_champion(world, "1", cost, "after a tick without new images")
    return cost


def _run(world: World, *arguments: object) -> None:
    world.run(*arguments).expect(0)


def _expect_champion(world: World, version: str, cost: Cost, when: str) -> None:
    found = world.champion
    cost.add("promoted", found != version, f"{when} champion is {found}, not {version}")
