"""What an output of ``maskmill retrain`` says about itself: ``retraining.json``.

It is written once, when the retraining begins, and is enough to roll back or to promote without its
configuration. It holds no credentials.
"""

from __future__ import annotations

import os
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from models.errors import WrongUse, did_you_mean
from pipeline.files.documents import parsed_yaml, read_document
from pipeline.files.records import find_record
from pipeline.files.redaction import redact
from pipeline.files.storage import Storage, open_storage, placed_beside

RECORD_FILE = "retraining.json"
SCHEMA_VERSION = 1
CONFIG_SUFFIXES = (".yaml", ".yml")
_REMEDY = "Restore the file from a copy."

ModelKind = Literal["maskclip-plus", "clipseg"]


def _registered_name(name: str) -> str:
    if set(name) & set("/:'\"`%") or name != name.strip() or not name.strip("."):
        raise ValueError("a registered model's name has no slash, colon, quote or % in it, nor spaces around")
    return name


RegisteredName = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_registered_name)]
"""A name that MLflow takes for a registered model, and that its searches take as it is."""


class RetrainedModel(BaseModel):
    """A model that is trained in each tick.

    Attributes:
        name: of the registered model.
        kind: what is trained.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: RegisteredName
    kind: ModelKind


class RetrainingRecord(BaseModel):
    """What ``retraining.json`` says.

    Attributes:
        schema_version: of the file.
        id: unique, made when the retraining began.
        name: of the retraining.
        created: UTC, ISO 8601.
        models: the registered models, each name once.
        tracking: MLflow's tracking URI, without credentials.
        fixed: what may not change between ticks, by name.
        webhook_env: environment variable with the address that is told, as the last run was configured.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: Annotated[int, Field(ge=1)] = SCHEMA_VERSION
    id: str = Field(min_length=8)
    name: str = Field(min_length=1)
    created: str
    models: tuple[RetrainedModel, ...] = Field(min_length=1)
    tracking: Annotated[str, AfterValidator(redact)]
    fixed: dict[str, Any] = {}
    webhook_env: str | None = None

    def model(self, name: str | None) -> RetrainedModel:
        """The model of a name; None is the only one.

        Raises:
            MaskMillError: ``wrong_use`` if there is no such model, or more than one to choose from.
        """
        names = [model.name for model in self.models]
        if name is None:
            if len(names) > 1:
                raise WrongUse(
                    "wrong_use",
                    f"The retraining {self.name} has {len(names)} models.",
                    f"Say which one: --model {' or --model '.join(names)}.",
                )
            return self.models[0]
        if name not in names:
            raise WrongUse(
                "wrong_use",
                f"The retraining {self.name} has no model {name}.",
                f"{did_you_mean(name, names)}There {'is' if len(names) == 1 else 'are'}: {', '.join(names)}.",
            )
        return self.models[names.index(name)]


def create_retraining(output: Storage, record: RetrainingRecord) -> RetrainingRecord:
    """Write the record, if there is none; returns the one that is there now.

    Raises:
        MaskMillError: as ``read_retraining``.
    """
    output.create_bytes(RECORD_FILE, record.model_dump_json(indent=2).encode() + b"\n")
    return read_retraining(output)


def note_webhook(output: Storage, record: RetrainingRecord, variable: str | None) -> RetrainingRecord:
    """The record with the webhook that is configured now; written if there is one and it says otherwise.

    Args:
        output: whose lease is held.
        record: of it.
        variable: that holds the address.
    """
    changed = record.model_copy(update={"webhook_env": variable})
    if changed != record and output.exists(RECORD_FILE):
        output.write_bytes(RECORD_FILE, changed.model_dump_json(indent=2).encode() + b"\n")
    return changed


def read_retraining(output: Storage) -> RetrainingRecord:
    """The record of an output.

    Raises:
        MaskMillError: ``input_missing``, ``file_damaged``, ``newer_version``.
    """
    found = find_record(RetrainingRecord, output, RECORD_FILE, SCHEMA_VERSION, remedy=_REMEDY)
    if found is None:
        raise WrongUse(
            "input_missing",
            f"{output.uri} is not the output of maskmill retrain: there is no {RECORD_FILE}.",
            "Name the output of a retraining, or its configuration.",
        )
    return found


class _Configuration(BaseModel):
    """Of a configuration only what says where the output is."""

    output: str = Field(min_length=1)


def find_output(place: str | os.PathLike[str]) -> Storage:
    """The output of a retraining, by its own place or by that of its configuration (YAML).

    Raises:
        MaskMillError: ``input_missing`` for a configuration that is not there or names no output; as
            ``pipeline.files.documents`` for one that cannot be read.
    """
    text = os.fspath(place)
    storage = open_storage(text)
    name = PurePosixPath(storage.uri).name
    if not name.lower().endswith(CONFIG_SUFFIXES):
        return storage
    folder = open_storage(os.path.dirname(storage.uri))
    try:
        data = read_document(folder, name, code="input_missing")
    except FileNotFoundError:
        raise WrongUse("input_missing", f"There is no {text}.", "Check the path.") from None
    try:
        found = _Configuration.model_validate(parsed_yaml(data, text, code="input_missing"))
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"]
        raise WrongUse(
            "input_missing",
            f"{text} names no output of a retraining: {reason}.",
            "Name the configuration of maskmill retrain, or its output.",
        ) from None
    return open_storage(placed_beside(folder.uri, found.output))
