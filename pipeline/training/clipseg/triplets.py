"""Training samples of CLIPSeg (arXiv 2112.10003, §4): an image, what to look for, and where it is.

The prompt is a phrase, an example image of the same thing (the *support*), or a mixture of both. A share of
the samples are negatives: their phrase and support do not belong to the image, and their mask is empty.
Phrases, images and masks come from a ``TripletSource``; this module draws everything random.

Bugs of the paper's code are settings, off by default: ``negative_rule``, ``support`` and ``grouped``.

Shapes: N pairs of an image and a phrase, P phrases, S side of the query, V side of the support, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator
from typing_extensions import Self

from models.errors import WrongUse
from models.settings import Settings, as_written
from pipeline.labelling.clipseg.options import PREFIXES, Prefix
from pipeline.training.clipseg.crops import Resize, crop_example, support_image, support_style
from pipeline.training.clipseg.sources.base import IGNORED, OBJECT, OTHER, Example, TripletSource
from pipeline.training.loop.protocols import Sample
from pipeline.training.samples.augment import MEAN_COLOUR

PHRASE_BYTES = 256
"""Width of the column ``phrase``; CLIP's 77 tokens rarely need more bytes."""
NegativeRule = Literal["absent", "other", "support"]
SupportRule = Literal["other", "any"]

_TRIES = 100
_Ids = npt.NDArray[np.int64]


class TripletSettings(Settings):
    """How pairs become samples. The defaults are the paper's PhraseCut+."""

    size: Annotated[int, Field(ge=1)] = 352
    """Side of the query image in pixels; 352 in the paper."""
    support_size: Annotated[int, Field(ge=1)] = 352
    """Side of the support image in pixels, cropped or not."""
    crop: bool = True
    """Crop a random square as large as the image's short side around the object; False squeezes the whole
    image to a square."""
    crop_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Accept a crop if more than this share of the *image's* pixels are object pixels in the crop; if none of
    ``crop_tries`` qualifies, take the one with most of the object."""
    crop_tries: Annotated[int, Field(ge=1)] = 50
    """Number of random crops to try."""
    resize: Resize = "corners"
    """``corners`` is bilinear with aligned corners and without antialiasing, as the reference reads
    PhraseCut; ``antialias`` averages over each pixel's area, as it reads COCO."""
    flip: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability of a horizontal flip of a query or a support; the paper does not flip."""
    q_neg: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Probability that a sample is a negative."""
    negative_rule: NegativeRule = "absent"
    """How to draw the phrase of a negative: ``absent`` among those not known to be true of the image;
    ``other`` among all but the sample's own, as the paper's code does, so that some negatives are false.
    ``support`` follows the reference's COCO data: phrase and mask stay, and the support is an image of
    another phrase with nothing marked in it."""
    prefix: Prefix = "shuffle+"
    """Set of templates, one of which is drawn for each phrase: a key of
    ``pipeline.labelling.clipseg.options.PREFIXES``. The reference uses ``shuffle+`` when it mixes text and
    image, else ``plain``."""
    with_visual: bool = True
    """Use supports; False is the ablation without visual prompts."""
    only_visual: bool = False
    """Prompt with supports alone; pairs whose phrase occurs only once are left out."""
    visual_prompt: str = "crop_blur_highlight352"
    """How to render a support from image and mask; see
    ``pipeline.labelling.clipseg.prompting.parse_style``."""
    support: SupportRule = "other"
    """Draw the support from all pairs of the phrase except the sample itself (``other``), or from all as the
    reference does (``any``), which may give the answer away."""
    text_weight: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.0, 0.5)
    """Minimum and maximum share of the text in the prompt, drawn uniformly per sample. The released models
    use (0, 0.5), the paper states (0, 1). Without a support the share is 1."""
    grouped: bool = False
    """Use the reference's order: shuffle the images once, the same in every epoch, and keep the phrases of an
    image together. False shuffles the pairs anew in each epoch."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, wrong, remedy in (
            ("text_weight", self.text_weight[0] > self.text_weight[1], "Give the lesser number first."),
            (
                "only_visual",
                self.only_visual and not self.with_visual,
                "It needs supports: set with_visual as well.",
            ),
            (
                "negative_rule",
                self.negative_rule == "support" and self.q_neg and not self.with_visual,
                "It needs supports: set with_visual, or q_neg to 0.",
            ),
        ):
            if wrong:
                message = f"{name} cannot be {as_written(getattr(self, name))}."
                raise WrongUse("setting_invalid", message, remedy)
        return self


@dataclass(frozen=True, eq=False)
class TripletSamples:
    """Samples over a source; see ``pipeline.training.loop.protocols.Samples``.

    Columns of a sample: ``image`` uint8 (3, S, S) RGB; ``mask`` uint8 (S, S): ``OBJECT``, ``OTHER`` or
    ``IGNORED``; ``weight`` float32 (S, S) in [0, 1], 0 where ignored; ``phrase`` uint8 (256,), see
    ``encode_phrase``; ``support`` uint8 (3, V, V) RGB, the mean colour if there is none; ``text_weight``
    float32 () in [0, 1]: share of the text in the prompt, 1 without a support; ``negative`` float32 (), 1 if
    phrase and support do not belong to the image, else 0.

    Raises:
        MaskMillError: ``setting_invalid``; ``too_few_images`` if ``only_visual`` is set and no phrase
            occurs twice.
    """

    source: TripletSource
    settings: TripletSettings = field(default_factory=TripletSettings)

    def __post_init__(self) -> None:
        if self.settings.with_visual:
            support_style(self.settings.visual_prompt, self.settings.support_size)
        if not self._eligible.any():
            raise WrongUse(
                "too_few_images",
                f"No phrase of {self.source.name} occurs twice, so none can be shown by another image.",
                "Give more images, or set only_visual to false.",
            )

    @property
    def num_samples(self) -> int:
        """Number of samples in an epoch."""
        return int(np.count_nonzero(self._eligible))

    def record(self) -> dict[str, Any]:
        """Describe the training data for the record of a run."""
        pairs = self.source.pairs
        return {
            "source": self.source.name,
            "fingerprint": self.source.fingerprint,
            "images": len(np.unique(pairs.image)),
            "phrases": len(pairs.phrases),
            "triplets": self.num_samples,
        }

    def order(self, epoch: int, seed: int) -> _Ids:
        """See ``Samples.order``."""
        order = self.source.order(epoch, seed, grouped=self.settings.grouped)
        return order[self._eligible[order]]

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        """See ``Samples.load``.

        Raises:
            MaskMillError: the query or its support cannot be read.
        """
        settings, pairs = self.settings, self.source.pairs
        image, mask, weight = crop_by_settings(self.source.read(index), settings.size, settings, rng)
        assert weight is not None
        own = int(pairs.phrase[index])
        other = self._other_phrase(index, rng) if rng.random() < settings.q_neg else None
        shown = own if other is None else other
        contradicts = settings.negative_rule == "support" and shown != own
        phrase = own if contradicts else shown
        negative = phrase != own
        if negative:
            mask = np.where(mask == OBJECT, OTHER, mask).astype(np.uint8)
        wordings, templates = pairs.phrases[phrase], PREFIXES[settings.prefix]
        text = wordings[int(rng.integers(len(wordings)))]
        text = templates[int(rng.integers(len(templates)))].replace("{}", text)
        text_weight = 0.0 if settings.only_visual else float(rng.uniform(*settings.text_weight))
        support = None
        if settings.with_visual:
            support = self._support(index, shown, rng, marked=not contradicts)
        return {
            "image": _planes(image),
            "mask": mask,
            "weight": weight,
            "phrase": encode_phrase(text),
            "support": self._no_support() if support is None else support,
            "text_weight": np.array(1.0 if support is None else text_weight, np.float32),
            "negative": np.array(negative, np.float32),
        }

    def blank(self) -> Sample:
        """A sample whose pixels are all ignored, with weight 0."""
        side = self.settings.size
        return {
            "image": _plain(side),
            "mask": np.full((side, side), IGNORED, np.uint8),
            "weight": np.zeros((side, side), np.float32),
            "phrase": encode_phrase(""),
            "support": self._no_support(),
            "text_weight": np.array(1.0, np.float32),
            "negative": np.array(0.0, np.float32),
        }

    @cached_property
    def _eligible(self) -> npt.NDArray[np.bool_]:
        """Which pairs become samples: all, or with ``only_visual`` those whose phrase has another pair."""
        pairs = self.source.pairs
        if not self.settings.only_visual:
            return np.ones(len(pairs), np.bool_)
        return np.bincount(pairs.phrase, minlength=len(pairs.phrases))[pairs.phrase] > 1

    def _other_phrase(self, index: int, rng: np.random.Generator) -> int | None:
        """Draw the phrase of a negative uniformly among those the rule allows; None if there is none."""
        pairs = self.source.pairs
        own, image = int(pairs.phrase[index]), int(pairs.image[index])
        # Phrases of the other source may be true of this image.
        first, end = 0, len(pairs.phrases)
        if pairs.seam is not None:
            first, end = (pairs.seam[1], end) if image >= pairs.seam[0] else (0, pairs.seam[1])

        def allowed(phrase: int) -> bool:
            if self.settings.only_visual and len(pairs.members(phrase)) < 2:
                return False
            return phrase != own and (
                self.settings.negative_rule != "absent" or not pairs.may_hold(image, phrase)
            )

        # Rejection sampling; list all allowed phrases only if they are too rare for it.
        for _ in range(_TRIES):
            phrase = int(rng.integers(first, end))
            if allowed(phrase):
                return phrase
        listed = [phrase for phrase in range(first, end) if allowed(phrase)]
        return listed[int(rng.integers(len(listed)))] if listed else None

    def _support(
        self, index: int, phrase: int, rng: np.random.Generator, *, marked: bool
    ) -> npt.NDArray[np.uint8] | None:
        """Draw and render an image of a phrase; None if the phrase occurs only once.

        That holds for negatives too, although the one image would do: otherwise the lack of a support would
        give positives away.
        """
        settings, block = self.settings, self.source.pairs.block
        found = self.source.pairs.members(phrase)
        if len(found) < 2:
            return None
        if settings.support == "other":
            found = found[found != index]
        near = found[block[found] == block[index]]
        if (near != index).any():
            found = near
        chosen = int(found[rng.integers(len(found))])
        image, mask, _ = crop_by_settings(self.source.read(chosen), settings.support_size, settings, rng)
        inside = mask == OBJECT if marked else np.zeros(mask.shape, np.bool_)
        return support_image(image, inside, settings.visual_prompt, rng)

    def _no_support(self) -> npt.NDArray[np.uint8]:
        return _plain(self.settings.support_size)

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "settings": self.settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def crop_by_settings(
    example: Example, side: int, settings: TripletSettings, rng: np.random.Generator
) -> Example:
    """Call ``crop_example`` with the settings."""
    return crop_example(
        example, side, rng, crop=settings.crop, tries=settings.crop_tries, share=settings.crop_share,
        resize=settings.resize, flip=settings.flip,
    )  # fmt: skip


def encode_phrase(text: str) -> npt.NDArray[np.uint8]:
    """Encode a text as uint8 (256,): zero-padded UTF-8, truncated between two characters."""
    data = text.encode()[:PHRASE_BYTES].decode(errors="ignore").encode()
    return np.frombuffer(data.ljust(PHRASE_BYTES, b"\0"), np.uint8).copy()


def decode_phrase(row: npt.NDArray[np.uint8]) -> str:
    """Decode the result of ``encode_phrase``."""
    return row.tobytes().rstrip(b"\0").decode()


def _planes(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def _plain(side: int) -> npt.NDArray[np.uint8]:
    colour = np.array(MEAN_COLOUR, np.uint8)[:, None, None]
    return np.broadcast_to(colour, (3, side, side)).copy()
