"""The networks of a MaskCLIP+ training: student, text classifier and the teacher that labels crops online."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from models.errors import WrongUse
from pipeline.labelling.recipes import LabelRecipe, table_recipe
from pipeline.ontology.ontology import Ontology
from pipeline.table.record import TableRecord

if TYPE_CHECKING:
    import torch

    from models.clip.text import TextClassifier
    from models.clip.weights import WeightSource
    from models.maskclip import MaskClip
    from models.settings import StudentConfig
    from models.student.deeplab import DeepLab
    from pipeline.training.loop.checkpoints import Checkpoint
    from pipeline.training.maskclip_plus.recipes import MaskClipPlusRecipe, SelfTrainSettings


def text_source(
    recipe: MaskClipPlusRecipe, table: TableRecord, labels: str
) -> tuple[WeightSource, dict[str, Any]]:
    """The CLIP whose text tower becomes the last layer: the recipe's, else the teacher's.

    Returns:
        Its weights, and what the student's record says of them.

    Raises:
        MaskMillError: ``setting_invalid`` if the table was not labelled by a CLIP with words;
            ``weights_do_not_fit`` if it was labelled with other weights than those found.
    """
    from models.clip.weights import find_weights

    if recipe.text:
        model, _, pretrained = recipe.text.partition(":")
        source = find_weights(model, pretrained or None)
        return source, {"model": model, "pretrained": pretrained or None, "fingerprint": source.fingerprint}
    if table.source != "pseudo":
        raise WrongUse(
            "setting_invalid",
            f"{labels} holds true labels, and the student needs a CLIP to classify by its words.",
            "Name one: --set text=ViT-B-16-quickgelu:openai.",
        )
    recorded = table.weights.get("text", table.weights)
    if recorded["model"] == "clipseg":
        raise WrongUse(
            "setting_invalid",
            f"{labels} was labelled by CLIPSeg, and the student needs a CLIP to classify by its words.",
            "Name one, such as the one beneath CLIPSeg: --set text=ViT-B-16-quickgelu:openai.",
        )
    source = find_weights(recorded["model"], recorded["pretrained"])
    if source.fingerprint != recorded["fingerprint"]:
        raise WrongUse(
            "weights_do_not_fit",
            f"{labels} was labelled with other weights of {recorded['model']} "
            f"({recorded['fingerprint'][:12]}, here {source.fingerprint[:12]}).",
            "Put the same weights in place: the student's last layer is this CLIP's text tower.",
        )
    return source, {name: recorded[name] for name in ("model", "pretrained", "fingerprint")}


def teacher_recipe(table: TableRecord, labels: str) -> LabelRecipe:
    """The table's recipe, by which an online teacher labels crops.

    Raises:
        MaskMillError: ``setting_invalid`` if the table was not labelled by a CLIP.
    """
    if "text" in table.weights or table.weights["model"] == "clipseg" or table.source != "pseudo":
        raise WrongUse(
            "setting_invalid",
            f"{labels} was labelled by {table.weights['model']}, and only a CLIP can teach online.",
            "Take the guesses from the table: --set teacher=table.",
        )
    return table_recipe(table)


def build_student(
    config: StudentConfig,
    embeddings: np.ndarray,
    class_ids: np.ndarray,
    num_classes: int,
    backbone_weights: str,
) -> DeepLab:
    """Build an untrained student; torch's seed determines its random weights.

    Args:
        config: see ``models.student.deeplab``.
        embeddings: (P, D) float32; with the next two see ``models.clip.text.TextClassifier``.
        class_ids: (P,) int64.
        num_classes: C.
        backbone_weights: see ``models.student.backbones.load_weights``.
    """
    import torch

    from models.clip.text import TextClassifier
    from models.student.deeplab import DeepLab, load_backbone_weights

    student = DeepLab(config, TextClassifier(torch.tensor(embeddings), torch.tensor(class_ids), num_classes))
    load_backbone_weights(student, backbone_weights)
    return student


def build_teacher(
    recipe: LabelRecipe,
    embeddings: np.ndarray,
    class_ids: np.ndarray,
    num_classes: int,
    guessable: Sequence[int],
    device: torch.device,
) -> MaskClip:
    """Load the frozen CLIP that labels crops during training.

    Args:
        recipe: the label table's: which CLIP, and how its head is configured.
        embeddings: (P, D) float32; with the next two see ``models.clip.text.TextClassifier``.
        class_ids: (P,) int64.
        num_classes: C.
        guessable: ids of the classes that it may predict.
    """
    import torch

    from models.clip.loading import load_clip
    from models.clip.text import TextClassifier
    from models.helper import helper_of
    from models.maskclip import MaskClip
    from pipeline.training.maskclip_plus.task import guessable_classifier

    clip = load_clip(recipe.model, recipe.pretrained, device=device, towers="visual")
    text = TextClassifier(torch.tensor(embeddings), torch.tensor(class_ids), num_classes)
    bias = recipe.maskclip.classes.bias
    if bias:  # of the table's classes, among which a learned background comes first
        behind = bias[len(bias) - num_classes :]
        recipe = recipe.with_classes(bias=tuple(behind[class_id] for class_id in guessable))
    helper = helper_of(recipe.maskclip, device=device)
    return MaskClip(clip, guessable_classifier(text, guessable), recipe.maskclip, helper=helper)


def text_ids(settings: SelfTrainSettings, ontology: Ontology, student: StudentConfig) -> tuple[int, ...]:
    """Ids of the guessable classes in the text classifier, which excludes a learned background."""
    ids = settings.guessable_ids(ontology.num_classes)
    if not student.learned_background:
        return ids
    return tuple(class_id - 1 for class_id in ids)


def without_background(text: TextClassifier, ontology: Ontology) -> TextClassifier:
    """The classifier of a student that learns its background: without class 0, ids one lower.

    Raises:
        MaskMillError: ``setting_invalid`` if class 0 is not the background.
    """
    if ontology.names[0] != "background":
        raise WrongUse(
            "setting_invalid",
            f"learned_background: class 0 is {ontology.names[0]!r}, not the background.",
            "Train with classes that begin with background, or set learned_background=false.",
        )
    from models.clip.text import TextClassifier

    kept = text.class_ids > 0
    return TextClassifier(text.embeddings[kept], text.class_ids[kept] - 1, text.num_classes - 1)


def student_state(checkpoint: Checkpoint, *, keep_average: bool) -> Mapping[str, torch.Tensor]:
    """The student's weights in a checkpoint: its running average, or the latest."""
    if keep_average:
        averaged: Mapping[str, torch.Tensor] = checkpoint.training["task"]["averaged"]
        return averaged
    return checkpoint.module
