"""Records: JSON files that say what the files beside them are, with a schema version."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from models.errors import Damaged, MaskMillError, WrongUse
from pipeline.files.storage import Storage

M = TypeVar("M", bound=BaseModel)

_ABSENT = object()


def now() -> str:
    """The time, UTC in ISO 8601, as records have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def read_record(storage: Storage, name: str, newest: int) -> dict[str, Any] | None:
    """A record of this MaskMill or of an older one; None if there is no such file.

    Args:
        storage: the folder.
        name: of the file.
        newest: the schema version that this MaskMill writes. A record without a version has the first.

    Raises:
        MaskMillError: ``newer_version``; ``document_invalid`` if it is no JSON object.
    """
    record = storage.read_json(name, _ABSENT)
    if record is _ABSENT:
        return None
    if not isinstance(record, dict):
        raise Damaged(
            "document_invalid",
            f"{storage.uri_of(name)} holds a {type(record).__name__}, not a record.",
            "Restore the file, or make again what it describes.",
        )
    version = record.get("schema_version", 1)
    if isinstance(version, int) and version > newest:
        raise WrongUse(
            "newer_version",
            f"{storage.uri_of(name)} was written by a newer MaskMill (schema {version}; this one reads "
            f"{newest}).",
            "Update MaskMill.",
        )
    return record


def find_record(
    kind: type[M],
    storage: Storage,
    name: str,
    newest: int,
    *,
    remedy: str,
    code: str = "file_damaged",
    absent: Mapping[str, Any] | None = None,
) -> M | None:
    """A record as its model; None if there is no such file.

    Args:
        kind: the model.
        storage: the folder.
        name: of the file.
        newest: the schema version that this MaskMill writes.
        remedy: what to do about a damaged file.
        code: of the error for a damaged file.
        absent: values of fields that older versions do not have.

    Raises:
        MaskMillError: ``newer_version``; ``code`` if it is no JSON object, or a field is wrong.
    """
    try:
        found = read_record(storage, name, newest)
    except Damaged as error:
        raise Damaged(code, error.message, remedy) from error
    if found is None:
        return None
    return parse_record(kind, {**(absent or {}), **found}, storage.uri_of(name), code=code, remedy=remedy)


def parse_record(kind: type[M], record: object, place: str, *, remedy: str, code: str = "file_damaged") -> M:
    """A record as its model.

    Args:
        kind: the model.
        record: values as JSON has them.
        place: of the file, for the message.
        remedy: of the error.
        code: of the error.

    Raises:
        MaskMillError: ``code``, naming the first field that is wrong.
    """
    try:
        return kind.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}."
    except MaskMillError as error:  # of settings, which tell their own errors
        reason = error.message
    raise Damaged(code, f"{place} is incomplete or was changed: {reason}", remedy)
