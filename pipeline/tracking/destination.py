"""The MLflow destination: URI, timeouts and logging."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import WrongUse
from pipeline.files.redaction import MASK, redact

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

DEFAULT_URI = "sqlite:///mlruns.db"
EXPERIMENT_PREFIX = "maskmill-"
URI_VARIABLE = "MLFLOW_TRACKING_URI"
LIVE_TIMEOUT_S = 10
"""Per request during a run; an unresponsive server blocks only the sending thread."""
FLUSH_TIMEOUT_S = 60
"""Per request of a command that only talks to MLflow."""


def resolve_uri(uri: str | None) -> str:
    """The tracking URI to use, independent of the working directory.

    Args:
        uri: the user's choice; None takes MLFLOW_TRACKING_URI, else SQLite in the working directory.

    Raises:
        WrongUse: ``wrong_use`` for a folder, a file store or an in-memory database.
    """
    chosen = uri or os.environ.get(URI_VARIABLE) or DEFAULT_URI
    if re.match(r"databricks(-uc|://|$)", chosen):
        return chosen
    scheme, found, rest = chosen.partition("://")
    if not found or scheme == "file":
        raise WrongUse(
            "wrong_use",
            f"{redact(chosen)} is not a tracking URI that MLflow writes to.",
            f"Give {DEFAULT_URI}, https://HOST:PORT, another URI of MLflow, or off.",
        )
    if scheme.partition("+")[0] != "sqlite":
        return chosen
    path, question, options = rest.removeprefix("/").partition("?")
    if not path or ":memory:" in path:
        raise WrongUse(
            "wrong_use", f"{chosen} would be lost at the end of the run.", f"Name a file: {DEFAULT_URI}."
        )
    return f"{scheme}:///{os.path.abspath(path)}{question}{options}"


def sqlite_file(uri: str) -> Path | None:
    """The database file of a resolved SQLite URI; None for any other."""
    scheme, _, rest = uri.partition("://")
    return Path(rest[1:].partition("?")[0]) if scheme.partition("+")[0] == "sqlite" else None


def artifact_location(uri: str, experiment: str) -> str | None:
    """Artifact location of a new experiment: next to an SQLite file; None lets the server choose."""
    database = sqlite_file(uri)
    return None if database is None else (database.parent / "mlruns" / experiment).as_uri()


def shown_uri(uri: str) -> str:
    """A resolved URI for messages: no secrets, SQLite relative to the working directory."""
    database = sqlite_file(uri)
    if database is not None and database.parent == Path.cwd():
        return f"sqlite:///{database.name}"
    return redact(uri)


def with_credentials(kept: str, given: str | None) -> str:
    """Restore the credentials of a URI that was redacted in a journal.

    Args:
        kept: a resolved URI after ``redact``.
        given: a URI that the user gives now instead, or None.
    """
    if given is not None:
        return resolve_uri(given)
    around = os.environ.get(URI_VARIABLE)
    if MASK in kept and around and redact(around) == kept:
        return around
    # MLflow itself reads MLFLOW_TRACKING_USERNAME, _PASSWORD, _TOKEN and ~/.mlflow/credentials.
    return kept.replace(f"{MASK}@", "")


def set_limits(timeout_s: int) -> None:
    """Limit MLflow's timeouts and output; variables set by the user take precedence.

    MLflow reads these variables on every request and offers no other way. Its own retries are off: they
    would repeat the creation of a run, which is safe only after searching for it.

    Args:
        timeout_s: per request.
    """
    for name, value in {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_DATABRICKS_ENDPOINT_HTTP_RETRY_TIMEOUT": str(timeout_s),
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "GIT_PYTHON_REFRESH": "quiet",
    }.items():
        os.environ.setdefault(name, value)


def connect(uri: str) -> MlflowClient:
    """Create a client. Importing MLflow takes seconds; a missing SQLite database is created."""
    import logging

    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic", "sqlalchemy"):
        logging.getLogger(name).setLevel(logging.ERROR)
    database = sqlite_file(uri)
    if database is not None:
        database.parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(uri, registry_uri=uri)


def reason(error: BaseException) -> str:
    """Why MLflow could not be reached, in one short line without secrets."""
    text = str(error) or type(error).__name__
    low = f"{type(error).__name__}: {text}".lower()
    for sign, short in (
        ("connection refused", "connection refused"),
        ("connection aborted", "the connection broke"),
        ("connection reset", "the connection broke"),
        ("timed out", "no answer in time"),
        ("name or service not known", "unknown host"),
        ("failed to resolve", "unknown host"),
        ("database is locked", "the database is locked"),
    ):
        if sign in low:
            return short
    return redact(" ".join(text.split()))[:200]
