"""Recipes of ``maskmill train clipseg``: the paper's models, the toy world's, and fine-tuning.

Numbers are those of the authors' experiment files (arXiv 2112.10003 and its supplement): AdamW with 1e-3
falling by a cosine to 1e-4, 20 000 updates of 64 samples at 352 x 352, fp16.

* ``clipseg-phrasecut`` learns from texts alone (PC), ``clipseg-phrasecut-plus`` from texts, pictures and
  mixtures of both, a fifth of them negatives (PC+); ``-refined`` with the head of three convolutions.
* ``clipseg-pascal-0shot`` and ``-1shot`` are PC+ without phrases for the classes that are tested later.
* ``clipseg-coco`` learns the training classes of a fold of COCO-20i.

Where the reference's reader slips, its way is a setting of ``triplets`` and the sane one the default.
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
    """Which model is trained, and what it starts from; picklable, so that every worker can build it."""

    kind: Literal["clipseg", "clip-deconv", "vitseg"] = "clipseg"
    """``clipseg``, or a baseline of the paper: ``clip-deconv`` or ``vitseg``."""
    clip: str = CLIP
    """NAME:PRETRAINED of the frozen CLIP, as ``models.clip.loading.load_clip`` takes them; the paper's row
    "no CLIP pre-training" is ``ViT-B-16-quickgelu:random:0``. With ``start`` in Hugging Face's layout,
    which holds a CLIP, it is not used."""
    decoder: ClipSegConfig = PAPER
    """Of a new decoder. CLIP-Deconv takes its width and its deepest layer."""
    start: str = ""
    """Weights of a CLIPSeg to go on from, as ``models.clipseg.weights.load_clipseg`` takes them (file,
    folder, hub name), in place of a new decoder; "" is a new one. Its settings, apart from
    ``decoder.dropout``, are those of the weights."""
    start_layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Blocks of the tower that ``start`` reads; None takes what the weights say, and (3, 6, 9) for the
    authors' files."""
    tower: str = "vit_base_patch16_384"
    """ViTSeg: a timm ViT with a class token."""
    tower_weights: str = "pretrained"
    """ViTSeg: weights of the tower: ``pretrained`` (timm's own), a file, or ``random:SEED``."""
    whiten: Annotated[int, Field(ge=0)] = 0
    """Samples that show how to whiten what the decoder reads (``models.clipseg.whitening``); 0 leaves it as
    it is, as the paper does. What they do not show to vary counts little at first, so their phrases and
    examples should be many and different."""


class ClipSegRecipe(Recipe):
    """How images, prompts and masks become a CLIPSeg."""

    model: PromptModel = PromptModel()
    """What is trained, and what it starts from."""
    source: SourceSettings = SourceSettings()
    """Which pairs of an image and a phrase there are."""
    triplets: TripletSettings = TripletSettings()
    """How pairs become samples."""
    loop: LoopSettings = _LOOP
    """Optimisation."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.model.start and self.model.kind != "clipseg":
            raise WrongUse(
                "setting_invalid",
                f"a {self.model.kind} is trained from the beginning, and start is {self.model.start!r}.",
                "Set start to '', or kind to clipseg.",
            )
        return self


_PLUS = ClipSegRecipe(name="clipseg-phrasecut-plus")
# Minutes on two cores. Phrases of an image in one batch teach more than phrases of many, and share a run of
# the tower; an example's object fills its picture, so 64 pixels do. Dropout would more than double the time
# of an update on a CPU. Whitening took the text IoU from 0.82 to 0.88 in 450 updates (one seed; of FiLM's
# inputs alone: 0.87), and bears three times the learning rate: 0.89. A second block added 0.005.
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
        # Phrases go in raw where nothing is mixed.
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
        # HSNet's reader: whole images, squeezed.
        _PLUS.replace(
            name="clipseg-coco",
            source=SourceSettings(unseen=("coco20i:0",), synonyms=False),
            triplets=TripletSettings(crop=False, resize="antialias", q_neg=0.0, text_weight=(0.0, 1.0)),
            loop=_LOOP.replace(iterations=7000),
        ),
        # Not of the paper: a tenth of its rate and of its updates, for data of one's own.
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
"""What to ``--set`` on ``clipseg-phrasecut-plus`` for the rows of the paper's Tables 3 and 9."""
