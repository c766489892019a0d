"""Ontologies from files, lists and built-in names; errors with their lines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.errors import MaskMillError
from pipeline.ontology.ontology import default_background
from pipeline.ontology.palette import BACKGROUND_GREY
from pipeline.ontology.reading import builtin_ontologies, load_ontology, parse_classes


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "pets.yaml"
    path.write_text(text, encoding="utf-8")
    return path


BUILTINS = {
    "voc20": (20, "airplane", "tv monitor"),
    "voc21": (21, "background", "tv monitor"),
    "context59": (59, "airplane", "wood"),
    "context60": (60, "background", "wood"),
    "cocostuff171": (171, "person", "wood"),
    "cityscapes19": (19, "road", "bicycle"),
    "ade150": (150, "wall", "flag"),
    "toyworld": (14, "grass", "cloud"),
}


# --- built-in sets ---


@pytest.mark.parametrize(("name", "expected"), BUILTINS.items())
def test_builtin_sets_have_their_classes(name, expected):
    ontology = load_ontology(name)
    count, first, last = expected
    assert ontology.name == name
    assert ontology.num_classes == count
    assert len(ontology.names) == len(ontology.prompts()) == len(ontology.merges()) == count
    assert (ontology.names[0], ontology.names[-1]) == (first, last)
    assert ontology.ignore_index == 255
    assert ontology.palette().shape == (count, 3)
    assert len(set(map(tuple, ontology.palette().tolist()))) == count


def test_builtin_names_are_exactly_the_documented_ones():
    assert set(builtin_ontologies()) == set(BUILTINS)


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("voc20", {4: "bottle", 10: "dining table", 13: "motorbike", 17: "sofa"}),
        ("voc21", {5: "bottle", 11: "dining table", 20: "tv monitor"}),
        ("context60", {1: "airplane", 20: "cow", 34: "motorbike", 49: "sofa", 8: "boat", 55: "tv monitor"}),
        ("cocostuff171", {79: "toothbrush", 80: "banner", 133: "playingfield", 168: "blind window"}),
        ("cityscapes19", {8: "vegetation", 11: "person", 18: "bicycle"}),
        ("ade150", {7: "bed", 44: "chest of drawers", 89: "television receiver", 139: "fan"}),
        ("toyworld", {3: "brick", 6: "ladybug", 11: "chessboard"}),
    ],
)
def test_builtin_ids_are_those_of_the_datasets(name, ids):
    names = load_ontology(name).names
    assert {i: names[i] for i in ids} == ids


def test_voc21_is_voc20_behind_background_words():
    with_background, without = load_ontology("voc21"), load_ontology("voc20")
    assert with_background.classes == without.classes
    assert tuple(with_background.prompts()[0]) == with_background.background == default_background()


def test_context60_background_leaves_out_its_own_classes():
    background = load_ontology("context60").background
    assert background is not None
    assert not {"sky", "wall", "shelf"} & set(background)  # "shelves" is the class
    assert {"sea", "river"} <= set(background)


def test_toyworld_templates_and_kinds():
    toy = load_ontology("toyworld")
    assert toy.background is None
    assert toy.templates == "toyworld"
    assert toy.kinds() == ["stuff"] * 6 + ["thing"] * 8


# --- class lists ---


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cat, dog, grass", ("cat", "dog", "grass")),
        ("cat", ("cat",)),
        ("  cat  ,potted   plant ", ("cat", "potted plant")),  # blanks do not matter
        ('cat, "salt, pepper"', ("cat", "salt, pepper")),
        ('"say ""hi""",x', ('say "hi"', "x")),
        ("dog's bowl, cat", ("dog's bowl", "cat")),
        ("Katze, Hündin, 猫", ("Katze", "Hündin", "猫")),
        ("a {brace}, {}", ("a {brace}", "{}")),
        ("cat,\ndog", None),  # trailing comma on a line is an empty name
        ("cat\ndog", ("cat", "dog")),
        ("cat,, dog", None),
        ("cat, dog,", ("cat", "dog")),
        (",cat, dog, ,", ("cat", "dog")),
        ("，猫，犬", ("猫", "犬")),
        ("猫、犬､鳥", ("猫", "犬", "鳥")),
        ("قطة، كلب", ("قطة", "كلب")),
        ("\ufeffcat, dog", ("cat", "dog")),
        ('cat, "a，b;c|d"', ("cat", "a，b;c|d")),
        ("cat;dog", None),
        ("cat；dog", None),
        ("cat|dog", None),
        ("", None),
        (" , ", None),
        ("cat, Cat", None),
        ("cat, cat ", None),
        ('cat, "dog', None),
        ("cat, do\x07g", None),
    ],
)
def test_parse_classes(text, names):
    if names is None:
        with pytest.raises(MaskMillError) as error:
            parse_classes(text, background=None)
        assert error.value.code == "ontology_invalid"
    else:
        assert parse_classes(text, background=None).names == names


# --- YAML ---


def test_full_file(tmp_path):
    path = write(
        tmp_path,
        """
classes:
  - cat
  - {name: dog, synonyms: [puppy, hound], merge: mean, threshold: 0.4, color: "#AA3300", kind: thing}
background: [wall, floor]
ignore_index: 200
templates: ["a photo of a {}.", "{} in the scene"]
""",
    )
    ontology = load_ontology(path)
    assert ontology.name == "pets"
    assert ontology.prompts() == [["wall", "floor"], ["cat"], ["dog", "puppy", "hound"]]
    assert ontology.merges() == ["max", "max", "mean"]
    assert ontology.kinds() == ["stuff", None, "thing"]
    assert ontology.ignore_index == 200
    assert ontology.templates == ("a photo of a {}.", "{} in the scene")
    np.testing.assert_array_equal(ontology.thresholds(), np.array([0, 0, 0.4], dtype=np.float32))
    np.testing.assert_array_equal(ontology.thresholds(0.3), np.array([0.3, 0.3, 0.4], dtype=np.float32))
    assert ontology.palette()[0].tolist() == list(BACKGROUND_GREY)
    assert ontology.palette()[2].tolist() == [0xAA, 0x33, 0x00]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("classes:\n  - cat\nthreshhold: 1", 3, "unknown key 'threshhold'"),
        ("classes:\n  - cat\n  - name: dog\n    synonims: [x]", 4, "did you mean 'synonyms'"),
        ("classes:\n  - cat\n  - dog\n  - Cat", 4, "'Cat'"),
        ("classes:\n  - cat\n  - ''", 3, "must not be empty"),
        ("classes:\n  - cat\n  - '  '", 3, "must not be empty"),
        ("classes:\n  - cat\n  -", 3, "classes.1"),
        ("classes:\n  - cat\n  - no", 3, "put it in quotes"),
        ("classes:\n  - cat\n  - 3", 3, "put it in quotes"),
        ("classes:\n  - cat\n  - {name: off}", 3, "put it in quotes"),
        ("classes:\n  - cat\n  - name: dog\n    color: red", 4, "#rrggbb"),
        ("classes:\n  - cat\n  - name: dog\n    color: #ff0000\n", 4, "begins a comment"),
        ("classes:\n  - cat\n  - name: dog\n    threshold: 1.5", 4, "less than or equal to 1"),
        ("classes:\n  - cat\n  - name: dog\n    threshold: .nan", 4, "finite"),
        ("classes:\n  - cat\n  - name: dog\n    threshold: yes", 4, "threshold"),
        ("classes:\n  - cat\n  - name: dog\n    kind: animal", 4, "'thing' or 'stuff'"),
        ("classes:\n  - cat\n  - name: dog\n    merge: min", 4, "'max' or 'mean'"),
        ("classes:\n  - cat\n  - name: dog\n    synonyms:\n      - puppy\n      - CAT", 6, "'CAT'"),
        ("classes:\n  - {name: cat, synonyms: [pet]}\n  - {name: dog, synonyms: [pet]}", 3, "'pet'"),
        ("classes:\n  - {name: cat, synonyms: [cat]}", 2, "already used"),
        ("classes:\n  - cat\n  - {name: D20, prompts: [crack, Cat]}", 3, "prompt of 'cat'"),
        ("classes:\n  - {name: D20, prompts: [crack, crack]}", 2, "already used"),
        ("classes:\n  - {name: D20, prompts: [crack]}\n  - {name: D40, prompts: [crack]}", 3, "'D20'"),
        ("background: [wall]\nclasses:\n  - {name: D20, prompts: [wall]}", 1, "prompt of 'D20'"),
        ("classes:\n  - cat\n  - dog\nclasses:\n  - cow", 4, "appears twice"),
        ("classes:\n  - {name: cat, name: dog}", 2, "appears twice"),
        ("classes:\n  - cat\nbackground:\n  - wall\n  - cat", 5, "'cat'"),
        ("classes:\n  - cat\nbackground: []", 3, "no words"),
        ("classes:\n  - cat\nbackground: wall", 3, "not 'wall'"),
        ("classes:\n  - background\nbackground: [wall]", 2, "'background'"),
        ("classes:\n  - cat\nignore_index: 0", 3, "from 1 to 255"),
        ("classes:\n  - cat\nignore_index: 256", 3, "from 1 to 255"),
        ("classes:\n  - cat\ntemplates: ['a photo']", 3, "exactly once"),
        ("classes:\n  - cat\ntemplates: ['a {} {}']", 3, "exactly once"),
        ("classes:\n  - cat\ntemplates: ['a {name}']", 3, "'a {name}'"),
        ("classes:\n  - cat\ntemplates: [3]", 3, "template"),
        ("classes: []", 1, "at least one"),
        ("name: x", 1, "'classes' is missing"),
        ("classes: cat, dog", 1, "must be a list"),
        ("- cat\n- dog", 1, "mapping"),
        ("", 1, "empty"),
        ("classes:\n  - cat\n - dog", 3, "not valid YAML"),
        ("classes:\n  - cat\n\t- dog", 3, "not valid YAML"),
        ("classes:\n  - &a cat\n  - *a", 2, "aliases"),
        ("classes:\n  - !!python/object/apply:os.getcwd []", 2, "not valid YAML"),
        ("classes:\n  - cat\n1: x", 3, "keys must be plain words"),
        ("classes: [cat]\n---\nclasses: [dog]", 2, "not valid YAML"),
        ("classes:\n  - 2020-99-99", None, "not valid YAML"),
        ("classes:\n  - cat\n  - 2020-01-31", 3, "YAML reads this as 2020-01-31, not as a word"),
        ("classes:\n  - cat\n  - null", 3, "there is nothing here, where a word is expected"),
        ("classes:\n  - cat\n  - {name: ~}", 3, "there is nothing here, where a word is expected"),
        (
            "classes:\n  - cat\n  - name: dog\n    synonyms: puppy",
            4,
            "where a list is expected; write [puppy]",
        ),
        ("classes:\n  - cat\n  - name: dog\n    synonyms:", 4, "there is nothing here, where a list is"),
        ("classes:\n  - cat\n  - name: dog\n    synonyms: 2020-01-31", 4, "is not a list"),
        ("classes:\n  - cat\n  - [dog]", 3, '["dog"] is not a word'),
        ("classes:\n  - cat\n  - {name: [dog]}", 3, '["dog"] is not a word'),
        ("classes:\n  - cat\n  - name: dog\n    threshold: high", 4, '"high" is not a number'),
        ("classes:\n  - cat\n  - name: dog\n    examples: {}", 4, "{} is not a list"),
        ("classes:\n  - cat\nbackground: false", 3, "leave it out for no background class"),
        ("classes:\n  - cat\nbackground: 3", 3, "3 is not a list"),
        ("classes:\n  - cat\nbackground: [no]", 3, "YAML reads this as false, not as a word"),
        ("classes:\n  - cat\nignore_index: high", 3, '"high" is not a whole number'),
        ("classes:\n  - cat\nname:", 3, "there is nothing here, where a word is expected"),
        ("classes:", 1, "at least one"),
    ],
)
def test_errors_name_file_and_line(tmp_path, text, line, words):
    path = write(tmp_path, text)
    with pytest.raises(MaskMillError) as error:
        load_ontology(path)
    assert error.value.code == "ontology_invalid"
    place = f"{path}:{line}: " if line else f"{path}: "
    assert error.value.message.startswith(place)
    assert words in error.value.message
    assert error.value.remedy


@pytest.mark.parametrize("opening", ["[", "- ", "{a: "])
def test_a_file_of_a_hundred_thousand_brackets_is_refused(tmp_path, opening):
    path = write(tmp_path, "classes: " + opening * 100_000)
    with pytest.raises(MaskMillError) as error:
        load_ontology(path)
    assert error.value.code == "ontology_invalid" and str(path) in error.value.message


def test_words_of_pydantic_do_not_reach_the_user(tmp_path):
    values = ["null", "2020-01-31", "no", "3", "1.5", "word", "[word]", "[null]", "{a: b}", "[[a]]", "''"]
    keys = ["name", "synonyms", "prompts", "threshold", "color", "kind", "merge", "examples"]
    texts = [f"classes:\n  - {{name: cat, {key}: {value}}}" for key in keys[1:] for value in values]
    texts += [f"classes:\n  - {{name: {value}}}" for value in values]
    texts += [f"classes:\n  - cat\n  - {value}" for value in values]
    texts += [f"classes: {value}" for value in values]
    texts += [
        f"classes: [cat]\n{key}: {value}"
        for key in ("name", "background", "ignore_index", "templates")
        for value in values
    ]
    refused = 0
    for text in texts:
        try:
            load_ontology(write(tmp_path, text))
        except MaskMillError as error:
            refused += 1
            for word in ("Input should be", "valid tuple", "ClassEntry", "instance of", "datetime."):
                assert word not in error.message, (text, error.message)
    assert refused > len(texts) / 2


def test_every_problem_is_listed_up_to_five(tmp_path):
    path = write(tmp_path, "classes:\n" + "".join(f"  - {{name: c{i}, kind: x{i}}}\n" for i in range(8)))
    with pytest.raises(MaskMillError) as error:
        load_ontology(path)
    rows = error.value.message.splitlines()
    assert [row.split(":")[1] for row in rows[:5]] == ["2", "3", "4", "5", "6"]
    assert rows[5:] == ["… and 3 more"]


def test_not_text_is_invalid(tmp_path):
    path = tmp_path / "photo.yaml"
    path.write_bytes(b"\xff\xd8\xff\xe0" + bytes(range(256)))
    with pytest.raises(MaskMillError, match="not valid YAML"):
        load_ontology(path)


@pytest.mark.parametrize(
    ("source", "hint"), [("voc12", "voc2"), ("nothing/here.yaml", "voc20"), ("toyword", "mean toyworld")]
)
def test_missing_ontology_names_the_choices(source, hint):
    with pytest.raises(MaskMillError) as error:
        load_ontology(source)
    assert error.value.code == "ontology_invalid"
    assert hint in error.value.remedy
