"""Ontologies: files, lists, built-in sets, their errors with lines, hashes and colours."""

from __future__ import annotations

import hashlib
import json
import pickle
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from models.errors import MaskMillError
from pipeline.ontology.ontology import MAX_CLASSES, ClassEntry, Ontology, default_background
from pipeline.ontology.palette import BACKGROUND_GREY, palette, perceived
from pipeline.ontology.reading import builtin_ontologies, load_ontology, parse_classes

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


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "pets.yaml"
    path.write_text(text, encoding="utf-8")
    return path


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


def test_default_background_is_a_clean_list():
    words = default_background()
    assert 25 <= len(words) <= 35
    assert len({w.casefold() for w in words}) == len(words)


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


@pytest.mark.parametrize(
    ("text", "gone"),
    [
        ("cat, dog", set()),
        ("cat, GRASS", {"grass"}),
        ("cat, trees", {"tree"}),
        ("cat, shelves", {"shelf"}),
        ("cat, stair", {"stairs"}),
        ("benches, fences", {"fence"}),
        ("grasshopper", set()),
    ],
)
def test_a_named_class_leaves_the_default_background(text, gone):
    ontology = parse_classes(text)
    assert ontology.names[0] == "background"
    assert set(default_background()) - set(ontology.background or ()) == gone


def test_background_vanishes_when_every_word_is_claimed():
    ontology = parse_classes(", ".join(default_background()))
    assert ontology.background is None
    assert ontology.names == default_background()


def test_background_given_or_none():
    assert parse_classes("cat", background=["wall", "sky"]).prompts() == [["wall", "sky"], ["cat"]]
    assert parse_classes("cat", background=None).prompts() == [["cat"]]
    with pytest.raises(MaskMillError, match="already used"):
        parse_classes("cat, Sky", background=["wall", "sky"])


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


def test_prompts_take_the_place_of_name_and_synonyms():
    ontology = Ontology.from_dict(
        {
            "name": "roads",
            "background": "default",
            "classes": [
                {"name": "D20", "prompts": ["crack", "cracked road"]},
                {"name": "D40", "synonyms": ["pothole"]},
            ],
        }
    )
    assert ontology.names == ("background", "D20", "D40")
    assert ontology.prompts()[1:] == [["crack", "cracked road"], ["D40", "pothole"]]
    # A name that another class has as a prompt is no clash: it is asked once.
    Ontology.from_dict(
        {
            "name": "n",
            "classes": [{"name": "table", "prompts": ["desk"]}, {"name": "furniture", "prompts": ["table"]}],
        }
    )


def test_a_word_that_is_a_prompt_is_no_default_background():
    ontology = Ontology.from_dict(
        {"name": "n", "background": "default", "classes": [{"name": "D1", "prompts": ["wall"]}]}
    )
    assert "wall" not in ontology.background and "sky" in ontology.background


def test_no_thresholds_is_none():
    assert parse_classes("cat").thresholds() is None
    assert parse_classes("cat", background=None).thresholds(0.5) == np.float32(0.5)


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


# --- sizes ---


@pytest.mark.parametrize(
    ("count", "background", "ignore", "dtype"),
    [
        (254, None, 255, np.uint8),
        (253, ("wall",), 255, np.uint8),
        (254, ("wall",), 65_535, np.uint16),
        (255, None, 65_535, np.uint16),
        (MAX_CLASSES, None, 65_535, np.uint16),
    ],
)
def test_ignore_index_follows_the_number_of_classes(count, background, ignore, dtype):
    classes = [f"c{i}" for i in range(count)]
    ontology = Ontology.from_dict({"name": "many", "classes": classes, "background": background})
    assert ontology.ignore_index == ignore
    assert ontology.mask_dtype is dtype
    assert ontology.num_classes <= ontology.ignore_index


@pytest.mark.parametrize("background", [None, ("wall",)])
def test_too_many_classes(background):
    classes = [f"c{i}" for i in range(MAX_CLASSES + (background is None))]
    with pytest.raises(MaskMillError, match=r"65535 classes.* at most 65,534"):
        Ontology.from_dict({"name": "many", "classes": classes, "background": background})


# --- value semantics ---

words = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=8).filter(
    lambda w: bool(w.strip()) and _key(w) != "background"
)


@st.composite
def ontologies(draw):
    pool = draw(st.lists(words, min_size=2, max_size=12, unique_by=_key))
    cut = draw(st.integers(1, len(pool) - 1))
    classes = [
        {
            "name": name,
            "threshold": draw(st.none() | st.floats(0, 1)),
            "color": draw(st.none() | st.from_regex(r"#[0-9a-f]{6}", fullmatch=True)),
            "kind": draw(st.sampled_from([None, "thing", "stuff"])),
            "merge": draw(st.sampled_from(["max", "mean"])),
        }
        for name in pool[:cut]
    ]
    rest = pool[cut:]
    where = draw(st.sampled_from(["background", "synonyms"]))
    if where == "synonyms":
        classes[0]["synonyms"] = rest
    return Ontology.from_dict(
        {"name": "any", "classes": classes, "background": rest if where == "background" else None}
    )


def _key(word: str) -> str:
    import unicodedata

    return " ".join(unicodedata.normalize("NFC", word).split()).casefold()


@given(ontologies())
def test_dict_json_yaml_and_pickle_round_trips(ontology):
    data = json.loads(json.dumps(ontology.to_dict()))
    again = Ontology.from_dict(data)
    assert again == ontology
    assert again.hash == ontology.hash
    assert pickle.loads(pickle.dumps(ontology)) == ontology
    assert Ontology.from_dict(yaml.safe_load(yaml.safe_dump(data))) == ontology


def test_hash_is_sha256_of_canonical_json_and_sees_every_field():
    base = {"name": "n", "classes": [{"name": "cat"}, {"name": "dog"}]}
    ontology = Ontology.from_dict(base)
    canonical = json.dumps(ontology.to_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert ontology.hash == hashlib.sha256(canonical.encode()).hexdigest()
    variants = [
        {**base, "name": "m"},
        {**base, "background": ["wall"]},
        {**base, "ignore_index": 254},
        {**base, "templates": "none"},
        {**base, "classes": [{"name": "dog"}, {"name": "cat"}]},
        *(
            {**base, "classes": [{"name": "cat", **extra}, {"name": "dog"}]}
            for extra in (
                {"synonyms": ["kitten"]},
                {"prompts": ["kitten"]},
                {"threshold": 0.1},
                {"color": "#000001"},
                {"kind": "thing"},
                {"merge": "mean"},
            )
        ),
    ]
    hashes = {Ontology.from_dict(v).hash for v in variants}
    assert len(hashes) == len(variants)
    assert ontology.hash not in hashes


def test_frozen():
    with pytest.raises(ValidationError):
        load_ontology("voc20").name = "x"  # type: ignore[misc]
    assert ClassEntry(name=" a  b ").name == "a b"


# --- colours ---


def test_palette_is_deterministic_unique_and_keeps_given_colours():
    given_colors = [None, (1, 2, 3), None, (200, 0, 0)]
    colors = palette(given_colors)
    np.testing.assert_array_equal(colors, palette(given_colors))
    assert colors[1].tolist() == [1, 2, 3]
    assert colors.dtype == np.uint8
    many = palette([None] * 5000)
    assert len(np.unique(many, axis=0)) == 5000
    assert palette([]).shape == (0, 3)


@pytest.mark.parametrize(("count", "least"), [(8, 0.15), (20, 0.11), (60, 0.06), (171, 0.035)])
def test_chosen_colours_stay_apart_in_every_vision(count, least):
    seen = perceived(palette([None] * count))
    normal, dichromat = np.inf, np.inf
    for index in range(1, count):
        distances = np.linalg.norm(seen[:index] - seen[index], axis=-1)
        normal, dichromat = min(normal, distances[:, 0].min()), min(dichromat, distances[:, 1:].min())
    assert normal > least  # in Oklab 0.02 is about one just noticeable difference
    assert dichromat > least * 0.45


def test_toyworld_colours_stay_apart():
    seen = perceived(load_ontology("toyworld").palette())
    assert min(np.linalg.norm(a[0] - b[0]) for a, b in combinations(seen, 2)) > 0.08


# --- examples ---


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
    assert error.value.code in ("signed_address", "password_in_address")
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


def test_hashes_are_those_of_before_there_were_examples():
    # Recorded in label tables; made with the version that had no such field.
    assert load_ontology("voc21").hash == "b8b8babaefbd9b81ea18302862c415f37dc36b4d3b2a1a6d818696ac60852b68"
    assert (
        load_ontology("toyworld").hash == "5b87c5b9083eca38b88c0a1c181bed70398aac9c5c378b44b7fd40c5970ce37f"
    )
    dumped = ClassEntry(name="cat").model_dump(mode="json")
    assert dumped == {
        "name": "cat", "synonyms": [], "threshold": None, "color": None, "kind": None, "merge": "max"
    }  # fmt: skip


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
