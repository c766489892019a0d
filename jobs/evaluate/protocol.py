"""Which published protocol labels follow, and what it prescribes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from models.errors import WrongUse
from models.settings import as_written
from pipeline.datasets.base import Dataset
from pipeline.datasets.protocols import PROTOCOLS, Protocol, get_protocol
from pipeline.datasets.registry import DATASETS
from pipeline.datasets.zeroshot import zero_shot_split
from pipeline.labelling.recipes import LabelRecipe, change_recipe
from pipeline.ontology.ontology import Ontology

CUSTOM = "custom"

ProtocolName = Literal["seed", "unified", "custom"]


def is_toy(weights: Mapping[str, Any]) -> bool:
    """Whether the labels come from the toy CLIP or a student of it."""
    return "toyclip" in (weights["model"], weights.get("text", {}).get("model"))


def is_the_benchmark(dataset: Dataset, weights: Mapping[str, Any]) -> bool:
    """Whether results are comparable with published ones: the whole usual split, with real weights."""
    info = DATASETS.get(dataset.name)
    return (
        info is not None
        and dataset.split == info.default_split
        and info.official.get(dataset.split) == len(dataset.samples)
        and not is_toy(weights)
        and not str(weights["pretrained"]).startswith("random")
    )


def protocol_recipe(recipe: LabelRecipe, protocol: Protocol) -> LabelRecipe:
    """The recipe with the settings that the protocol prescribes."""
    return change_recipe(recipe, protocol.recipe_overrides())


def plan_labelling(
    dataset: Dataset, recipe: LabelRecipe, ontology: Ontology | None, protocol: ProtocolName | None
) -> tuple[LabelRecipe, Ontology]:
    """Recipe and ontology for labelling; refuses a combination that would violate the protocol."""
    ontology = ontology or dataset.classes
    if protocol in ("seed", "unified"):
        wanted = get_protocol(dataset.name, protocol)
        recipe = protocol_recipe(recipe, wanted)
        ontology = wanted.ontology(ontology)
    elif recipe.model == "toyclip" and ontology.templates == "openai85":
        ontology = Ontology.from_dict(ontology.to_dict() | {"templates": "toyworld"})
    followed_protocol(dataset, protocol, recipe, ontology)
    return recipe, ontology


def followed_protocol(
    dataset: Dataset,
    asked: ProtocolName | None,
    recipe: LabelRecipe,
    ontology: Ontology,
) -> Protocol | None:
    """The protocol that the labels follow; refuses a requested one that they do not."""
    if asked == CUSTOM:
        return None
    if asked is not None:
        wanted = get_protocol(dataset.name, asked)
        differing = _differences(dataset, recipe, ontology, wanted)
        if differing:
            raise WrongUse(
                "output_differs",
                f"This is not protocol {wanted.name}: {'; '.join(differing)}.",
                f"Label with --protocol {wanted.name} and without what it rules out; or --protocol custom.",
            )
        return wanted
    known = PROTOCOLS.get(dataset.name, {}).values()
    followed = (each for each in known if not _differences(dataset, recipe, ontology, each))
    return next(followed, None)


def _differences(dataset: Dataset, recipe: LabelRecipe, ontology: Ontology, protocol: Protocol) -> list[str]:
    made = recipe.effective()
    wanted = protocol.recipe_overrides() | {"min_confidence": 0.0, "images.corruption": ""}
    differing = [
        f"{key} is {as_written(made[key])}, not {as_written(value)}"
        for key, value in wanted.items()
        if _plain(made[key]) != _plain(value)
    ]
    classes = protocol.ontology(dataset.classes)
    if ontology.templates != protocol.templates:
        differing.append(f"templates are {as_written(ontology.templates)}, not {protocol.templates}")
    elif ontology.hash != classes.hash:
        differing.append(f"the classes or their words are not those of {dataset.name} in this protocol")
    return differing


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def class_groups(dataset: Dataset, zero_shot: str | None) -> list[str | None]:
    count = len(dataset.class_names)
    if zero_shot is None:
        return [None] * count
    split = zero_shot_split(zero_shot)
    if split.ontology != dataset.ontology:
        raise WrongUse(
            "wrong_use",
            f"The zero-shot split {split.name} is one of {split.ontology}; {dataset.name} has other classes.",
            f"Evaluate on --dataset {split.ontology}.",
        )
    unseen = set(split.unseen_ids)
    return ["unseen" if index in unseen else "seen" for index in range(count)]
