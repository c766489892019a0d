from __future__ import annotations

import time

import pytest

from pipeline.files.redaction import command_line, redact, redact_tree, without_signature


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:pa55w0rd@host/x", "https://***@host/x"),
        ("https://me:p@55@host:5000/x", "https://***@host:5000/x"),  # an unescaped @ in the password
        ("https://lonely-token@host", "https://***@host"),
        ("postgresql+psycopg://me:pw@db/mlflow", "postgresql+psycopg://***@db/mlflow"),
        ("s3://key:secret@bucket/images", "s3://***@bucket/images"),
        ("abfss://container@account.dfs.net/x", "abfss://container@account.dfs.net/x"),  # no secret
        ("mail me@example.com about https://host/a@b", "mail me@example.com about https://host/a@b"),
        ("s3://b/k?X-Amz-Credential=A&X-Amz-Signature=B&part=1", "s3://b/k?X-Amz-Credential=***&X-Amz-Signature=***&part=1"),
        ("https://h/c?sv=2024&sig=abc%3D", "https://h/c?sv=2024&sig=***"),
        ("https://h/c?token=abc#frag", "https://h/c?token=***#frag"),
        ("https://h/c?page=2&size=3", "https://h/c?page=2&size=3"),
        ("maskmill label --api-key abc --images x", "maskmill label --api-key *** --images x"),
        ("maskmill label --token='a b' --images x", "maskmill label --token=*** --images x"),
        ("maskmill label --password --images x", "maskmill label --password --images x"),
        ("AWS_SECRET_ACCESS_KEY=ab/c+d= maskmill", "AWS_SECRET_ACCESS_KEY=*** maskmill"),
        ("'DB_PASSWORD=x y'", "'DB_PASSWORD=***'"),
        ('{"client_secret": "a b", "top_k": 5}', '{"client_secret": "***", "top_k": 5}'),
        ("clientSecret: 'abc'", "clientSecret: '***'"),
        ("Authorization: Bearer abcdefgh12345", "Authorization: Bearer ***"),
        ("key AKIAIOSFODNN7EXAMPLE used", "key *** used"),
        ("--set ks_axis=token monkey=3 num_tokens=5", "--set ks_axis=token monkey=3 num_tokens=5"),
        ("basic colours and a token of thanks", "basic colours and a token of thanks"),
    ],
)  # fmt: skip
def test_redact(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert redact(expected) == expected


AWS = (
    "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKID%2F2026&X-Amz-Date=20261129T1Z&X-Amz-Expires=60"
    "&X-Amz-SignedHeaders=host&X-Amz-Security-Token=tok%2Fen&X-Amz-Signature=abc"
)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (f"https://b.s3.amazonaws.com/a.jpg?{AWS}", "https://b.s3.amazonaws.com/a.jpg"),
        (f"https://b.s3.amazonaws.com/a.jpg?versionId=7&{AWS}#x", "https://b.s3.amazonaws.com/a.jpg?versionId=7#x"),
        ("https://b.s3.amazonaws.com/a?AWSAccessKeyId=A&Signature=b%3D&Expires=9", "https://b.s3.amazonaws.com/a"),
        ("https://storage.googleapis.com/b/a?X-Goog-Algorithm=G&X-Goog-Credential=me&X-Goog-Signature=f", "https://storage.googleapis.com/b/a"),
        ("https://storage.googleapis.com/b/a?GoogleAccessId=me&Expires=1&Signature=s", "https://storage.googleapis.com/b/a"),
        ("https://a.blob.core.windows.net/c/a?sv=2024&st=1&se=2&sr=b&sp=r&sig=x%2Fy%3D", "https://a.blob.core.windows.net/c/a"),
        ("https://cdn/a?Expires=1&Policy=p&Key-Pair-Id=K&Signature=s", "https://cdn/a"),
        ("https://oss/a?OSSAccessKeyId=1&Expires=2&Signature=3", "https://oss/a"),
        ("https://cos/a?q-sign-algorithm=sha1&q-ak=A&q-key-time=2&q-header-list=h&q-signature=s", "https://cos/a"),
        ("https://h/a?id=5&token=t&size=3", "https://h/a?id=5&size=3"),
        ("https://h/a?access_token=t", "https://h/a"),
        ("https://h/a?apikey=t&jwt=x", "https://h/a"),
        ("https://maps/a?center=1&key=AIza" + "x" * 35, "https://maps/a?center=1"),
        ("https://h/a?X%2DAmz%2DSignature=s", "https://h/a"),
        # no secrets: these parameters may say which image it is
        ("https://h/get?key=photos/1.jpg&Expires=never&sp=3", "https://h/get?key=photos/1.jpg&Expires=never&sp=3"),
        ("https://h/get?id=1&id=2&", "https://h/get?id=1&id=2&"),
        ("/photos/what?token=1.jpg", "/photos/what?token=1.jpg"),
    ],
)  # fmt: skip
def test_addresses_are_stored_without_signatures(address: str, expected: str) -> None:
    assert without_signature(address) == expected
    assert without_signature(expected) == expected


def test_values_of_secret_variables_are_found_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_PASSWORD", "opensesame/42")
    monkeypatch.setenv("GOOGLE_CREDENTIALS", "/home/me/google.json")
    monkeypatch.setenv("SHORT_TOKEN", "on")
    text = redact("path opensesame/42 and opensesame%2F42 from /home/me/google.json on")
    assert text == "path *** and *** from /home/me/google.json on"


def test_program_code_keeps_its_assignments() -> None:
    code = "let token = 'abc'; fetch('https://u:p@h/?sig=1')"
    assert redact(code, assignments=False) == "let token = 'abc'; fetch('https://***@h/?sig=***')"


def test_redact_tree_reaches_keys_lists_and_secret_names() -> None:
    tree = {"password": "x", "a": [1, None, {"uri": "s3://k:s@b"}], "https://u:p@h": True}
    assert redact_tree(tree) == {
        "password": "***",
        "a": [1, None, {"uri": "s3://***@b"}],
        "https://***@h": True,
    }


def test_command_line_can_be_typed_again() -> None:
    line = command_line(["/opt/bin/maskmill", "label", "--classes", "cat, dog", "--api-key", "xyz"])
    assert line == "maskmill label --classes 'cat, dog' --api-key ***"


@pytest.mark.parametrize(
    "piece", ["0123456789abcdef", "1-2.3_4", "a.b.c", "token", '"key": ', "&key", "https://a"]
)
def test_time_grows_with_the_length_only(piece: str) -> None:
    def seconds(length: int) -> float:
        text = piece * (length // len(piece))
        began = time.process_time()
        redact(text)
        return time.process_time() - began

    # Quadratic work on a million characters would take minutes.
    assert seconds(1_000_000) < 8
