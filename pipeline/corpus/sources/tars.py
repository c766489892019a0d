"""Members of tar archives, such as the shards of WebDataset: byte ranges, so that nothing is unpacked."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from models.errors import WrongUse
from pipeline.corpus.sources.found import (
    IMAGE_EXTENSIONS,
    ImageList,
    PathsByReason,
    describe_left_out,
    leave_out,
    missing,
)
from pipeline.files.containers import DamagedShard, Member, tar_members
from pipeline.files.redaction import without_signature

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_AT_ONCE = 8


def refuse_compressed(uri: str) -> None:
    """Refuse an archive whose members are no byte ranges of it.

    Raises:
        WrongUse: ``source_invalid``.
    """
    if uri.lower().endswith(COMPRESSED):
        raise WrongUse(
            "source_invalid",
            f"{without_signature(uri)} is a compressed archive: its members cannot be read one by one",
            "Unpack it, or decompress it to a .tar (gunzip, unxz, unzstd).",
        )


def read_shards(shards: Sequence[str]) -> ImageList:
    """The images in tar archives, by their names in WebDataset's sense.

    Of a member ``cats/1.seg.png``, ``cats/1`` is the key and ``seg.png`` says what it is. An image is a
    member for which that is an image's ending alone: masks beside the images are not taken for images.

    Args:
        shards: canonical URIs.

    Raises:
        WrongUse: ``source_missing`` if there is no image in them, or no such archive.
    """
    found = ImageList([], {"offset": [], "length": []})
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for shard, (members, left_out) in zip(shards, pool.map(_images, shards), strict=True):
            for member in members:
                found.uris.append(f"{shard}#{member.name}")
                found.optional["offset"].append(member.offset)
                found.optional["length"].append(member.length)
            for reason, paths in left_out.items():
                found.left_out.setdefault(reason, []).extend(paths)
    if found.uris:
        return found
    raise WrongUse(
        "source_missing",
        f"no images in {without_signature(shards[0])}{f' and {len(shards) - 1} more' if shards[1:] else ''}; "
        f"found {describe_left_out(found.left_out) or 'no files at all'}",
        "An image in a shard is called KEY.jpg, or has another image's ending.",
    )


def _images(shard: str) -> tuple[list[Member], PathsByReason]:
    members: dict[str, Member] = {}
    left_out: PathsByReason = {}
    try:
        for member in tar_members(shard):
            base = member.name.rpartition("/")[2]
            ending = base[base.find(".") :].lower() if "." in base else "no ending"
            if base.startswith("."):
                leave_out(left_out, "hidden", member.name)
            elif ending not in IMAGE_EXTENSIONS:
                leave_out(left_out, ending, member.name)
            elif not member.length:
                leave_out(left_out, "empty", member.name)
            else:
                members.pop(member.name, None)
                members[member.name] = member
    except FileNotFoundError:
        raise missing(shard, "there is no") from None
    except DamagedShard as error:
        leave_out(left_out, f"rest of a damaged archive ({error})", shard)
    return list(members.values()), left_out
