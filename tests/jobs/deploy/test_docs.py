"""docs/cluster.md: its policy, its commands and its files."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from jobs.cli import parse
from jobs.submit import Submit

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs/cluster.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def test_the_policy_of_s3_gives_the_least() -> None:
    (text,) = blocks("json")
    policy = json.loads(text)
    assert policy["Version"] == "2012-10-17"
    given = set()
    for statement in policy["Statement"]:
        assert statement["Effect"] == "Allow"
        places = statement["Resource"] if isinstance(statement["Resource"], list) else [statement["Resource"]]
        for action in statement["Action"]:
            assert "*" not in action
            given |= {(action, place.removeprefix("arn:aws:s3:::BUCKET")) for place in places}
    assert all(place for action, place in given if action != "s3:ListBucket")  # never the whole bucket
    written = {place for action, place in given if action == "s3:PutObject"}
    read = {place for action, place in given if action == "s3:GetObject"}
    assert written < read and {place for action, place in given if action == "s3:DeleteObject"} == written
    assert "/photos/*" in read - written


def test_the_commands_are_understood() -> None:
    lines = [line.partition(" #")[0] for block in blocks("sh") for line in block.splitlines()]
    submitted = [shlex.split(line)[1:] for line in lines if line.startswith("maskmill submit")]
    assert len(submitted) == 5
    for words in submitted:
        command = parse(words)
        assert isinstance(command, Submit)
        if command.job:
            assert parse(command.job)
    for overlay in re.findall(r"--kustomize (\S+)", TEXT):
        assert (ROOT / overlay / "kustomization.yaml").is_file()


def test_what_is_named_exists() -> None:
    for place in re.findall(r"\]\((?!https:)([^)#]+)[^)]*\)", TEXT):
        assert (ROOT / "docs" / place).exists(), place
    for place in re.findall(r"`((?:components|overlays)/[\w-]+)`", TEXT):
        assert (ROOT / "jobs/deploy/kubernetes" / place).is_dir(), place
