"""MLflow's model registry, as a retraining uses it: every call to it is here.

A version carries what it was made from as tags, and a description that says the same to people. The tag
``maskmill.key`` makes registration idempotent: MLflow creates a version and its tags in one step, so that a
run that was killed finds the version that it has made. Two aliases point to versions: ``challenger`` to the
newest, ``champion`` to the one in use. MLflow has no compare-and-set for them: who moves one holds the lease
of the retraining and reads it back (``pipeline.retraining.promotion``). A tag of the registered model names
that retraining, and another one is refused.

MLflow is imported in the functions: it takes seconds.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import Damaged, FailedWork, MaskMillError, WrongUse
from pipeline.files.redaction import redact
from pipeline.files.storage import Storage, open_storage
from pipeline.retraining.record import ModelKind, RetrainingRecord, read_retraining
from pipeline.tracking.destination import (
    FLUSH_TIMEOUT_S,
    connect,
    reason,
    set_limits,
    sqlite_file,
    with_credentials,
)
from pipeline.trained.clipseg import ClipSegRecord
from pipeline.trained.record import TrainedRecord, read_trained, read_trained_weights
from pipeline.trained.student import StudentRecord

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

CHAMPION = "champion"
CHALLENGER = "challenger"
PREFIX = "maskmill."
LEDGER_TAG = PREFIX + "ledger"
RETRAINING_TAG = PREFIX + "retraining"
KEY_TAG = PREFIX + "key"
FINGERPRINT_TAG = PREFIX + "fingerprint"
MAX_TAG = 5000
"""Characters of a tag's value that every registry of MLflow takes."""
MAX_DESCRIPTION = 4900
"""Of 5000 that its databases hold."""
_PAGE = 100  # versions in one answer
_NO_VERSION = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # the second one for what is no number
_RECORDS: Mapping[ModelKind, type[TrainedRecord]] = {"maskclip-plus": StudentRecord, "clipseg": ClipSegRecord}
_ARTIFACTS: Mapping[ModelKind, str] = {"maskclip-plus": "student", "clipseg": "clipseg"}
"""The folder below ``artifacts`` of a logged model; see ``pipeline.serving.flavours``."""


@dataclass(frozen=True)
class Version:
    """A version of a registered model.

    Attributes:
        name: of the registered model.
        number: of the version, as MLflow counts.
        source: URI of its files.
        run_id: the run that trained it, if known.
        tags: by name.
    """

    name: str
    number: str
    source: str
    run_id: str | None
    tags: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the registry says of a version.

    Attributes:
        key: unique, such as ``pets/0007/student``: retraining, tick and model.
        kind: what was trained.
        run: number of the tick.
        data: digest of the images that it learned from.
        labels: digest of their labels.
        teacher: who made the labels, in words.
        verdict: of the gate, ``promote`` or ``refuse``.
        reasons: of the verdict, a sentence each.
        page: address of the report.
    """

    key: str
    kind: ModelKind
    run: str
    data: str | None = None
    labels: str | None = None
    teacher: str | None = None
    verdict: str | None = None
    reasons: tuple[str, ...] = ()
    page: str | None = None

    def tags(self, folder: TrainedRecord) -> dict[str, str]:
        """As tags of the version, without those that say nothing."""
        values = {
            "kind": self.kind,
            "run": self.run,
            "data": self.data,
            "labels": self.labels,
            "teacher": self.teacher,
            "verdict": self.verdict,
            "reasons": "\n".join(self.reasons),
            "page": self.page,
            "folder": folder.uri,
        }
        tags = {PREFIX + name: tag_value(value) for name, value in values.items() if value}
        # These are compared: they stay as they are.
        return tags | {KEY_TAG: self.key, FINGERPRINT_TAG: folder.fingerprint}

    def description(self, folder: TrainedRecord) -> str:
        """In Markdown, for the registry's page."""
        rows = {
            "Verdict of the gate": self.verdict,
            "Images": self.data,
            "Labels": self.labels,
            "Teacher": self.teacher,
            "Weights": folder.fingerprint,
            "Report": self.page,
            "Folder": folder.uri,
        }
        lines = [f"Retraining {_plain(self.key)}", ""]
        lines += [f"- {title}: {_plain(redact(value))}" for title, value in rows.items() if value]
        if self.reasons:
            lines += [
                "",
                "Reasons of the verdict:",
                "",
                *(f"- {_plain(redact(text))}" for text in self.reasons),
            ]
        text = "\n".join(lines)
        return text if len(text) <= MAX_DESCRIPTION else text[:MAX_DESCRIPTION] + "…"


def connect_registry(
    record: RetrainingRecord, tracking: str | None = None, *, create: bool = False
) -> MlflowClient:
    """The client of a retraining's registry, with time-outs.

    Args:
        record: of the retraining.
        tracking: URI to use instead of the recorded one, which has no credentials.
        create: make an SQLite database that is not there.

    Raises:
        MaskMillError: ``wrong_use``; ``tracking_unreachable``.
    """
    uri = with_credentials(record.tracking, tracking)
    database = sqlite_file(uri)
    if database is not None and not create and not database.exists():
        raise FailedWork(
            "tracking_unreachable",
            f"There is no database {database}, where the retraining {record.name} has its models.",
            "Say where it is now: --tracking URI.",
        )
    set_limits(FLUSH_TIMEOUT_S)
    with registry_errors(record.name):
        return connect(uri)


def claim(client: MlflowClient, name: str, output: Storage) -> None:
    """Make a registered model this retraining's, creating it if necessary.

    Raises:
        MaskMillError: as ``refuse_other_owner``.
    """
    tags = {LEDGER_TAG: output.uri, RETRAINING_TAG: read_retraining(output).id}
    with registry_errors(name):
        found = _registered(client, name)
        if found is None:
            with _already_there():
                client.create_registered_model(name, tags=tags)
        elif LEDGER_TAG not in found.tags:  # registered by hand
            for tag, value in tags.items():
                client.set_registered_model_tag(name, tag, value)
    refuse_other_owner(client, name, output)


def refuse_other_owner(client: MlflowClient, name: str, output: Storage) -> None:
    """Refuse a registered model that another retraining has claimed.

    Raises:
        MaskMillError: ``output_not_ours``; ``tracking_unreachable``; as ``read_retraining``.
    """
    with registry_errors(name):
        found = _registered(client, name)
    tags = {} if found is None else found.tags
    place, identity = tags.get(LEDGER_TAG), tags.get(RETRAINING_TAG)
    own = read_retraining(output).id
    if place in (None, output.uri) and identity in (None, own):
        return
    if identity == own:
        raise WrongUse(
            "output_not_ours",
            f"The registered model {name} belongs to the retraining in {place}, and {output.uri} is a copy "
            "of it.",
            f"Use that one. If it was moved here, set the tag {LEDGER_TAG} of the registered model to "
            f"{output.uri}.",
        )
    raise WrongUse(
        "output_not_ours",
        f"The registered model {name} belongs to another retraining, in {place}.",
        f"Register under another name. If that retraining is no more, delete the tags {LEDGER_TAG} and "
        f"{RETRAINING_TAG} of the registered model.",
    )


def register(
    client: MlflowClient, name: str, folder: str | Path, facts: Facts, *, run_id: str, output: Storage
) -> Version:
    """Register a trained model as a new version, with the alias ``challenger``.

    A version with the same key and weights is not made again, whenever the first call was killed; its tags
    are brought up to date. Files that a killed call had sent to MLflow without making a version stay there as
    a logged model.

    Args:
        client: of ``connect_registry``.
        name: of the registered model.
        folder: of the trained model, local or in an object store.
        facts: what to say of it.
        run_id: the run that trained it.
        output: of the retraining.

    Raises:
        MaskMillError: as ``claim``; as ``pipeline.trained.record.read_trained`` and ``read_trained_weights``;
            ``model_unsupported`` for a CLIPSeg that does not hold its CLIP.
    """
    claim(client, name, output)
    record = read_trained(_RECORDS[facts.kind], folder)
    own = (facts.key, record.fingerprint)
    found = _find(client, name, *own)
    if found is None:
        with registry_errors(name):
            _log(client, name, record, facts, run_id)
        found = _find(client, name, *own)
    if found is None:
        raise FailedWork(
            "tracking_unreachable",
            f"MLflow has taken a new version of {name}, and does not list it.",
            "Look at the server's log, and run the same command again.",
        )
    changed = {tag: text for tag, text in facts.tags(record).items() if found.tags.get(tag) != text}
    if changed:
        with registry_errors(name):
            client.update_model_version(name, found.number, facts.description(record))
            for tag, text in changed.items():
                client.set_model_version_tag(name, found.number, tag, text)
        found = read_version(client, name, found.number)
    if alias(client, name, CHALLENGER) != found.number:
        set_alias(client, name, CHALLENGER, found.number)
    return found


def alias(client: MlflowClient, name: str, which: str) -> str | None:
    """The number of the version that an alias points to; None without alias or registered model.

    Raises:
        MaskMillError: ``tracking_unreachable``.
    """
    with registry_errors(name):
        found = _registered(client, name)
        number = None if found is None else found.aliases.get(which)
    return None if number is None else str(number)


def set_alias(client: MlflowClient, name: str, which: str, number: str) -> None:
    """Point an alias to a version.

    Raises:
        MaskMillError: ``name_unknown``; ``tracking_unreachable``.
    """
    from mlflow.exceptions import MlflowException

    with registry_errors(name):
        try:
            client.set_registered_model_alias(name, which, number)
        except MlflowException as error:
            if error.error_code not in _NO_VERSION:
                raise
            raise version_missing(name, number) from None


def read_version(client: MlflowClient, name: str, number: str) -> Version:
    """A version by its number.

    Raises:
        MaskMillError: ``name_unknown``; ``tracking_unreachable``.
    """
    from mlflow.exceptions import MlflowException

    with registry_errors(name):
        try:
            return _version(client.get_model_version(name, number))
        except MlflowException as error:
            if error.error_code not in _NO_VERSION:
                raise
            raise version_missing(name, number) from None


def champion(client: MlflowClient, name: str) -> Version | None:
    """The version that is champion; None if there is none.

    Raises:
        MaskMillError: ``tracking_unreachable``.
    """
    number = alias(client, name, CHAMPION)
    return None if number is None else read_version(client, name, number)


def tag_version(client: MlflowClient, name: str, number: str, tag: str, text: str) -> None:
    """Set a tag ``maskmill.TAG`` of a version, over any that is there.

    Raises:
        MaskMillError: ``tracking_unreachable``.
    """
    with registry_errors(name):
        client.set_model_version_tag(name, number, PREFIX + tag, tag_value(text))


def version_folder(client: MlflowClient, version: Version, kind: ModelKind, into: str | Path) -> str:
    """The folder of a version's trained model, as ``pipeline.trained`` reads it.

    The folder that it was registered from, if it still holds these weights; else it is downloaded from the
    registry, once.

    Args:
        client: of ``connect_registry``.
        version: with its tags.
        kind: of the registered model.
        into: local folder for downloads; there is one inside for each version.

    Returns:
        Local path or URI.

    Raises:
        MaskMillError: ``name_unknown`` if the version is no such model; ``model_damaged`` if its weights are
            not those of its tags; ``tracking_unreachable``.
    """
    wanted = version.tags.get(FINGERPRINT_TAG)
    place = version.tags.get(PREFIX + "folder")
    if place is not None and _holds(kind, place, wanted):
        return place
    target = Path(into, f"{version.name}-{version.number}")
    folder = target / _ARTIFACTS[kind]
    if not _holds(kind, folder, wanted):
        from mlflow.artifacts import download_artifacts

        target.mkdir(parents=True, exist_ok=True)
        with registry_errors(version.name):
            download_artifacts(
                artifact_uri=f"{version.source.rstrip('/')}/artifacts/{_ARTIFACTS[kind]}",
                dst_path=str(target),
                tracking_uri=client.tracking_uri,
            )
        record = read_trained(_RECORDS[kind], folder)
        read_trained_weights(record)
        if wanted is not None and record.fingerprint != wanted:
            raise Damaged(
                "model_damaged",
                f"Version {version.number} of {version.name} holds other weights ({record.fingerprint[:12]}) "
                f"than those that were registered ({wanted[:12]}).",
                "Roll back to another version (maskmill rollback), or register it again.",
            )
    return str(folder)


def version_missing(name: str, number: str) -> FailedWork:
    """The error for a version that the registry does not have."""
    return FailedWork(
        "name_unknown",
        f"The registered model {name} has no version {number}; it may have been deleted.",
        "Choose one of its versions: maskmill promote … --version N --force --why TEXT.",
    )


@contextlib.contextmanager
def registry_errors(name: str) -> Iterator[None]:
    """Tell what MLflow raises, whatever its store: ``tracking_unreachable``.

    Args:
        name: of the registered model.
    """
    try:
        yield
    except MaskMillError:
        raise
    except Exception as error:
        raise FailedWork(
            "tracking_unreachable",
            f"MLflow failed for the registered model {name}: {reason(error)}.",
            "Start the server, or check its address (--tracking, or MLFLOW_TRACKING_URI), and run the same "
            "command again: it resumes where it was.",
        ) from None


def tag_value(text: str) -> str:
    """A text as the value of a tag: without secrets, not longer than registries take."""
    text = redact(text)
    return text if len(text) <= MAX_TAG else text[: MAX_TAG - 1] + "…"


def _registered(client: MlflowClient, name: str) -> Any | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


@contextlib.contextmanager
def _already_there() -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _find(client: MlflowClient, name: str, key: str, fingerprint: str) -> Version | None:
    """The version with a key and weights; the first, should there be several."""
    wanted = {KEY_TAG: key, FINGERPRINT_TAG: fingerprint}
    found = []
    with registry_errors(name):
        token = None
        while True:
            page = client.search_model_versions(f"name='{name}'", max_results=_PAGE, page_token=token)
            found += [one for one in page if wanted.items() <= one.tags.items()]
            token = page.token
            if not token:
                break
    return _version(min(found, key=lambda one: int(one.version))) if found else None


def _version(found: Any) -> Version:
    return Version(
        name=found.name,
        number=str(found.version),
        source=found.source,
        run_id=found.run_id or None,
        tags=dict(found.tags),
    )


def _log(client: MlflowClient, name: str, record: TrainedRecord, facts: Facts, run_id: str) -> None:
    from pipeline.serving.flavours.clipseg import log_clipseg
    from pipeline.serving.flavours.student import log_student

    log = log_student if facts.kind == "maskclip-plus" else log_clipseg
    log(
        client,
        record.uri,
        run_id=run_id,
        register_as=name,
        alias=None,
        tags=facts.tags(record),
        description=facts.description(record),
    )


def _holds(kind: ModelKind, place: str | Path, fingerprint: str | None) -> bool:
    """Whether a folder holds these weights, whole; without a fingerprint, its own."""
    try:
        record = read_trained(_RECORDS[kind], open_storage(place).uri)
        if fingerprint not in (None, record.fingerprint):
            return False
        read_trained_weights(record)
    except (MaskMillError, OSError):  # another host's folder, one that is gone, or out of reach
        return False
    return True


def _plain(text: str) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#&])", r"\\\1", " ".join(text.split()))
