from __future__ import annotations

from pathlib import Path

import pytest

from jobs.cli import parse
from jobs.retrain import command


@pytest.mark.parametrize(
    ("status", "flags", "exits"),
    [(0, [], 0), (3, [], 3), (1, [], 1), (0, ["--accept-refusal"], 0), (3, ["--accept-refusal"], 0),
     (1, ["--accept-refusal"], 1)],
)  # fmt: skip
def test_a_refusal_alone_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, flags: list[str], exits: int
) -> None:
    """Ticks that end in each of these ways are in test_retrain.py."""
    monkeypatch.setattr(command, "retrain", lambda *_arguments, **_options: status)
    (tmp_path / "retrain.yaml").write_text(
        f"name: pets\noutput: {tmp_path}/out\nimages: s3://bucket/photos\nclasses: cat\n"
        "models: [{kind: maskclip-plus}]\nevaluation: {hold_out: 0.1}\n"
    )
    assert parse(["retrain", str(tmp_path / "retrain.yaml"), *flags]).run() == exits
