"""Pictures that show a class: where they lie, their digests, what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from models.errors import MaskMillError
from pipeline.ontology.ontology import Ontology
from pipeline.ontology.reading import load_ontology


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "pets.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def shown(tmp_path: Path) -> Path:
    """An ontology with examples in a folder of its own."""
    folder = tmp_path / "sets"
    (folder / "pictures").mkdir(parents=True)
    for name in ("cup.jpg", "cup.png", "another.jpg"):
        (folder / "pictures" / name).write_bytes(name.encode())
    (folder / "cups.yaml").write_text(
        "classes:\n"
        "  - glass\n"
        "  - name: my cup\n"
        "    examples:\n"
        "      - {image: pictures/cup.jpg, mask: pictures/cup.png}\n"
        "      - pictures/another.jpg\n"
    )
    return folder / "cups.yaml"


def test_examples_lie_beside_the_file(shown, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ontology = load_ontology("sets/cups.yaml")
    none, (first, second) = ontology.examples()
    assert none == ()
    pictures = shown.resolve().parent / "pictures"
    assert (first.image, first.mask) == (str(pictures / "cup.jpg"), str(pictures / "cup.png"))
    assert (second.image, second.mask) == (str(pictures / "another.jpg"), None)
    with_background = Ontology.from_dict({**ontology.to_dict(), "background": ["table"]})
    assert with_background.examples() == [(), (), (first, second)]
    assert with_background.prompts() == [["table"], ["glass"], ["my cup"]]


@pytest.mark.parametrize("uri", ["https://h/cup.png?sig=hunter2", "https://me:hunter2@h/cup.png"])
def test_an_example_with_a_secret_in_its_address_is_refused(tmp_path, uri):
    path = tmp_path / "classes.yaml"
    path.write_text(f"classes:\n  - name: cup\n    examples:\n      - image: {uri}\n")
    with pytest.raises(MaskMillError) as error:
        load_ontology(str(path))
    assert error.value.code == "wrong_use"
    assert "hunter2" not in str(error.value)


def test_examples_survive_every_round_trip(shown):
    ontology = load_ontology(shown)
    data = json.loads(json.dumps(ontology.to_dict()))
    again = Ontology.from_dict(data)
    assert again == ontology
    assert again.hash == ontology.hash
    assert pickle.loads(pickle.dumps(ontology)) == ontology
    assert "examples" not in data["classes"][0]


def test_the_hash_sees_what_examples_show_and_not_where_they_lie(shown, tmp_path):
    first = load_ontology(shown)
    shown.parent.rename(tmp_path / "moved")
    moved = load_ontology(tmp_path / "moved" / "cups.yaml")
    assert moved.hash == first.hash
    assert moved != first
    for changed in ("cup.jpg", "cup.png", "another.jpg"):
        path = tmp_path / "moved" / "pictures" / changed
        before = path.read_bytes()
        path.write_bytes(b"something else")
        assert load_ontology(tmp_path / "moved" / "cups.yaml").hash != first.hash, changed
        path.write_bytes(before)
    entry = first.to_dict()["classes"][1]
    entry["examples"][0].pop("mask")
    entry["examples"][0].pop("sha256")
    assert Ontology.from_dict({**first.to_dict(), "classes": ["glass", entry]}).hash != first.hash


@pytest.mark.parametrize(
    ("entry", "line", "words"),
    [
        ("examples: [pictures/none.jpg]", 4, "none.jpg' cannot be read"),
        ("examples: [{image: pictures/cup.jpg, mask: pictures/none.png}]", 4, "none.png' cannot be read"),
        ("examples: [{mask: pictures/cup.png}]", 4, "the key 'image' is missing"),
        ("examples: [{image: pictures/cup.jpg, masks: x}]", 4, "did you mean 'mask'?"),
        ("examples: ['']", 4, "at least 1 character"),
        ("examples: [3]", 4, "examples.0"),
        ("examples: pictures/cup.jpg", 4, "examples"),
        (
            f"examples: [{{image: pictures/cup.jpg, sha256: {'0' * 64}}}]",
            4,
            "not the picture that sha256 names",
        ),
    ],
)
def test_wrong_examples_are_named_with_their_line(shown, entry, line, words):
    shown.write_text(f"classes:\n  - glass\n  - name: my cup\n    {entry}\n")
    with pytest.raises(MaskMillError) as caught:
        load_ontology(shown)
    assert caught.value.code == "ontology_invalid"
    assert f"{shown}:{line}: " in caught.value.message
    assert words in caught.value.message
