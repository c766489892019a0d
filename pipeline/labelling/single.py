"""Label single images in this process, without Ray and without a table: for notebooks and scripts.

from pipeline.labelling.single import load_labeller

labeller = load_labeller("maskclip", "cat, dog, grass")
mask = labeller("cat.jpg").labels
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from models.errors import WrongUse, did_you_mean
from pipeline.files import images
from pipeline.files.fetch import fetch
from pipeline.labelling.labeller import Labeller, Prediction
from pipeline.labelling.prepare import clipseg_recipe, prepare_labeller, student_recipe
from pipeline.labelling.recipes import (
    RECIPES,
    LabelRecipe,
    change_recipe,
    load_recipe,
    parse_settings,
    templates_for,
)
from pipeline.ontology.ontology import Ontology
from pipeline.ontology.reading import parse_classes
from pipeline.trained.clipseg import is_trained
from pipeline.trained.student import is_student

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class ImageLabeller:
    """A loaded model that labels one image at a time. It gives what ``maskmill label`` gives.

    Attributes:
        recipe: every setting of the labels.
        ontology: the classes; ``ontology.names[id]`` names a value of a mask, ``ontology.palette()[id]``
            colours it.
        labeller: what does the work.
    """

    recipe: LabelRecipe
    ontology: Ontology
    labeller: Labeller

    def __call__(self, image: str | os.PathLike[str] | NDArray[np.uint8] | Image.Image) -> Prediction:
        """Label an image.

        Args:
            image: a path or URI, uint8 (H, W, 3) RGB, or a Pillow image, which is taken upright.

        Returns:
            ``labels`` (H, W), class ids in uint8 (uint16 above 254 classes), ``ontology.ignore_index`` where
            uncertain; ``confidence`` uint8 (H, W), round(255 p).

        Raises:
            ImageError: the file cannot be read.
            ValueError: an array is not uint8 (H, W, 3).
        """
        pixels = self._pixels(image)
        seen = images.fit(pixels, self.recipe.images)
        return self.labeller.label([seen], [(pixels.shape[0], pixels.shape[1])])[0]

    def _pixels(self, image: str | os.PathLike[str] | NDArray[np.uint8] | Image.Image) -> NDArray[np.uint8]:
        if isinstance(image, str | os.PathLike):
            return images.decode(fetch(os.fspath(image)), max_pixels=self.recipe.images.max_pixels)
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise ValueError(f"an image is uint8 (H, W, 3), not {image.dtype} {image.shape}")
            return np.ascontiguousarray(image)
        from PIL import ImageOps

        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def load_labeller(
    model: str | LabelRecipe,
    classes: Ontology | str | Sequence[str] | None = None,
    *,
    settings: Sequence[str] = (),
    background: bool = True,
) -> ImageLabeller:
    """Load a model to label images with class names.

    Args:
        model: a recipe (``maskclip``, ``toy``, …; ``maskmill recipes`` lists them, or a YAML file), or the
            folder of a student or of a trained CLIPSeg.
        classes: names, as a list or separated by commas, or an ontology
            (``pipeline.ontology.reading.load_ontology``). None takes the classes of a student.
        settings: changes of the recipe, ``"head=value"``, as ``--set`` of ``maskmill label``.
        background: whether what belongs to none of the named classes becomes class 0, ``background``; an
            ontology says it itself.

    Raises:
        MaskMillError: ``name_unknown``; ``ontology_invalid``; ``setting_invalid``; ``weights_missing`` and
            others of ``pipeline.labelling.prepare.prepare_labeller``.

    >>> load_labeller("toy", "grass, zebra").ontology.names
    ('background', 'grass', 'zebra')
    """
    recipe, own = _recipe_of(model, settings)
    ontology = _ontology_of(classes, recipe, own, background=background)
    return ImageLabeller(recipe, ontology, prepare_labeller(recipe, ontology).build())


def _recipe_of(model: str | LabelRecipe, settings: Sequence[str]) -> tuple[LabelRecipe, Ontology | None]:
    """The recipe, and the classes of a student."""
    if isinstance(model, LabelRecipe):
        return change_recipe(model, parse_settings(settings)), None
    if model in RECIPES or model.endswith((".yaml", ".yml")):
        return load_recipe(model, settings), None
    if is_trained(model):
        return clipseg_recipe(model, settings), None
    if is_student(model):
        return student_recipe(model, settings)
    raise WrongUse(
        "name_unknown",
        f"There is no model {model}: it is neither a recipe nor the folder of a trained model.",
        f"{did_you_mean(model, RECIPES)}Name the output of maskmill train, or one of the recipes "
        f"{', '.join(RECIPES)}.",
    )


def _ontology_of(
    classes: Ontology | str | Sequence[str] | None,
    recipe: LabelRecipe,
    own: Ontology | None,
    *,
    background: bool,
) -> Ontology:
    if isinstance(classes, Ontology):
        return classes
    if classes is None:
        if own is None:
            raise WrongUse("wrong_use", f"{recipe.name} labels any classes.", 'Name some: "cat, dog, grass".')
        return own
    kind = "default" if background else None
    templates = templates_for(recipe, own)
    if isinstance(classes, str):
        return parse_classes(classes, background=kind, templates=templates)
    return Ontology.from_dict(
        {"name": "classes", "classes": list(classes), "background": kind, "templates": templates}
    )
