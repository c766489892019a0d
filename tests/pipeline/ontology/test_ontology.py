"""Ontologies: background, ignore index, hashes, round trips, colours."""

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
from pipeline.ontology.palette import palette, perceived
from pipeline.ontology.reading import load_ontology, parse_classes


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "pets.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_default_background_is_a_clean_list():
    words = default_background()
    assert 25 <= len(words) <= 35
    assert len({w.casefold() for w in words}) == len(words)


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
