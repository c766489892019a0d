"""Prompts for fine-grained and novel concepts from section 4.4 of MaskCLIP (Zhou et al., ECCV 2022).

The paper's images come from the web and are not distributed; any folder of images will do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_SCENE = ("building", "ground", "grass", "tree", "sky")
_STREET = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
    "terrain", "sky", "person", "rider", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip


@dataclass(frozen=True)
class ConceptList:
    """Concepts to find, and the other classes in the images.

    Attributes:
        concepts: prompts to show.
        context: other classes, so that not every pixel becomes a concept.
        templates: name of a prompt template set.
    """

    concepts: tuple[str, ...]
    context: tuple[str, ...]
    templates: str = "openai85"


CONCEPTS: Mapping[str, ConceptList] = {
    "mickey": ConceptList(("Mickey Mouse", "Donald Duck"), _SCENE),
    "batman": ConceptList(("Batman", "Joker"), _SCENE),
    "mario": ConceptList(("Mario", "Luigi"), _SCENE),
    "gates": ConceptList(("Bill Gates", "Steve Jobs"), _SCENE),
    "batman-ext": ConceptList(
        (
            "Batman", "Joker", "James Gordon", "The Penguin", "Robin", "Alfred Pennyworth", "Catwoman",
            "Harley Quinn",
        ),
        (*(name for name in _STREET if name != "person"), "car"),
    ),
    "blur": ConceptList(("very blurry car", "car"), _STREET, templates="simple"),
    "sports": ConceptList(
        (
            "baseball player", "basketball player", "soccer player", "football player", "baseball court",
            "basketball court", "soccer court", "football court",
        ),
        ("person", "background", "wall", "building", "sky", "grass", "tree", "ground", "floor"),
    ),
    "car-brands": ConceptList(("Bugatti", "Cadillac", "Porsche", "Lamborghini"), (*_STREET, "background")),
    "car-color": ConceptList(
        ("white car", "blue car", "red car", "black car", "green car", "yellow car"), _STREET
    ),
}  # fmt: skip
