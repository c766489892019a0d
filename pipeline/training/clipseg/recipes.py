"""Recipes of ``maskmill train clipseg``: the paper's models, the toy world's, and fine-tuning.

Numbers come from the authors' experiment files (arXiv 2112.10003 and its supplement): AdamW, learning rate
1e-3 with cosine decay to 1e-4, 20 000 updates of 64 samples at 352 x 352, fp16.

* ``clipseg-phrasecut`` learns from texts alone (PC), ``clipseg-phrasecut-plus`` from texts, pictures and
  mixtures of both, with 20 % negatives (PC+); ``-refined`` uses the head of three convolutions.
* ``clipseg-pascal-0shot`` and ``-1shot`` are PC+ without phrases for the test classes.
* ``clipseg-coco`` learns the training classes of a fold of COCO-20i.

Bugs of the reference's reader are settings of ``triplets``, off by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from models.errors import WrongUse
from models.settings import PAPER, ClipSegConfig, Settings
from pipeline.files.recipes import Recipe, RecipeBook
from pipeline.labelling.clipseg.options import CLIP, RELEASED
from pipeline.training.clipseg.data import SourceSettings
from pipeline.training.clipseg.triplets import TripletSettings
from pipeline.training.loop.settings import LoopSettings

_LOOP = LoopSettings(
    iterations=20_000,
    batch_size=64,
    optimizer="adamw",
    learning_rate=1e-3,
    min_learning_rate=1e-4,
    weight_decay=0.01,
    schedule="cosine",
    precision="fp16",
)


class PromptModel(Settings):
    """Which model to train, and what it starts from; picklable, so that every worker can build it."""

    kind: Literal["clipseg", "clip-deconv", "vitseg"] = "clipseg"
    """``clipseg``, or a baseline of the paper: ``clip-deconv`` or ``vitseg``."""
    clip: str = CLIP
    """NAME:PRETRAINED of the frozen CLIP (``models.clip.loading.load_clip``); the paper's row "no CLIP
    pre-training" is ``ViT-B-16-quickgelu:random:0``. Ignored if ``start`` is in Hugging Face's layout, which
    includes a CLIP."""
    decoder: ClipSegConfig = PAPER
    """Settings of a new decoder. CLIP-Deconv uses its width and its deepest layer."""
    start: str = ""
    """CLIPSeg weights to start from (``models.clipseg.weights.load_clipseg``: file, folder, hub name); ""
    builds a new decoder. The weights determine its settings, except ``decoder.dropout``."""
    start_layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Blocks of the tower that ``start`` reads; None takes those recorded with the weights, or (3, 6, 9) for
    the authors' files."""
    tower: str = "vit_base_patch16_384"
    """ViTSeg: a timm ViT with a class token."""
    tower_weights: str = "pretrained"
    """ViTSeg: weights of the tower: ``pretrained`` (timm's own), a file, or ``random:SEED``."""
    whiten: Annotated[int, Field(ge=0)] = 0
    """Samples from which to estimate the whitening of the decoder's inputs (``models.clipseg.whitening``); 0
    does not whiten, as in the paper. Directions in which these samples do not vary count little at first, so
    their phrases and examples should be diverse."""


class ClipSegRecipe(Recipe):
    """How to train a CLIPSeg from images, prompts and masks."""

    model: PromptModel = PromptModel()
    """Which model to train, and what it starts from."""
    source: SourceSettings = SourceSettings()
    """Which image-phrase pairs to train on."""
    triplets: TripletSettings = TripletSettings()
    """How pairs become samples."""
    loop: LoopSettings = _LOOP
    """Optimisation."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.model.start and self.model.kind != "clipseg":
            raise WrongUse(
                "setting_invalid",
                f"a {self.model.kind} is trained from scratch, but start is {self.model.start!r}.",
                "Set start to '', or kind to clipseg.",
            )
        return self


_PLUS = ClipSegRecipe(name="clipseg-phrasecut-plus")
# Minutes on two cores. Grouping the phrases of an image teaches more and shares a forward pass of the tower.
# An example's object fills its picture, so 64 pixels suffice. Dropout would more than double the time of an
# update on a CPU. Whitening raised the text IoU from 0.82 to 0.88 in 450 updates (one seed; of FiLM's inputs
# alone: 0.87), and allows three times the learning rate: 0.89. A second block added 0.005.
_TOY = ClipSegRecipe(
    name="toy",
    model=PromptModel(
        clip="toyclip:bundled",
        decoder=ClipSegConfig(extract_layers=(2,), refined=True, feedforward=128, dropout=0.0),
        whiten=512,
    ),
    triplets=TripletSettings(
        size=128, support_size=64, crop=False, resize="antialias", text_weight=(0.0, 1.0), grouped=True
    ),
    loop=LoopSettings(
        iterations=450,
        batch_size=32,
        optimizer="adamw",
        learning_rate=3e-3,
        min_learning_rate=3e-4,
        weight_decay=0.01,
        schedule="cosine",
        warmup=20,
        checkpoint_every=150,
        log_every=25,
    ),
)

CLIPSEG_RECIPES = RecipeBook(
    ClipSegRecipe,
    (
        # Without mixing, phrases get no template.
        _PLUS.replace(
            name="clipseg-phrasecut", triplets=TripletSettings(with_visual=False, prefix="plain")
        ),
        _PLUS,
        _PLUS.replace(
            name="clipseg-phrasecut-plus-refined",
            model=_PLUS.model.replace(decoder=_PLUS.model.decoder.replace(refined=True)),
            loop=_LOOP.replace(iterations=50_000),
        ),
        _PLUS.replace(name="clipseg-pascal-0shot", source=SourceSettings(unseen=("pascal-unseen10",))),
        _PLUS.replace(name="clipseg-pascal-1shot", source=SourceSettings(unseen=("pascal5i:0",))),
        # As HSNet reads COCO: whole images, squeezed.
        _PLUS.replace(
            name="clipseg-coco",
            source=SourceSettings(unseen=("coco20i:0",), synonyms=False),
            triplets=TripletSettings(crop=False, resize="antialias", q_neg=0.0, text_weight=(0.0, 1.0)),
            loop=_LOOP.replace(iterations=7000),
        ),
        # Not in the paper: a tenth of its learning rate and updates, for the user's data.
        _PLUS.replace(
            name="finetune",
            model=PromptModel(start=RELEASED),
            triplets=TripletSettings(resize="antialias", text_weight=(0.0, 1.0)),
            loop=_LOOP.replace(
iterations=2000, batch_size=32, learning_rate=1e-4, min_learning_rate=1e-5, warmup=50,
                precision="fp32", checkpoint_every=500,
            ),
        ),
        _TOY,
    ),
    default="clipseg-phrasecut-plus",
)  # fmt: skip

ABLATIONS: Mapping[str, tuple[str, ...]] = {
    "no CLIP pre-training": ("clip=ViT-B-16-quickgelu:random:0", "learning_rate=3e-4"),
    "no negatives": ("q_neg=0",),
    "50 % negatives": ("q_neg=0.5",),
    "no visual": ("with_visual=false", "prefix=plain"),
    "D = 16": ("reduce_dim=16",),
    "D = 128": ("reduce_dim=128",),
    "only layer 3": ("extract_layers=[3]",),
    "highlight mask": ("visual_prompt=blur_highlight",),
    "CLIP-Deconv": ("kind=clip-deconv",),
    "ViTSeg": ("kind=vitseg", "learning_rate=1e-4"),
}
"""``--set`` options for ``clipseg-phrasecut-plus`` that reproduce rows of the paper's Tables 3 and 9."""
