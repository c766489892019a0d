"""A retraining for tests: its output, and a registered model on a real registry."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.files.records import now
from pipeline.files.storage import Storage, open_storage
from pipeline.retraining import registry
from pipeline.retraining.ledger import Entry, Ledger
from pipeline.retraining.record import RetrainedModel, RetrainingRecord, create_retraining
from pipeline.table.lease import LEASE_FILE, Lease


class Killed(BaseException):
    """Ends what runs, as a kill does: nothing catches it."""


def never(reason: str) -> None:
    raise AssertionError(reason)


def new_output(place: str | Path, *names: str) -> Storage:
    """An output whose last name is the tracking URI, and the others those of its models."""
    *models, tracking = names
    output = open_storage(place)
    create_retraining(
        output,
        RetrainingRecord(
            id=f"id-of-{models[0]}",
            name="pets",
            created=now(),
            models=tuple(RetrainedModel(name=name, kind="maskclip-plus") for name in models),
            tracking=tracking,
        ),
    )
    return output


class Watched:
    """A client that calls ``hook(method, done)`` before and after each call to the registry."""

    def __init__(self, client: Any, hook: Callable[[str, bool], None]) -> None:
        self._client = client
        self._hook = hook

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            self._hook(name, False)
            result = found(*args, **kwargs)
            self._hook(name, True)
            return result

        return call


@dataclass(frozen=True)
class WatchedStorage(Storage):
    """A storage that calls a hook before and after it creates a file."""

    hook: Callable[[str, bool], None] = lambda _name, _done: None

    def child(self, name: str) -> WatchedStorage:
        inner = super().child(name)
        return WatchedStorage(inner.uri, inner.fs, inner.root, self.hook)

    def create_bytes(self, name: str, data: bytes) -> bool:
        self.hook("create_bytes", False)
        made = super().create_bytes(name, data)
        self.hook("create_bytes", True)
        return made


@dataclass
class Scene:
    """A retraining's output, and its registered model.

    Attributes:
        client: of a real registry.
        name: of the registered model.
        output: of the retraining.
    """

    client: Any
    name: str
    output: Storage

    def add_versions(self, count: int) -> None:
        """Versions without files."""
        registry.claim(self.client, self.name, self.output)
        for _ in range(count):
            self.client.create_model_version(self.name, source="s3://nowhere/model")

    @property
    def champion(self) -> str | None:
        """By the registry, asked as any user would."""
        found = self.client.get_registered_model(self.name).aliases.get(registry.CHAMPION)
        return None if found is None else str(found)

    @property
    def entries(self) -> tuple[Entry, ...]:
        return Ledger(self.output).entries()

    def kinds(self) -> list[str]:
        return [entry.kind for entry in self.entries]

    def move_by_hand(self, version: str) -> None:
        """As a user of MLflow's page does."""
        self.client.set_registered_model_alias(self.name, registry.CHAMPION, version)

    @contextlib.contextmanager
    def lease(self) -> Iterator[Lease]:
        """A lease of a run of its own; that of a killed one before it is gone, as after a takeover."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.output.path(LEASE_FILE))
        with Lease.acquire(self.output, on_lost=never) as lease:
            yield lease

    def killed_at(self, point: int, act: Callable[[Ledger, Any, Lease], Entry]) -> Entry | None:
        """Run something that is killed before its given call of the registry or the ledger.

        Returns:
            What it gives; None if it was killed.
        """
        calls = 0

        def hook(_name: str, done: bool) -> None:
            nonlocal calls
            calls += not done
            if calls > point:
                raise Killed

        watched = WatchedStorage(self.output.uri, self.output.fs, self.output.root, hook)
        with self.lease() as lease:
            try:
                return act(Ledger(watched), Watched(self.client, hook), lease)
            except Killed:
                return None
