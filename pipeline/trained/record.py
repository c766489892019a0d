"""What a training run leaves: a folder with weights, and a record that says what they are.

The record is written last and names the weights by their fingerprint, so a reader never takes one model's
record for another model's weights. The folder may be local or in an object store; what else the training
leaves there (checkpoints, curves) is not needed to use the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import AliasChoices, AliasPath, BaseModel, ConfigDict, Field

from models.errors import Damaged, WrongUse
from pipeline.files.records import now, parse_record, read_record
from pipeline.files.storage import Storage, open_storage

R = TypeVar("R", bound="TrainedRecord")
_REMEDY = "Restore the folder from a copy, or train again."


class TrainedRecord(BaseModel):
    """What is recorded about every trained model.

    Attributes:
        uri: canonical URI of the folder; not in the file.
        schema_version: of the file.
        kind: ``KIND``.
        created: UTC, ISO 8601.
        fingerprint: SHA-256 (hex) of the weights file.
        config: of the network.
        recipe: of the training, all fields and ``hash``.
        metrics: figures of the training's last line, by name; what a model is worth on true labels is for
            ``maskmill evaluate`` to say.
        training: iterations, seconds, samples_per_second, workers, ….
        versions: of Python and the packages.
    """

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    KIND: ClassVar[str]
    WHAT: ClassVar[str]
    """A word for the model in messages."""
    TRAINED_BY: ClassVar[str]
    """The command that makes one."""
    RECORD_FILE: ClassVar[str]
    WEIGHTS_FILE: ClassVar[str]
    SCHEMA_VERSION: ClassVar[int]

    uri: str = Field("", exclude=True)
    schema_version: int = 0
    kind: str = ""
    created: str
    # Schema 1 of students kept it among the weights.
    fingerprint: str = Field(
        validation_alias=AliasChoices("fingerprint", AliasPath("weights", "fingerprint"))
    )
    config: dict[str, Any]
    recipe: dict[str, Any]
    metrics: dict[str, Any]
    training: dict[str, Any]
    versions: dict[str, Any]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.uri.rstrip("/").rpartition("/")[2]

    def to_dict(self) -> dict[str, Any]:
        """The content of the file."""
        fields = self.model_dump(mode="json")
        return fields | {"schema_version": self.SCHEMA_VERSION, "kind": self.KIND}


def is_recorded(kind: type[TrainedRecord], uri: str | Path) -> bool:
    """Whether a path or URI is the folder of such a model: one look for one file, without reading it.

    Raises:
        MaskMillError: the place cannot be reached (``wrong_use``, ``storage_unreachable``, …).
    """
    return open_storage(uri).exists(kind.RECORD_FILE)


def refuse_to_replace(kind: type[TrainedRecord], storage: Storage) -> None:
    """Raise ``output_exists`` if the folder holds such a model."""
    if storage.exists(kind.RECORD_FILE):
        raise WrongUse(
            "output_exists",
            f"There is a {kind.WHAT} in {storage.uri} already.",
            "Name another --output, or replace it with --overwrite.",
        )


def write_trained(kind: type[R], storage: Storage, files: Mapping[str, bytes], **fields: Any) -> R:
    """Write a model: its files, then the record.

    Args:
        kind: of the record.
        storage: the folder.
        files: content by name; the weights file is one of them.
        fields: of the record, but for ``uri``, ``created`` and ``fingerprint``.
    """
    for name, content in files.items():
        storage.write_bytes(name, content)
    record = kind(
        uri=storage.uri,
        created=now(),
        fingerprint=hashlib.sha256(files[kind.WEIGHTS_FILE]).hexdigest(),
        **fields,
    )
    storage.write_json(kind.RECORD_FILE, record.to_dict())
    return record


def read_trained(kind: type[R], uri: str | Path) -> R:
    """What is recorded about a model; the weights are not touched.

    Raises:
        MaskMillError: ``name_unknown`` if this is no such folder, ``model_damaged``, ``newer_version``.
    """
    storage = open_storage(uri)
    try:
        found = read_record(storage, kind.RECORD_FILE, kind.SCHEMA_VERSION)
    except Damaged as error:
        raise Damaged("model_damaged", error.message, _REMEDY) from error
    if found is None or found.get("kind") != kind.KIND:
        why = "there is no" if found is None else f"no {kind.WHAT} is described by its"
        raise WrongUse(
            "name_unknown",
            f"{storage.uri} is not the folder of a {kind.WHAT}: {why} {kind.RECORD_FILE}.",
            f"Give the --output of a finished {kind.TRAINED_BY}; on a cluster, on storage that every node "
            "reaches.",
        )
    place = storage.uri_of(kind.RECORD_FILE)
    return parse_record(kind, found | {"uri": storage.uri}, place, code="model_damaged", remedy=_REMEDY)


def read_trained_weights(record: TrainedRecord) -> bytes:
    """The weights file of a model, proven to be the one that the record names.

    Raises:
        MaskMillError: ``model_damaged``.
    """
    storage = open_storage(record.uri)
    try:
        data = storage.read_bytes(record.WEIGHTS_FILE)
    except FileNotFoundError as error:
        raise Damaged("model_damaged", f"{storage.uri} has no {record.WEIGHTS_FILE}.", _REMEDY) from error
    found = hashlib.sha256(data).hexdigest()
    if found != record.fingerprint:
        raise Damaged(
            "model_damaged",
            f"{storage.uri_of(record.WEIGHTS_FILE)} (SHA-256 {found[:12]}) is not the file that its "
            f"{record.RECORD_FILE} names ({record.fingerprint[:12]}).",
            _REMEDY,
        )
    return data
