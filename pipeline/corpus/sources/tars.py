"""Members of tar archives, such as the shards of WebDataset: byte ranges, so that nothing is unpacked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from models.errors import WrongUse
from pipeline.corpus.sources.found import (
    IMAGE_EXTENSIONS,
    ImageList,
    LeftOut,
    missing,
)
from pipeline.files.containers import DamagedShard, Member, tar_members
from pipeline.files.redaction import without_signature

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_AT_ONCE = 8


def refuse_compressed(uri: str) -> None:
    """Refuse an archive whose members are no byte ranges of it.

    Raises:
        WrongUse: ``dataset_invalid``.
    """
    if uri.lower().endswith(COMPRESSED):
        raise WrongUse(
            "dataset_invalid",
            f"{without_signature(uri)} is a compressed archive: its members cannot be read one by one",
            "Unpack it, or decompress it to a .tar (gunzip, unxz, unzstd).",
        )


def read_shards(shards: Sequence[str], left_out: LeftOut) -> Iterator[ImageList]:
    """Yield the images in tar archives, by their names in WebDataset's sense.

    Of a member ``cats/1.seg.png``, ``cats/1`` is the key and ``seg.png`` says what it is. An image is a
    member for which that is an image's ending alone: masks beside the images are not taken for images.

    Args:
        shards: canonical URIs.
        left_out: is told which members are not taken.

    Raises:
        WrongUse: ``input_missing`` if there is no image in them, or no such archive.
    """
    found = False
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for start in range(0, len(shards), _AT_ONCE):
            some = shards[start : start + _AT_ONCE]
            for shard, (members, skipped) in zip(some, pool.map(_images, some), strict=True):
                left_out.update(skipped)
                if members:
                    found = True
                    ranges: dict[str, list[int | None]] = {
                        "offset": [member.offset for member in members],
                        "length": [member.length for member in members],
                    }
                    yield ImageList([f"{shard}#{member.name}" for member in members], ranges)
    if found:
        return
    raise WrongUse(
        "input_missing",
        f"no images in {without_signature(shards[0])}{f' and {len(shards) - 1} more' if shards[1:] else ''}; "
        f"found {left_out.describe() or 'no files at all'}",
        "An image in a shard is called KEY.jpg, or has another image's ending.",
    )


def _images(shard: str) -> tuple[list[Member], LeftOut]:
    members: dict[str, Member] = {}
    left_out = LeftOut()
    try:
        for member in tar_members(shard):
            base = member.name.rpartition("/")[2]
            ending = base[base.find(".") :].lower() if "." in base else "no ending"
            if base.startswith("."):
                left_out.add("hidden", member.name)
            elif ending not in IMAGE_EXTENSIONS:
                left_out.add(ending, member.name)
            elif not member.length:
                left_out.add("empty", member.name)
            else:
                members.pop(member.name, None)
                members[member.name] = member
    except FileNotFoundError:
        raise missing(shard, "there is no") from None
    except DamagedShard as error:
        left_out.add(f"rest of a damaged archive ({error})", shard)
    return list(members.values()), left_out
