from __future__ import annotations

from typing import Any

import pytest

from pipeline.ontology.ontology import Ontology
from pipeline.ontology.reading import builtin_ontologies, load_ontology
from pipeline.ontology.united import unite


def ontology(*classes: Any, **fields: Any) -> Ontology:
    return Ontology.from_dict({"name": "test", "classes": list(classes), **fields})


PETS = ontology(
    "cat",
    {"name": "dog", "synonyms": ["puppy"], "color": "#112233"},
    background=["wall", "fish"],
    templates=["{}"],
)


def test_classes_that_the_first_lacks_follow_its_own() -> None:
    other = ontology("Cat", {"name": "hound", "synonyms": ["dog"]}, {"name": "cow", "synonyms": ["PUPPY"]})
    both = unite(PETS, other)
    assert both.names == ("background", "cat", "dog", "cow")
    assert both.prompts() == [["wall", "fish"], ["cat"], ["dog", "puppy"], ["cow"]]
    assert both.templates == PETS.templates and both.classes[1].color == "#112233"
    assert unite(both, other) == both


def test_a_background_of_either_stays() -> None:
    both = unite(ontology("cat"), PETS)
    assert both.names == ("background", "cat", "dog") and both.background == ("wall", "fish")
    assert unite(PETS, ontology("Fish")).background == ("wall",)
    assert unite(PETS, ontology({"name": "sea", "synonyms": ["fish"]}, "wall")).background == ("background",)


@pytest.mark.parametrize("name", builtin_ontologies())
def test_any_two_of_the_built_in_sets_can_be_united(name: str) -> None:
    first = load_ontology(name)
    assert unite(first, first).names == first.names
    for other in map(load_ontology, builtin_ontologies()):
        both = unite(first, other)
        assert both.names[-len(first.classes) :] == first.names or set(first.names) <= set(both.names)
        words = {word.casefold() for words in both.prompts() for word in words} | {"background"}
        assert {entry.name.casefold() for entry in other.classes} <= words


def test_many_classes_take_16_bits() -> None:
    wide = ontology(*(f"c{number}" for number in range(200)))
    both = unite(wide, ontology(*(f"d{number}" for number in range(200))))
    assert both.num_classes == 400 and both.ignore_index == 65_535
