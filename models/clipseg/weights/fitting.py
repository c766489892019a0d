"""Build a decoder whose tensors match the file exactly, by name and shape.

Anything missing or unexpected is an error. Otherwise a refined checkpoint read into the plain head would
silently keep a random head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from models.clipseg.decoder import ClipSegDecoder
from models.errors import MaskMillError, WrongUse
from models.settings import ClipSegConfig


def build_decoder(
    config: ClipSegConfig, state: Mapping[str, Tensor], where: Path, *, width: int, embed_dim: int, patch: int
) -> ClipSegDecoder:
    with torch.device("meta"):
        decoder = ClipSegDecoder(config, width=width, embed_dim=embed_dim, patch=patch)
    expected = decoder.state_dict()
    check_names(where, expected, state)
    check_shapes(where, expected, state)
    # Copy: the file may change or vanish under a memory mapping.
    decoder.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return decoder.requires_grad_(True)


def check_names(where: Path, expected: Iterable[str], found: Iterable[str]) -> None:
    expected, found = set(expected), set(found)
    if expected != found:
        raise does_not_fit(where, sorted(expected - found), sorted(found - expected))


def check_shapes(where: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    wrong = [name for name, like in expected.items() if like.shape != found[name].shape]
    if wrong:
        raise WrongUse(
            "weights_do_not_fit",
            f"Tensors in {where} have other shapes than this decoder: "
            + ", ".join(f"{n} {tuple(found[n].shape)}, not {tuple(expected[n].shape)}" for n in wrong[:4])
            + ".",
            "Its widths must agree with one another, and with the CLIP beneath.",
        )


def does_not_fit(where: Path, missing: list[str], unexpected: list[str]) -> MaskMillError:
    def listed(word: str, names: list[str]) -> str:
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return f" {word}: {', '.join(names[:8])}{more}." if names else ""

    return WrongUse(
        "weights_do_not_fit",
        f"The tensors of {where} are not those of a CLIPSeg or of its settings."
        + listed("Missing", missing)
        + listed("Unexpected", unexpected),
        "Use the decoder as its authors saved it (rd64-uni.pth, rd16-uni.pth, rd64-uni-refined.pth), a file "
        "of save_decoder, or a folder in Hugging Face's layout; fetch it again if it was cut off.",
    )


def refuse_existing(paths: list[Path], overwrite: bool) -> None:
    there = [str(path) for path in paths if path.exists()]
    if there and not overwrite:
        raise WrongUse(
            "output_exists",
            f"Already there: {', '.join(there)}.",
            "Choose another place, or pass overwrite=True.",
        )


def detached(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
