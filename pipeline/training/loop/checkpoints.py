"""Checkpoints of a training run: whole or not there, checked when read, the newest whole one is taken.

A checkpoint is a folder ``step-NNNNNNN`` with ``module.pt`` (weights), ``training.pt`` (everything else that
training needs to go on), ``metrics.jsonl`` (all figures so far) and, written last, ``manifest.json`` with the
SHA-256 of each file. A folder without manifest is the trace of a run that was cut off while it wrote; it
never counts. Files are read with ``torch.load(weights_only=True)``: nothing in them is executed.

They are written through ``pipeline.files.storage`` and not handed to ``ray.train.report``: Ray Train copies
files straight to their place, so a kill in between leaves a torn checkpoint that looks whole; it keeps no
checksums, and its retention knows no milestones; its list of checkpoints can be read by the version of Ray
alone that wrote it; and ``report`` is a barrier that waits for the controller's next poll.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.errors import Damaged, WrongUse
from pipeline.files.storage import Storage
from pipeline.training.loop.settings import settings_hash

CHECKPOINTS_DIR = "checkpoints"
SETTINGS_FILE = "settings.json"
MANIFEST_FILE = "manifest.json"
SCHEMA_VERSION = 1
_MODULE, _TRAINING, _METRICS = "module.pt", "training.pt", "metrics.jsonl"
_FOLDER = re.compile(r"step-(\d{7,})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory, tensors on the CPU.

    Attributes:
        step: updates done.
        module: state of the module.
        training: state of everything else.
        lines: figures logged up to ``step``.
    """

    step: int
    module: dict[str, Any]
    training: dict[str, Any]
    lines: list[dict[str, Any]]


class BrokenCheckpoint(Exception):
    """A checkpoint that cannot be used; the text says why."""


class Unfinished(BrokenCheckpoint):
    """A checkpoint whose writing was cut off: it never was one."""


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        storage: the run's folder; checkpoints lie in ``checkpoints/`` below it.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage.child(CHECKPOINTS_DIR)

    def claim(self, record: Mapping[str, Any]) -> str:
        """Say with which settings the run trains, or check that they are the recorded ones.

        Args:
            record: JSON-able settings, all those that alter training.

        Returns:
            Their hash.

        Raises:
            MaskMillError: ``output_differs`` if there are checkpoints made with other settings; what
                differs is named.
        """
        record = json.loads(json.dumps(record))
        recorded = self.storage.read_json(SETTINGS_FILE, None)
        if recorded == record:
            return settings_hash(record)
        if self.steps():
            if recorded is None:
                raise Damaged(
                    "checkpoint_damaged",
                    f"{self.storage.uri} has checkpoints but no {SETTINGS_FILE} that says what made them.",
                    f"Put {SETTINGS_FILE} back, or name another output.",
                )
            changed = [
                f"{name}: {recorded.get(name)!r} there, {record.get(name)!r} here"
                for name in sorted(record.keys() | recorded.keys())
                if recorded.get(name) != record.get(name)
            ]
            raise WrongUse(
                "output_differs",
                f"The checkpoints in {self.storage.uri} were made with other settings: {'; '.join(changed)}.",
                "Go on with the recorded settings, or train anew into another output.",
            )
        self.storage.write_json(SETTINGS_FILE, record)
        return settings_hash(record)

    def sees(self, fingerprint: str) -> bool:
        """Whether the settings recorded here, seen from this process, have that hash."""
        recorded = self.storage.read_json(SETTINGS_FILE, None)
        return recorded is not None and settings_hash(recorded) == fingerprint

    def steps(self) -> list[int]:
        """Steps of the folders that are there, whole or not, ascending."""
        folders = {name.partition("/")[0] for name in self.storage.list(recursive=True)}
        return sorted(int(found[1]) for name in folders if (found := _FOLDER.fullmatch(name)))

    def uri_of(self, step: int) -> str:
        """Where the checkpoint of a step lies."""
        return self.storage.uri_of(folder_name(step))

    def write(
        self,
        step: int,
        *,
        module: Mapping[str, Any],
        training: Mapping[str, Any],
        lines: Sequence[Mapping[str, Any]],
        fingerprint: str,
        milestone: bool = False,
    ) -> None:
        """Write a checkpoint; until the last byte it does not count.

        Args:
            step: updates done.
            module: ``state_dict`` of the module.
            training: tensors, numbers, strings, None, and lists, tuples and dicts of them.
            lines: figures logged up to here, JSON-able.
            fingerprint: of the settings, from ``claim``.
            milestone: whether ``prune`` keeps it for good.

        Raises:
            TypeError: ``training`` holds something that could not be read back.
        """
        _check_plain(training, "training")
        folder = folder_name(step)
        self.storage.delete(folder)
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        contents = {_MODULE: _packed(module), _TRAINING: _packed(training), _METRICS: text.encode()}
        for name, data in contents.items():
            self.storage.write_bytes(f"{folder}/{name}", data)
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "step": step,
            "settings": fingerprint,
            "milestone": milestone,
            "files": {
                name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                for name, data in contents.items()
            },
        }
        self.storage.write_json(f"{folder}/{MANIFEST_FILE}", manifest)

    def read(self, step: int, fingerprint: str | None = None) -> Checkpoint:
        """Read and check one checkpoint.

        Args:
            step: updates done.
            fingerprint: hash of the settings that it must have been made with; None takes any.

        Raises:
            BrokenCheckpoint: it is not whole, with the reason.
        """
        folder = folder_name(step)
        manifest = self._manifest(step)
        if manifest["schema_version"] != SCHEMA_VERSION or manifest["step"] != step:
            raise BrokenCheckpoint(f"{MANIFEST_FILE} is of another kind or step")
        if fingerprint is not None and manifest["settings"] != fingerprint:
            raise BrokenCheckpoint("it was made with other settings")
        contents = {}
        for name in (_MODULE, _TRAINING, _METRICS):
            try:
                data = self.storage.read_bytes(f"{folder}/{name}")
            except FileNotFoundError:
                raise BrokenCheckpoint(f"{name} is missing") from None
            if hashlib.sha256(data).hexdigest() != manifest["files"][name]["sha256"]:
                raise BrokenCheckpoint(
                    f"{name} is not what was written: {len(data)} bytes with another checksum"
                )
            contents[name] = data
        return Checkpoint(
            step,
            _unpacked(_MODULE, contents[_MODULE]),
            _unpacked(_TRAINING, contents[_TRAINING]),
            [json.loads(line) for line in contents[_METRICS].decode().splitlines()],
        )

    def newest(self, fingerprint: str | None, warn: Callable[[str], None]) -> Checkpoint | None:
        """The newest whole checkpoint.

        Args:
            fingerprint: as for ``read``.
            warn: told of each newer one that is not whole.

        Returns:
            None if the run has none yet: at most one folder is there, and its writing was cut off.

        Raises:
            MaskMillError: ``checkpoint_damaged`` if there are checkpoints and none is whole.
        """
        steps = self.steps()
        reasons = []
        for step in reversed(steps):
            try:
                return self.read(step, fingerprint)
            except BrokenCheckpoint as error:
                reasons.append((step, error))
                warn(f"Checkpoint {self.uri_of(step)} cannot be used: {error}. Taking the one before it.")
        if all(isinstance(error, Unfinished) for _, error in reasons) and len(reasons) <= 1:
            return None
        listed = "; ".join(f"{folder_name(step)}: {error}" for step, error in reasons)
        raise Damaged(
            "checkpoint_damaged",
            f"None of the {len(steps)} checkpoints in {self.storage.uri} can be used ({listed}).",
            "Restore one of them from a copy. To train from the start instead, name another output, or "
            "delete this folder of checkpoints yourself.",
        )

    def prune(self, step: int, keep: int) -> None:
        """Delete checkpoints that are no longer needed, after that of ``step`` was written.

        Milestones and the newest ``keep`` stay. Those of later steps go: the run came back to before them
        because they could not be used.
        """
        kept = 0
        for other in reversed(self.steps()):
            try:
                milestone = bool(self._manifest(other)["milestone"])
            except BrokenCheckpoint:
                self._drop(other)
                continue
            if other > step or (kept >= keep and not milestone):
                self._drop(other)
            else:
                kept += 1

    def _manifest(self, step: int) -> dict[str, Any]:
        try:
            manifest = json.loads(self.storage.read_bytes(f"{folder_name(step)}/{MANIFEST_FILE}"))
        except FileNotFoundError:
            raise Unfinished(f"it has no {MANIFEST_FILE}: writing it was cut off") from None
        except ValueError:
            raise BrokenCheckpoint(f"{MANIFEST_FILE} is not JSON") from None
        fields = {"schema_version", "step", "settings", "milestone", "files"}
        if not isinstance(manifest, dict) or not fields <= manifest.keys():
            raise BrokenCheckpoint(f"{MANIFEST_FILE} lacks fields")
        return manifest

    def _drop(self, step: int) -> None:
        # Without its manifest it no longer counts, should the rest of it survive a kill.
        self.storage.delete(f"{folder_name(step)}/{MANIFEST_FILE}")
        self.storage.delete(folder_name(step))


def folder_name(step: int) -> str:
    """Name of the folder of a step's checkpoint.

    >>> folder_name(100)
    'step-0000100'
    """
    return f"step-{step:07d}"


def _packed(state: Mapping[str, Any]) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def _unpacked(name: str, data: bytes) -> dict[str, Any]:
    import torch

    try:
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise BrokenCheckpoint(f"{name} holds more than tensors and plain values") from None
    return state


def _check_plain(value: object, where: str) -> None:
    """Refuse at once what ``torch.load(weights_only=True)`` would refuse when it is too late."""
    import torch

    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_plain(key, f"{where} (a key)")
            _check_plain(inner, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            _check_plain(inner, f"{where}[{index}]")
    elif type(value) not in (int, float, bool, str, type(None)) and not isinstance(value, torch.Tensor):
        raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint holds tensors and plain values")
