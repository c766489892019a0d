"""Checkpoints of a training run: written atomically, verified when read; a run resumes from the newest.

A checkpoint is a folder ``step-NNNNNNN`` with ``module.pt`` (weights), ``training.pt`` (all other state that
is needed to resume), ``metrics.jsonl`` (all figures so far) and, written last, ``manifest.json`` with the
SHA-256 of each file. A folder without a manifest was left by an interrupted write and never counts. Files are
read with ``torch.load(weights_only=True)``, so nothing in them is executed.

``pipeline.files.storage`` writes them rather than ``ray.train.report``: Ray Train copies files in place, so a
kill leaves a torn checkpoint that looks complete; it keeps no checksums, and its retention has no milestones;
its list of checkpoints is only readable by the same version of Ray; and ``report`` is a barrier that waits
for the controller's next poll.
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
from pipeline.files.recipes import changed_fields
from pipeline.files.storage import Storage
from pipeline.table.lease import refuse_other_holder
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
    """A checkpoint whose write was interrupted."""


class CheckpointStore:
    """The checkpoints of one run, in ``checkpoints/`` below the run's folder.

    Args:
        storage: the run's folder.
        run_id: who writes: nothing is written unless it holds the lease of the folder. None checks nothing.
    """

    def __init__(self, storage: Storage, *, run_id: str | None = None) -> None:
        self.storage = storage.child(CHECKPOINTS_DIR)
        self._output, self._run_id = storage, run_id

    def _refuse_other_run(self) -> None:
        if self._run_id is not None:
            refuse_other_holder(self._output, self._run_id)

    def claim(self, record: Mapping[str, Any]) -> str:
        """Record the run's settings, or check them against the recorded ones.

        Args:
            record: JSON-able; all settings that affect training.

        Returns:
            Their hash.

        Raises:
            MaskMillError: ``output_differs`` if there are checkpoints made with other settings, naming the
                differences; ``file_damaged`` if there are checkpoints without recorded settings.
        """
        record = json.loads(json.dumps(record))
        recorded = self.storage.read_json(SETTINGS_FILE, None)
        if recorded == record:
            return settings_hash(record)
        if self.steps():
            if recorded is None:
                raise Damaged(
                    "file_damaged",
                    f"{self.storage.uri} has checkpoints but no {SETTINGS_FILE} that says what made them.",
                    f"Put {SETTINGS_FILE} back, or name another output.",
                )
            raise WrongUse(
                "output_differs",
                f"The checkpoints in {self.storage.uri} were made with other settings: "
                f"{'; '.join(changed_fields(recorded, record))}.",
                "Use the recorded settings, or train anew into another output.",
            )
        self.storage.write_json(SETTINGS_FILE, record)
        return settings_hash(record)

    def sees(self, fingerprint: str) -> bool:
        """Whether this process sees recorded settings with that hash."""
        recorded = self.storage.read_json(SETTINGS_FILE, None)
        return recorded is not None and settings_hash(recorded) == fingerprint

    def steps(self) -> list[int]:
        """Steps of all checkpoint folders, complete or not, ascending."""
        folders = {name.partition("/")[0] for name in self.storage.list(recursive=True)}
        return sorted(int(found[1]) for name in folders if (found := _FOLDER.fullmatch(name)))

    def uri_of(self, step: int) -> str:
        """URI of a step's checkpoint."""
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
        """Write a checkpoint, which only counts once it is complete.

        Args:
            step: updates done.
            module: ``state_dict`` of the module.
            training: tensors, numbers, strings, None, and lists, tuples and dicts of them.
            lines: figures logged so far, JSON-able.
            fingerprint: of the settings, from ``claim``.
            milestone: whether ``prune`` must keep it.

        Raises:
            TypeError: ``training`` holds something that could not be read back.
            MaskMillError: ``output_in_use`` if another run has taken the lease over.
        """
        _check_plain(training, "training")
        self._refuse_other_run()
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
        self._refuse_other_run()
        self.storage.write_json(f"{folder}/{MANIFEST_FILE}", manifest)

    def read(self, step: int, fingerprint: str | None = None) -> Checkpoint:
        """Read and verify one checkpoint.

        Args:
            step: updates done.
            fingerprint: required hash of its settings; None accepts any.

        Raises:
            BrokenCheckpoint: it is incomplete or damaged, with the reason.
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
        """Read the newest usable checkpoint.

        Args:
            fingerprint: see ``read``.
            warn: called with a message for each newer one that is unusable.

        Returns:
            None if the run has none yet: there is at most one folder, left by an interrupted write.

        Raises:
            MaskMillError: ``file_damaged`` if there are checkpoints and none is usable.
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
            "file_damaged",
            f"None of the {len(steps)} checkpoints in {self.storage.uri} can be used ({listed}).",
            "Restore one of them from a copy. To train from the start instead, name another output, or "
            "delete this folder of checkpoints yourself.",
        )

    def prune(self, step: int, keep: int) -> None:
        """Delete obsolete checkpoints, after that of ``step`` was written.

        Milestones and the newest ``keep`` stay. Later steps than ``step`` go: they were unusable, so the run
        fell back to an earlier one.
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
        # Delete the manifest first: if a kill interrupts this, the rest no longer counts.
        self.storage.delete(f"{folder_name(step)}/{MANIFEST_FILE}")
        self.storage.delete(folder_name(step))


def folder_name(step: int) -> str:
    """Folder name of a step's checkpoint.

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
    """Refuse early what ``torch.load(weights_only=True)`` could not read back."""
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
