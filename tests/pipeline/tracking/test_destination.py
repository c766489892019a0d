from __future__ import annotations

from pathlib import Path

import pytest

from models.errors import MaskMillError
from pipeline.tracking.destination import (
    artifact_location,
    resolve_uri,
    shown_uri,
    sqlite_file,
    with_credentials,
)


def test_by_default_sqlite_in_the_working_directory(tmp_path: Path) -> None:
    uri = resolve_uri(None)
    assert uri == f"sqlite:///{tmp_path}/mlruns.db"
    assert sqlite_file(uri) == tmp_path / "mlruns.db"
    assert shown_uri(uri) == "sqlite:///mlruns.db"
    assert artifact_location(uri, "maskmill-label") == f"file://{tmp_path}/mlruns/maskmill-label"


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("sqlite:////data/runs.db?timeout=9", "sqlite:////data/runs.db?timeout=9"),
        ("https://host:5000", "https://host:5000"),
        ("postgresql://u:p@h/db", "postgresql://u:p@h/db"),
        ("databricks", "databricks"),
        ("databricks://profile", "databricks://profile"),
    ],
)
def test_other_places_stay(uri: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_uri(uri) == expected
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert resolve_uri(None) == expected


@pytest.mark.parametrize(
    "uri", ["mlruns", "/data/mlruns", "file:///data/mlruns", "sqlite://", "sqlite:///:memory:"]
)
def test_what_mlflow_does_not_write_to_is_refused(uri: str) -> None:
    with pytest.raises(MaskMillError) as caught:
        resolve_uri(uri)
    assert caught.value.code == "wrong_use"


@pytest.mark.parametrize(
    ("kept", "around", "given", "expected"),
    [
        ("https://h", None, None, "https://h"),
        ("https://***@h", None, None, "https://h"),
        ("https://***@h", "https://me:pw@h", None, "https://me:pw@h"),
        ("https://***@h", "https://me:pw@elsewhere", None, "https://h"),
        ("https://***@h", "https://me:pw@h", "https://other", "https://other"),
    ],
)
def test_credentials_come_from_those_who_have_them(
    kept: str, around: str | None, given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if around:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", around)
    assert with_credentials(kept, given) == expected
