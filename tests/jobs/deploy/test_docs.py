"""docs/cluster.md: its policy, its commands and its files."""

from __future__ import annotations

import functools
import json
import re
import shlex
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3
import botocore.exceptions
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from benchmarks.faults.object_store import object_store, reached_by
from jobs.cli import parse
from jobs.submit import Submit
from pipeline.corpus.manifest import build_manifest
from pipeline.files.storage import open_storage
from pipeline.table.lease import Lease

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


@pytest.fixture
def guarded_store() -> Iterator[None]:
    """A store that knows the document's policy; its bucket has a photo in it."""
    (text,) = blocks("json")
    with object_store() as environment:
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        client.put_object(Bucket="bucket", Key="photos/a.png", Body=b"x")
        iam = boto3.client("iam")
        iam.create_user(UserName="maskmill")
        iam.put_user_policy(
            UserName="maskmill", PolicyName="least", PolicyDocument=text.replace("BUCKET", "bucket")
        )
        key = iam.create_access_key(UserName="maskmill")["AccessKey"]
        place = f"{environment['AWS_ENDPOINT_URL']}/moto-api/reset-auth"

        def refuse_after(requests: bytes) -> None:
            headers = {"Content-Type": "text/plain"}
            urllib.request.urlopen(urllib.request.Request(place, requests, headers)).close()

        refuse_after(b"0")
        try:
            with reached_by(
                {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}
            ):
                yield
        finally:
            refuse_after(b"inf")


@pytest.mark.slow
def test_the_policy_suffices_for_what_jobs_do_in_a_store(guarded_store: None) -> None:
    """Conditions are not looked at by the store of this test; actions and resources are."""
    client = boto3.Session().client("s3")
    for refused in (
        functools.partial(client.create_bucket, Bucket="other"),
        functools.partial(client.put_object, Bucket="bucket", Key="photos/b.png", Body=b"x"),
        functools.partial(client.delete_object, Bucket="bucket", Key="photos/a.png"),
        functools.partial(client.get_object, Bucket="bucket", Key="elsewhere/a.png"),
    ):
        with pytest.raises(botocore.exceptions.ClientError, match="AccessDenied"):
            refused()
    manifest = build_manifest("s3://bucket/photos")
    assert manifest["uri"].to_pylist() == ["s3://bucket/photos/a.png"]
    assert open_storage("s3://bucket/photos").read_bytes("a.png") == b"x"
    place = open_storage("s3://bucket/pets")
    with Lease.acquire(place, on_lost=pytest.fail):
        with place.new_file("labels/part.bin") as file:
            file.write(bytes(60_000_000))  # in several parts
        place.write_json("dataset.json", {"a": 1})
        place.move("dataset.json", "set_aside/dataset.json")
        place.delete("set_aside/dataset.json")
    assert list(place.list("labels")) == ["labels/part.bin"]
    table = pa.table({"id": [1]})
    pq.write_table(table, place.path("labels/a.parquet"), filesystem=place.arrow_filesystem())
    assert (
        ds.dataset(
            place.path("labels/a.parquet"), filesystem=place.arrow_filesystem(), format="parquet"
        ).to_table()
        == table
    )
