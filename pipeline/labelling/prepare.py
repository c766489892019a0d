"""From a recipe and an ontology to a Labeller: weights found, class names embedded, settings checked.

One function for each kind of Labeller; ``prepare_labeller`` chooses by what the recipe calls its model.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import MaskMillError, WrongUse
from pipeline.files.storage import canonical_uri
from pipeline.labelling.clipseg.prepare import changed_maskclip, refuse_examples
from pipeline.labelling.recipes import RECIPES, LabelRecipe, change_recipe, parse_settings
from pipeline.ontology.ontology import Ontology

if TYPE_CHECKING:
    from models.clip.text import TextClassifier
    from models.clip.weights import WeightSource
    from pipeline.labelling.labeller import Labeller
    from pipeline.labelling.maskclip import Words
    from pipeline.trained.student import StudentRecord

CheckWeights = Callable[[str], None]


@dataclass(frozen=True)
class PreparedLabeller:
    """A Labeller that any process can build.

    Attributes:
        make: builds it; picklable. Takes ``precision`` and, on a CPU, ``threads``; and ``words``, a function
            that gives what ``embed`` does and may wait for it, unless that is None.
        weights: model, the word that chose the weights, and their fingerprint; of a student also ``text``,
            the CLIP (with the same three) that its class names are embedded by.
        embed: embeds the class names, which takes seconds unless they are in the cache; raises as
            ``models.clip.text.build_text_classifier``.
    """

    make: Callable[..., Labeller]
    weights: dict[str, Any]
    embed: Callable[[], Words] | None = None

    def build(self, **settings: Any) -> Labeller:
        """The Labeller, in this process.

        Args:
            settings: of ``make``, without ``words``.

        Raises:
            MaskMillError: as ``make`` and ``embed`` do.
        """
        return self.make(**settings) if self.embed is None else self.make(**settings, words=self.embed)


def prepare_labeller(
    recipe: LabelRecipe,
    ontology: Ontology,
    *,
    precision: str = "auto",
    check_weights: CheckWeights = lambda _fingerprint: None,
) -> PreparedLabeller:
    """Find the weights, and read those that preparing needs, so that mistakes show early.

    Args:
        recipe: which model, and how its scores are read. The model is a student if it is a path or URI of a
            student's folder, CLIPSeg if it is ``clipseg``, and otherwise a CLIP that labels as MaskCLIP.
        ontology: the classes.
        precision: of the run that it is for; ``auto`` if that is yet to be decided.
        check_weights: is given the fingerprint before the class names are embedded; may raise.

    Raises:
        MaskMillError: see ``models.clip.weights.find_weights``, ``models.clip.loading.load_source`` and
            ``pipeline.trained.student.read_student_record``; ``recipe_invalid`` for settings that the model
            has no use for, ``classes_differ`` for classes that it cannot take.
    """
    if recipe.model == "clipseg":
        return _clipseg(recipe, ontology, precision, check_weights)
    refuse_examples(ontology, recipe.model)
    if _names_student(recipe.model):
        return _student(recipe, ontology, precision, check_weights)
    return _maskclip(recipe, ontology, precision, check_weights)


def labeller_module(recipe: LabelRecipe) -> str:
    """Where the Labeller of ``prepare_labeller`` is: what takes a process seconds to import.

    Raises:
        MaskMillError: as ``pipeline.trained.student.is_student``.
    """
    if recipe.model == "clipseg":
        return "pipeline.labelling.clipseg.labeller"
    return "pipeline.labelling.student" if _names_student(recipe.model) else "pipeline.labelling.maskclip"


def student_recipe(uri: str, settings: Sequence[str] = ()) -> tuple[LabelRecipe, Ontology]:
    """How a student labels: the recipe that names it, with the image sizes of its training, and its classes.

    Args:
        uri: the student's folder.
        settings: ``key=value`` changes, as of ``pipeline.labelling.recipes.load_recipe``.

    Raises:
        MaskMillError: as ``pipeline.trained.student.read_student_record``; ``recipe_invalid``.
    """
    from pipeline.trained.student import read_student_record

    record = read_student_record(uri)
    recipe = LabelRecipe(name=record.name, model=record.uri, pretrained=None, images=record.labelling)
    return change_recipe(recipe, parse_settings(settings)), record.ontology


def clipseg_recipe(uri: str, settings: Sequence[str] = ()) -> LabelRecipe:
    """How a trained CLIPSeg labels: recipe ``clipseg`` with its weights and the sizes of its training.

    Args:
        uri: its folder.
        settings: ``key=value`` changes, as of ``pipeline.labelling.recipes.load_recipe``.

    Raises:
        MaskMillError: as ``pipeline.trained.clipseg.read_clipseg_record``; ``recipe_invalid``.
    """
    from pipeline.trained.clipseg import read_clipseg_record

    # One spelling for each place: it is part of what a table was labelled with.
    recipe = RECIPES["clipseg"].replace(pretrained=canonical_uri(uri))
    sizes = read_clipseg_record(uri).sizes
    if sizes is not None:
        side, example = sizes
        recipe = recipe.replace(
            images=recipe.images.replace(scale=(side, side)),
            clipseg=recipe.clipseg.replace(example_size=example),
        )
    return change_recipe(recipe, parse_settings(settings))


def _names_student(model: str) -> bool:
    from pipeline.trained.student import is_student

    # A URI can mean nothing else; a folder that is no student's is told apart by reading it.
    return "://" in model or (os.sep in model and Path(model).is_dir()) or is_student(model)


def _maskclip(
    recipe: LabelRecipe, ontology: Ontology, precision: str, check_weights: CheckWeights
) -> PreparedLabeller:
    """The training-free teacher: a CLIP by name."""
    from models.clip.weights import find_weights
    from pipeline.labelling.maskclip import MaskClipLabeller, Words

    source = find_weights(recipe.model, recipe.pretrained)
    check_weights(source.fingerprint)
    embed_text = _text_embedder(source, ontology, precision)

    def embed() -> Words:
        text = embed_text()
        return Words(text.embeddings.cpu().numpy(), text.class_ids.cpu().numpy())

    make = functools.partial(
        MaskClipLabeller,
        model=recipe.model,
        pretrained=recipe.pretrained,
        num_classes=ontology.num_classes,
        thresholds=_thresholds(recipe, ontology),
        settings=recipe.maskclip,
        batch_size=recipe.batch_size,
        ignore_index=ontology.ignore_index,
    )
    weights = {"model": recipe.model, "pretrained": recipe.pretrained, "fingerprint": source.fingerprint}
    return PreparedLabeller(make, weights, embed)


def _student(
    recipe: LabelRecipe, ontology: Ontology, _precision: str, check_weights: CheckWeights
) -> PreparedLabeller:
    """A trained student: its own classes as it was trained, any others through its CLIP's text tower."""
    from pipeline.labelling.student import StudentLabeller
    from pipeline.trained.student import read_student_record, read_student_weights

    record = read_student_record(recipe.model)
    _refuse_settings(recipe)
    check_weights(record.fingerprint)
    read_student_weights(record)  # a damaged file is better found here than by every worker
    text = None if _same_words(record.ontology, ontology) else _other_words(record, ontology)
    make = functools.partial(
        StudentLabeller,
        uri=record.uri,
        fingerprint=record.fingerprint,
        embeddings=None if text is None else text.embeddings.cpu().numpy(),
        class_ids=None if text is None else text.class_ids.cpu().numpy(),
        thresholds=_thresholds(recipe, ontology),
        batch_size=recipe.batch_size,
        ignore_index=ontology.ignore_index,
    )
    weights = {
        "model": f"student:{record.uri}",
        "pretrained": None,
        "fingerprint": record.fingerprint,
        "text": {name: record.text[name] for name in ("model", "pretrained", "fingerprint")},
    }
    return PreparedLabeller(make, weights)


def _clipseg(
    recipe: LabelRecipe, ontology: Ontology, _precision: str, check_weights: CheckWeights
) -> PreparedLabeller:
    """CLIPSeg: every class is asked for by its words or by examples."""
    from pipeline.labelling.clipseg.prepare import prepare_clipseg

    return prepare_clipseg(recipe, ontology, recipe.clipseg, check_weights=check_weights)


def _refuse_settings(recipe: LabelRecipe) -> None:
    """Settings without effect are mistakes: whoever set them expects one."""
    useless = changed_maskclip(recipe)
    if recipe.pretrained not in (None, LabelRecipe().pretrained):
        useless.append("pretrained")
    if useless:
        raise WrongUse(
            "recipe_invalid",
            f"{', '.join(useless)} of recipe {recipe.name!r} mean nothing to a student ({recipe.model}).",
            "Leave them out; of a student's recipe, sizes, precision and thresholds can be changed.",
        )


def _same_words(own: Ontology, other: Ontology) -> bool:
    """Whether two ontologies give one classifier; names of sets, colours and thresholds do not matter."""
    return (own.prompts(), own.merges(), own.templates) == (other.prompts(), other.merges(), other.templates)


def _other_words(record: StudentRecord, ontology: Ontology) -> TextClassifier:
    """The classifier of classes that the student was not trained for."""
    from models.clip.weights import find_weights

    own = f"Or label with its own classes: {', '.join(record.ontology.names[:8])}"
    own += ", …" if record.ontology.num_classes > 8 else "."
    if record.config.get("learned_background"):
        raise WrongUse(
            "classes_differ",
            f"{record.uri} has learned what background is among its own classes; it takes no others.",
            f"Train with learned_background=false for an open vocabulary. {own}",
        )
    try:
        source = find_weights(record.text["model"], record.text["pretrained"])
    except MaskMillError as error:
        raise type(error)(
            error.code,
            f"Other classes than the student's own need the CLIP that it was trained with: {error.message}",
            f"{error.remedy} {own}",
        ) from error
    if source.fingerprint != record.text["fingerprint"]:
        raise WrongUse(
            "weights_differ",
            f"The weights of {source.name} here ({source.fingerprint[:12]}) are not those that the student "
            f"was trained with ({record.text['fingerprint'][:12]}): its features mean nothing to them.",
            f"Put the same weights in place. {own}",
        )
    return embed_names(source, ontology, record.text["precision"])


def embed_names(source: WeightSource, ontology: Ontology, precision: str) -> TextClassifier:
    """The class names as a classifier, from the cache if they were embedded before.

    Args:
        source: the CLIP.
        ontology: the classes.
        precision: of the run that it is for; ``auto`` if that is yet to be decided.

    Raises:
        MaskMillError: see ``models.clip.loading.load_source`` and ``models.clip.text.build_text_classifier``.
    """
    return _text_embedder(source, ontology, precision)()


def _text_embedder(source: WeightSource, ontology: Ontology, precision: str) -> Callable[[], TextClassifier]:
    """``embed_names`` in two steps: the text tower is read now, unless the cache has the answer."""
    from models.clip.loading import load_source
    from models.clip.text import build_text_classifier, cached_text_classifier
    from models.device import DTYPES, best_device, native_precision

    device = best_device()
    # With the arithmetic that is asked for, unless this machine would have to emulate it.
    native = native_precision(device)
    dtype = DTYPES[native if precision in ("auto", native) else "fp32"]
    words: dict[str, Any] = {
        "templates": ontology.templates,
        "merge": ontology.merges(),
        "cache_dir": cache_dir(),
    }
    text = cached_text_classifier(source.fingerprint, ontology.prompts(), **words, dtype=dtype)
    if text is not None:
        return lambda: text
    clip = load_source(source, device=device, dtype=dtype, towers="text")
    return lambda: build_text_classifier(clip, ontology.prompts(), **words)


def _thresholds(recipe: LabelRecipe, ontology: Ontology) -> list[float]:
    thresholds = ontology.thresholds(default=recipe.min_confidence)
    return [0.0] * ontology.num_classes if thresholds is None else thresholds.tolist()


def cache_dir() -> Path:
    """Where text embeddings are kept: ``$MASKMILL_CACHE``, else below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    own = os.environ.get("MASKMILL_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maskmill"
