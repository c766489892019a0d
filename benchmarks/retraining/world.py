"""What all cases share: a retraining with a champion, on real servers, that can be put back as it was."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import secrets
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import boto3
import numpy as np
import numpy.typing as npt
import yaml
from PIL import Image

from benchmarks.faults.clusters import running_cluster, standing_ray
from benchmarks.faults.mlflow_server import Server
from benchmarks.faults.nodes import ThreeNodes
from benchmarks.faults.object_store import object_store
from benchmarks.faults.runs import Command, Unexpected, plain
from benchmarks.retraining.results import STEPS, TICK, Result, result_of, step_name
from pipeline.files.storage import Storage, open_storage
from pipeline.retraining.registry import CHAMPION
from pipeline.retraining.state import Tick, read_tick
from pipeline.toyworld.scenes import generate

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

NAME = "toys"
SIZE = 64
FIRST, MORE, HELD_OUT = 40, 10, 60
"""Images of the first tick, of the second, and those that are measured on."""
FEW, MANY = 50, 110
"""Steps of the training of the first tick, and of the second, which is therefore better."""
CPUS = 3
BEFORE, AFTER = "before", "after"
"""The retraining with a champion and new images; and after an undisturbed tick that promotes another one."""
LATE = (*(step_name(step) for step in ("evaluate", "gate", "register", "promote", "report")), AFTER)
"""From these on nothing is labelled to be trained on, and no cluster is needed."""
NOTHING: Mapping[str, str] = MappingProxyType({})
LENIENT: Mapping[str, Any] = MappingProxyType({"class_fall": 1, "delta": 0.05})
"""A gate that overlooks single classes. Ids depend on where the images are, and the order of training on ids:
after so few steps the second model is better on the whole everywhere, but in some places worse on a class."""
IN_STORE = 200
"""Steps there of the second training."""
_MOVES = """
CREATE TABLE observed_moves (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT, alias TEXT, version INTEGER);
CREATE TRIGGER observed_insert AFTER INSERT ON registered_model_aliases BEGIN
    INSERT INTO observed_moves (name, alias, version) VALUES (NEW.name, NEW.alias, NEW.version); END;
CREATE TRIGGER observed_update AFTER UPDATE ON registered_model_aliases BEGIN
    INSERT INTO observed_moves (name, alias, version) VALUES (NEW.name, NEW.alias, NEW.version); END;
"""


class World:
    """A retraining on an MLflow server, local or in an object store.

    Args:
        scratch: a folder; what was saved in it before is used again.
        environment: more of it, for all processes.
        bucket: for images and output, in a real S3 server that this process reaches; default: they are local.
        many: steps of the training of the second tick.
        gate: changes to its policy.

    Attributes:
        images: where images arrive.
        output: of the retraining.
        truth: folder of what is measured on, in ``images`` and ``masks``.
        server: MLflow.
        environment: of the commands.
        command: that does a tick.
        caught: steps at whose beginning everything is saved.
    """

    def __init__(
        self,
        scratch: Path,
        environment: Mapping[str, str] = NOTHING,
        *,
        bucket: str | None = None,
        many: int = MANY,
        gate: Mapping[str, Any] = NOTHING,
    ) -> None:
        self.command: tuple[str, ...] = ("retrain", "retrain.yaml")
        self.caught: tuple[str, ...] = tuple(step_name(step) for step in STEPS)
        self._scratch = scratch
        self._reference: Result | None = None
        self._numbers = itertools.count()
        self._commands: list[Command] = []
        self.now = scratch / "now"
        self.now.mkdir(parents=True, exist_ok=True)
        self._bucket = bucket
        self._many = many
        self._gate = dict(gate)
        self.images, self.output, self.truth = (
            f"s3://{bucket}/{name}" if bucket else str(self.now / name)
            for name in ("images", "output", "truth")
        )
        port = scratch / "port"
        self.server = Server(self.now, int(port.read_text()) if port.exists() else None)
        port.write_text(str(self.server.port))
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")
        } | plain(self.now / "cache")
        self.environment |= environment
        if bucket:
            boto3.client("s3").create_bucket(Bucket=bucket)

    def close(self) -> None:
        """Stop the server, and commands that a benchmark which was stopped has left."""
        for command in self._commands:
            if command.runs:
                command.end()
        self.server.kill()

    # --- how it stands ---

    @staticmethod
    def settings(steps: int) -> list[str]:
        """The options of ``maskmill train`` that give such a training."""
        return [word for name, value in _settings(steps).items() for word in ("--set", f"{name}={value}")]

    def begin(self, state: str = BEFORE) -> None:
        """Put everything as it was.

        Args:
            state: ``BEFORE`` or ``AFTER`` an undisturbed tick with new images, or the name of a step: as if
                that tick had been killed when the step began, or the last one before that could be caught.
        """
        if not self._has(BEFORE):
            self._first_tick()
            self._save(BEFORE)
        if state != BEFORE:
            self.reference  # noqa: B018  makes it
        if state not in (BEFORE, AFTER):
            steps = list(self.reference.seconds)
            caught = [step for step in steps[: steps.index(state) + 1] if self._has(step)]
            state = caught[-1] if caught else BEFORE
        self._restore(state)
        if state in LATE:
            # In a cluster, the lease of a run that was killed is waited for, a minute each time.
            self.configure(self._many, address="local")

    @property
    def reference(self) -> Result:
        """What an undisturbed tick comes to."""
        if self._reference is None and self._has(AFTER):
            self._restore(AFTER)
            self._reference = result_of(self.storage)
        if self._reference is None:
            self.begin()
            command = self.tick()
            for step in self.caught:
                if self.wait_for(command, step):
                    # What is there now is what a kill leaves.
                    command.send(signal.SIGSTOP)
                    time.sleep(0.5)  # for the server to finish what it was asked
                    if self.at(TICK).step(step).state == "running":
                        self._save(step)
                    command.send(signal.SIGCONT)
            command.expect(0)
            self._reference = result_of(self.storage)
            self._save(AFTER)
        return self._reference

    def attempts(self) -> list[str]:
        """The steps that have begun and not ended well."""
        return [step.name for step in self.at(TICK).steps if step.state in ("running", "failed")]

    def _first_tick(self) -> None:
        scenes, masks, _ = generate(12, HELD_OUT, SIZE)
        place = open_storage(self.truth)
        for folder, pictures in (("images", scenes), ("masks", masks)):
            for number, picture in enumerate(pictures):
                place.write_bytes(f"{folder}/{number:04}.png", png(picture))
        self.arrive(11, FIRST)
        self.configure(FEW)
        self.server.start()
        with sqlite3.connect(self.now / "server.db") as database:
            database.executescript(_MOVES)
        self.run("retrain", "retrain.yaml").expect(0)
        self.arrive(13, MORE)
        self.configure(self._many)

    def arrive(self, seed: int, count: int) -> None:
        """New images arrive."""
        place = open_storage(self.images)
        for number, scene in enumerate(generate(seed, count, SIZE).images):
            place.write_bytes(f"{seed}-{number:04}.png", png(scene))

    def configure(self, steps: int, **more: Any) -> Path:
        """Write the configuration; returns its path."""
        model = {"kind": "maskclip-plus", "recipe": "toy", "set": _settings(steps)}
        written = {
            "name": NAME,
            "output": self.output,
            "images": self.images,
            "ontology": "toyworld",
            "tracking": self.server.uri,
            "label": {"recipe": "toy"},
            "models": [model],
            "evaluation": {"images": f"{self.truth}/images", "truth": f"{self.truth}/masks"},
            # Many resamples, so that a kill can fall into the gate; times on a busy machine say nothing.
            "gate": {"resamples": 50_000, "max_seconds_ratio": None, **self._gate},
            "workers": 1,
            **more,
        }
        file = self.now / "retrain.yaml"
        file.write_text(yaml.safe_dump(written))
        return file

    def _has(self, state: str) -> bool:
        return (self._scratch / "saved" / state / "whole").exists()

    def _save(self, state: str) -> None:
        saved = self._scratch / "saved" / state
        shutil.rmtree(saved, ignore_errors=True)
        shutil.copytree(self.now, saved / "now")
        if self._bucket:
            for key, data in _objects(self._bucket).items():
                (saved / "bucket" / key).parent.mkdir(parents=True, exist_ok=True)
                (saved / "bucket" / key).write_bytes(data)
        (saved / "whole").touch()

    def _restore(self, state: str) -> None:
        saved = self._scratch / "saved" / state
        # A server takes long to start: its database is overwritten while it runs.
        for entry in self.now.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif not entry.name.startswith("server."):
                entry.unlink()
        with (
            contextlib.closing(sqlite3.connect(saved / "now/server.db")) as there,
            contextlib.closing(sqlite3.connect(self.now / "server.db")) as here,
        ):
            there.backup(here)
        shutil.copytree(
            saved / "now", self.now, ignore=shutil.ignore_patterns("server.*"), dirs_exist_ok=True
        )
        if self._bucket:
            client = boto3.client("s3")
            for key in _objects(self._bucket):
                client.delete_object(Bucket=self._bucket, Key=key)
            for file in (saved / "bucket").rglob("*"):
                if file.is_file():
                    key = file.relative_to(saved / "bucket").as_posix()
                    client.put_object(Bucket=self._bucket, Key=key, Body=file.read_bytes())
        if not self.server.runs:
            self.server.start()

    # --- commands ---

    def run(self, *arguments: object, environment: Mapping[str, str] = NOTHING) -> Command:
        """Start a command where the configuration is."""
        log = self._scratch / f"log-{next(self._numbers)}"
        command = Command([*map(str, arguments)], self.environment | dict(environment), log, self.now)
        self._commands.append(command)
        return command

    def tick(self) -> Command:
        """Start a tick."""
        return self.run(*self.command)

    def finish(self, start: Callable[[], Command], *statuses: int) -> Command:
        """Run the same command until it ends well; returns the last.

        Raises:
            Hung, Unexpected: it did not end, or not well.
        """
        for _ in range(4):
            command = start()
            if command.expect(*statuses, 1) in statuses:
                return command
        raise Unexpected(f"4 runs did not finish: {command.said[-1500:]}")

    def wait_for(self, command: Command, step: str) -> bool:
        """Wait until a tick is at a step; returns whether it was before the command ended."""
        return command.wait_until(lambda: f" {step} …" in command.said, every_s=0.001)

    # --- what it says ---

    @property
    def storage(self) -> Storage:
        """The output."""
        return open_storage(self.output)

    def at(self, run: str) -> Tick:
        """A tick."""
        return read_tick(self.storage, run)

    @property
    def client(self) -> MlflowClient:
        """Of MLflow."""
        from mlflow.tracking import MlflowClient

        return MlflowClient(self.server.uri, registry_uri=self.server.uri)

    @property
    def champion(self) -> str | None:
        """The version that the alias points to."""
        found = self.client.get_registered_model(NAME).aliases.get(CHAMPION)
        return None if found is None else str(found)

    def moves(self) -> list[tuple[str, str]]:
        """(alias, version) of each time that MLflow's database has written an alias."""
        with contextlib.closing(sqlite3.connect(self.now / "server.db")) as database:
            rows = database.execute("SELECT alias, version FROM observed_moves ORDER BY id").fetchall()
        return [(alias, str(version)) for alias, version in rows]


def _settings(steps: int) -> dict[str, Any]:
    """Of a small training."""
    return {
        "augment.scale": [SIZE, SIZE],
        "crop": [SIZE, SIZE],
        "batch_size": 4,
        "width": 8,
        "iterations": steps,
        "guided": [1, -1],
        "self_train": [-1, -1],
        "checkpoint_every": 20,
        "log_every": 1,
    }


def _objects(bucket: str) -> dict[str, bytes]:
    """All that is in a bucket."""
    client = boto3.client("s3")
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
    return {key: client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


def png(picture: npt.NDArray[np.uint8]) -> bytes:
    """A picture as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


class Worlds:
    """The worlds of a benchmark, each made when it is first needed.

    Args:
        scratch: an empty folder.
    """

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._open = contextlib.ExitStack()
        self._made: dict[str, World] = {}
        self._store: dict[str, str] | None = None
        self._ray: dict[str, str] | None = None
        self._nodes: tuple[ThreeNodes, World] | None = None

    def close(self) -> None:
        """Stop everything."""
        self._open.close()

    @property
    def token(self) -> dict[str, str]:
        """Joins the Ray of these worlds."""
        token = os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)
        os.environ["RAY_AUTH_TOKEN"] = token
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}

    @property
    def local(self) -> World:
        """On this disk, with a Ray that outlives the commands."""
        return self._world("local", lambda: World(self._scratch / "local", self._standing(), gate=LENIENT))

    @property
    def in_store(self) -> World:
        """The same with images and output in an object store."""
        return self._world(
            "in-store",
            lambda: World(
                self._scratch / "in-store", self._standing(), bucket="retraining", many=IN_STORE, gate=LENIENT
            ),
        )

    @property
    def growing(self) -> World:
        """An empty place on this disk."""
        return self._world("growing", lambda: World(self._scratch / "growing", self._standing()))

    @property
    def nodes(self) -> tuple[ThreeNodes, World]:
        """The same by ``maskmill submit`` on a cluster: a head without work, and two workers."""
        if self._nodes is None:
            # A job of the cluster is started by the first Python of the path.
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            paced = {**plain(self._scratch / "cache"), **self.store, "FAULTS_PACE_S": "0.3", "PATH": path}
            cluster = self._open.enter_context(running_cluster(paced, dashboard=True))
            joins = {name: cluster.environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
            world = World(self._scratch / "nodes", {**self.store, **joins}, bucket="nodes", gate=LENIENT)
            self._open.callback(world.close)
            world.command = ("submit", "--again", "--address", cluster.dashboard, *world.command)
            world.caught = ()
            self._nodes = ThreeNodes(cluster), world
        return self._nodes

    @property
    def store(self) -> dict[str, str]:
        """The environment that reaches the object store."""
        if self._store is None:
            self._store = self._open.enter_context(object_store())
        return self._store

    def _standing(self) -> dict[str, str]:
        """The environment that joins a Ray which outlives the commands and reaches the object store."""
        if self._ray is None:
            joins = {**self.token, **self.store}
            environment = {**os.environ, **plain(self._scratch / "cache"), **joins}
            address, _ = self._open.enter_context(standing_ray(environment, cpus=CPUS))
            self._ray = {**joins, "RAY_ADDRESS": address}
        return self._ray

    def _world(self, name: str, make: Callable[[], World]) -> World:
        if name not in self._made:
            self._made[name] = world = make()
            self._open.callback(world.close)
        return self._made[name]
