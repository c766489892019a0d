from __future__ import annotations

import time

import pytest

from pipeline.files.redaction import command_line, redact, redact_tree


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
