"""Zero-shot splits: the classes whose labels a model must not have seen.

Splits store class names, which are looked up in the built-in ontologies. An unknown name is therefore an
error when the split is used, never a silently shifted id.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from models.errors import WrongUse, did_you_mean
from pipeline.ontology.reading import load_ontology


@dataclass(frozen=True)
class ZeroShotSplit:
    """Unseen classes of an ontology; all others, including background, are seen.

    Attributes:
        name: name of the split.
        ontology: name of a built-in ontology.
        unseen: class names.
        source: the works that use it.
    """

    name: str
    ontology: str
    unseen: tuple[str, ...]
    source: str

    @property
    def unseen_ids(self) -> tuple[int, ...]:
        """Ids in the order of ``unseen``."""
        names = load_ontology(self.ontology).names
        return tuple(names.index(name) for name in self.unseen)

    @property
    def seen_ids(self) -> tuple[int, ...]:
        """All other ids, ascending."""
        unseen = set(self.unseen_ids)
        return tuple(
            number for number in range(load_ontology(self.ontology).num_classes) if number not in unseen
        )


_SPNET = "SPNet (CVPR 2019), ZS3Net, CaGNet, STRICT; MaskCLIP+ (arXiv 2112.01071)"
_CLIPSEG = "ZS3Net (NeurIPS 2019), JoEm; CLIPSeg (arXiv 2112.10003)"

_VOC5 = ("potted plant", "sheep", "sofa", "train", "tv monitor")
# The unseen sets grow by one pair at a time.
_VOC_PAIRS = (
    ("cow", "motorbike"),
    ("airplane", "sofa"),
    ("cat", "tv monitor"),
    ("train", "bottle"),
    ("chair", "potted plant"),
)

SPLITS: Mapping[str, ZeroShotSplit] = {
    split.name: split
    for split in (
        ZeroShotSplit("voc20", "voc20", _VOC5, _SPNET),
        ZeroShotSplit("voc21", "voc21", _VOC5, _SPNET),
        ZeroShotSplit(
            "context60",
            "context60",
            (
                "cow", "motorbike", "sofa", "cat", "boat", "fence", "bird", "tv monitor", "keyboard",
                "airplane",
            ),
            _SPNET,
        ),
        ZeroShotSplit(
            "cocostuff171",
            "cocostuff171",
            (
                "cow", "giraffe", "suitcase", "frisbee", "skateboard", "carrot", "scissors", "cardboard",
                "clouds", "grass", "playingfield", "river", "road", "tree", "concrete wall",
            ),
            _SPNET,
        ),
        *(
            ZeroShotSplit(
                f"pascal-unseen{2 * count}",
                "voc21",
                tuple(name for pair in _VOC_PAIRS[:count] for name in pair),
                _CLIPSEG,
            )
            for count in range(1, len(_VOC_PAIRS) + 1)
        ),
    )
}  # fmt: skip


def zero_shot_split(name: str) -> ZeroShotSplit:
    """Look up a split.

    Raises:
        MaskMillError: ``wrong_use`` for an unknown name.
    """
    if name not in SPLITS:
        raise WrongUse(
            "wrong_use",
            f"There is no zero-shot split {name!r}.",
            f"{did_you_mean(name, SPLITS)}Known: {', '.join(SPLITS)}.",
        )
    return SPLITS[name]
