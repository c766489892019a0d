"""What all kinds of faults share: images, what an undisturbed run makes of them, and the comparison."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import psutil
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.faults.clusters import standing_ray
from benchmarks.faults.runs import Command, Unexpected, plain
from pipeline.files.storage import Storage, open_storage
from pipeline.toyworld import scenes as toyworld

if TYPE_CHECKING:
    from benchmarks.faults.nodes import ThreeNodes
    from benchmarks.faults.object_store import FaultyStore

COUNT, SIZE, SPARE = 60, 64, 30
NOTHING: Mapping[str, str] = MappingProxyType({})
OWN: Mapping[str, str] = MappingProxyType({"RAY_ADDRESS": ""})
"""Environment of commands that start a Ray of their own."""
PACE_S, CPUS = 0.1, 3
TRIES = 6
"""How often the same command runs until it succeeds."""

Expected = dict[str, tuple[str, bytes | None]]
"""Status, and SHA-256 of the image if it is labelled, by URI."""


@dataclass
class Verdict:
    """What a comparison found; see the package."""

    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    notes: list[str] = field(default_factory=list)

    def plus(self, other: Verdict) -> Verdict:
        """Both together."""
        return Verdict(
            self.lost + other.lost,
            self.doubled + other.doubled,
            self.wrong + other.wrong,
            self.notes + other.notes,
        )


def wrong(note: str) -> Verdict:
    """One thing is wrong."""
    return Verdict(wrong=1, notes=[note])


@dataclass(frozen=True)
class Injected:
    """Faults of one kind that were injected together, and what they cost."""

    times: int
    verdict: Verdict


class World:
    """Images, an undisturbed run on them, and a place for the disturbed ones.

    Args:
        scratch: an empty folder.
        standing: see ``standing``; default: started when it is first needed.

    Attributes:
        images: a folder of scenes of the toy world, and a file that is no image.
        spare: other scenes, as PNG.
        open_until_the_end: closed with the world.
        object_store, nodes, trained: made by the kinds that need them first.
    """

    def __init__(self, scratch: Path, standing: tuple[str, psutil.Process] | None = None) -> None:
        self.scratch = scratch
        self.open_until_the_end = contextlib.ExitStack()
        self._numbers = itertools.count()
        self.images = scratch / "images"
        self.images.mkdir()
        scenes, _, _ = toyworld.generate(11, COUNT + SPARE, SIZE)
        encoded = [_png(Image.fromarray(scene)) for scene in scenes]
        for index, data in enumerate(encoded[:COUNT]):
            (self.images / f"scene_{index:04d}.png").write_bytes(data)
        (self.images / "broken.png").write_bytes(b"no image")
        self.spare = encoded[COUNT:]
        self._spare = scratch / "spare"
        self._spare.mkdir()
        for index, data in enumerate(self.spare):
            (self._spare / f"spare_{index:04d}.png").write_bytes(data)
        self._spare_uris = [str(path) for path in sorted(self._spare.iterdir())]
        token = os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)
        self._token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        self._standing = standing
        self.object_store: tuple[FaultyStore, dict[str, str]] | None = None
        self.nodes: ThreeNodes | None = None
        self.trained: dict[tuple[int, str | None], Path] = {}
        self._maps: dict[bytes, tuple[bytes, bytes]] = {}
        self._reference: Path | None = None

    def close(self) -> None:
        """Close what is open until the end."""
        self.open_until_the_end.close()

    @property
    def environment(self) -> dict[str, str]:
        """Of the commands: nothing tracked, a cache of their own, faults from inside possible; no cluster."""
        return os.environ | self._token | plain(self.scratch / "cache") | {"MLFLOW_TRACKING_URI": "off"}

    @property
    def standing(self) -> tuple[str, psutil.Process]:
        """A Ray for runs that need none of their own, and the process that holds it."""
        if self._standing is None:
            environment = self.environment | {"FAULTS_PACE_S": f"{PACE_S:g}"}
            self._standing = self.open_until_the_end.enter_context(standing_ray(environment, cpus=CPUS))
        return self._standing

    def folder(self, name: str) -> Path:
        """A new name for a folder."""
        return self.scratch / f"{name}-{next(self._numbers)}"

    def run(self, *arguments: object, environment: Mapping[str, str] = NOTHING) -> Command:
        """Start a command, with more in its environment; ``OWN`` gives it a Ray of its own."""
        whole = self.environment | dict(environment)
        if "RAY_ADDRESS" not in environment:
            whole["RAY_ADDRESS"] = self.standing[0]
        return Command([*map(str, arguments)], whole, self.folder("log"))

    def label(
        self,
        output: object,
        *more: object,
        images: object = None,
        pace_s: float = PACE_S,
        environment: Mapping[str, str] = NOTHING,
    ) -> Command:
        """Start to label into an output.

        Args:
            output: of the run.
            more: arguments.
            images: source; default: ``images``.
            pace_s: how long opening an image takes, with a Ray of its own.
            environment: more of it.
        """
        return self.run(
            "label", "--images", images or self.images, "--ontology", "toyworld", "--recipe", "toy",
            "--output", output, "--max-failure-rate", "0.5", *more,
            environment={"FAULTS_PACE_S": f"{pace_s:g}", **environment},
        )  # fmt: skip

    def finish(
        self,
        output: object,
        *more: object,
        images: object = None,
        environment: Mapping[str, str] = NOTHING,
    ) -> Command:
        """Label into an output until that succeeds; returns the last command.

        Raises:
            Hung, Unexpected: the command did not end, or not well.
        """
        for _ in range(TRIES):
            command = self.label(output, *more, images=images, pace_s=0, environment=environment)
            if command.expect(0, 1) == 0:
                return command
        raise Unexpected(f"{TRIES} runs did not finish: {command.said[-1500:]}")

    @property
    def reference(self) -> Path:
        """The table of an undisturbed run on ``images`` and the spare ones."""
        if self._reference is None:
            table = self.folder("reference")
            self.finish(table, images=self.everything)
            self.adopt(table)
        assert self._reference is not None
        return self._reference

    @property
    def everything(self) -> Path:
        """A list of ``images`` and the spare ones."""
        listed = self.scratch / "everything.txt"
        listed.write_text("\n".join([*map(str, sorted(self.images.iterdir())), *self._spare_uris]))
        return listed

    def adopt(self, table: Path) -> None:
        """Take a table of ``everything`` for the reference."""
        for row in rows_of(open_storage(table)):
            if row["status"] == "ok":
                self._maps[row["sha256"]] = row["mask"]["bytes"], row["confidence"]["bytes"]
        assert len(self._maps) == COUNT + SPARE
        self._reference = table

    def copy_of_reference(self) -> Path:
        """A table that an undisturbed run has finished."""
        table = self.folder("table")
        shutil.copytree(self.reference, table)
        return table

    def expected(self, *folders: Path) -> Expected:
        """What a table of folders of images should have, by the images as they are now."""
        found: Expected = {}
        for path in (path for folder in folders for path in sorted(folder.iterdir())):
            data = path.read_bytes()
            known = data.startswith(b"\x89PNG")
            found[str(path)] = ("ok", hashlib.sha256(data).digest()) if known else ("not_an_image", None)
        return found

    def judge_copy(self, table: Path) -> Verdict:
        """Compare a copy of the reference that was disturbed, and finished with ``everything``."""
        return self.judge(table, self.expected(self.images, self._spare))

    def judge(self, output: object, expected: Expected | None = None) -> Verdict:
        """Compare a finished table with what it should have.

        Args:
            output: of the run.
            expected: default: what ``images`` give. The spare images may have rows, too.
        """
        assert self.reference
        storage = open_storage(str(output))
        expected = self.expected(self.images) if expected is None else expected
        rows = rows_of(storage)
        ids = Counter(row["id"] for row in rows)
        verdict = Verdict(doubled=sum(count - 1 for count in ids.values()))
        by_uri = {row["uri"]: row for row in rows}
        for uri, (status, digest) in expected.items():
            row = by_uri.pop(uri, None)
            if row is None:
                verdict.lost += 1
            elif row["status"] != status:
                verdict = verdict.plus(wrong(f"{uri} is {row['status']}, not {status}: {row['error']}"))
            elif digest is not None:
                maps = row["mask"]["bytes"], row["confidence"]["bytes"]
                if row["sha256"] != digest:
                    verdict = verdict.plus(wrong(f"{uri} was labelled with other content"))
                elif maps != self._maps[digest]:
                    verdict = verdict.plus(wrong(f"{uri} has another mask"))
        verdict = verdict.plus(_of_the_rest(storage, rows, set(by_uri) - set(self._spare_uris)))
        if verdict.lost or verdict.doubled:
            verdict.notes.append(f"{verdict.lost} lost, {verdict.doubled} doubled in {storage.uri}")
        return verdict


def _of_the_rest(storage: Storage, rows: Sequence[Mapping[str, Any]], foreign: set[str]) -> Verdict:
    """Rows of no image, files left over, counts in the record."""
    verdict = Verdict()
    for uri in sorted(foreign):
        verdict = verdict.plus(wrong(f"{uri} has a row, and is not in the manifest"))
    left = [
        name
        for folder in ("labels", "relabelled", "")
        for name in storage.list(folder)
        if name.endswith(".tmp") or name.startswith("relabelled/") or name == "lease.json"
    ]
    if left:
        verdict = verdict.plus(wrong(f"left over in {storage.uri}: {', '.join(left)}"))
    counts = json.loads(storage.read_bytes("dataset.json"))["counts"]
    if counts["status"] != Counter(row["status"] for row in rows) or counts["images"] != len(rows):
        verdict = verdict.plus(wrong(f"the record counts {counts['status']}"))
    return verdict


def rows_of(storage: Storage) -> list[dict[str, Any]]:
    """All rows of a table, in file order."""
    names = [name for name in storage.list("labels") if name.endswith(".parquet")]
    filesystem = storage.arrow_filesystem()
    columns = ["id", "uri", "sha256", "status", "error", "mask", "confidence"]
    return [
        row
        for name in names
        for row in pq.read_table(storage.path(name), columns=columns, filesystem=filesystem).to_pylist()
    ]


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def grey(level: int) -> bytes:
    """An image that is grey all over, as PNG."""
    return _png(Image.new("RGB", (SIZE, SIZE), (level,) * 3))
