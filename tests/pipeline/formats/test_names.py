from __future__ import annotations

import unicodedata
from pathlib import PurePosixPath

from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus.manifest import stable_id
from pipeline.files.storage import canonical_uri, open_storage
from pipeline.formats.names import LONGEST_NAME, NamesSeen, safe

WINDOWS = {"con", "prn", "aux", "nul", *(f"{name}{n}" for name in ("com", "lpt") for n in range(10))}


def named(*generations: list[str]) -> list[str]:
    seen = NamesSeen(None)
    for number, uris in enumerate(generations):
        seen.add(number, uris)
    return [
        naming.name(uri, stable_id(uri))
        for naming, uris in zip(seen.namings(), generations, strict=True)
        for uri in uris
    ]


def test_names_mirror_the_source_below_the_common_folder() -> None:
    assert named(["/data/a/x.jpg", "/data/b/y.JPEG", "/data/z.png"]) == ["a/x", "b/y", "z"]
    assert named(["s3://bucket/photos/cat.jpg"]) == ["cat"]
    assert named(["https://h.org/a/1.jpg?size=2", "https://h.org/a/2.jpg#x"]) == ["1", "2"]


def test_images_of_one_name_all_get_their_id_whatever_their_order() -> None:
    uris = ["/d/cat.jpg", "/d/cat.png", "/d/Cat.jpg", "/d/dog.jpg", "/d/caf\u00e9.jpg", "/d/cafe\u0301.jpg"]
    names = dict(zip(uris, named(uris), strict=True))
    assert names["/d/dog.jpg"] == "dog"
    assert names["/d/cat.png"] == f"cat-{stable_id('/d/cat.png') % 2**64:016x}"
    assert all("-" in name for uri, name in names.items() if uri != "/d/dog.jpg")
    assert dict(zip(uris[::-1], named(uris[::-1]), strict=True)) == names
    # Somebody has the name that an id would make.
    pretender = f"/d/{names['/d/cat.png']}.jpg"
    assert len(set(named([*uris, pretender]))) == len(uris) + 1


def test_what_is_added_leaves_the_names_that_are_there() -> None:
    first = ["/d/e/cat.jpg", "/d/e/f/dog.jpg"]
    assert named(first, ["/d/e/cat.png", "/x/dog.jpg", "/d/e/new.jpg"]) == [
        "cat",
        "f/dog",
        f"cat-{stable_id('/d/e/cat.png') % 2**64:016x}",
        f"x/dog-{stable_id('/x/dog.jpg') % 2**64:016x}",
        "new",
    ]


def test_a_folder_never_has_the_name_of_another_image_s_file() -> None:
    names = named(["/d/a.jpg", "/d/a.png/b.jpg", "/d/v1.0/c.jpg"])
    assert names == ["a", "a.png_/b", "v1.0/c"]


HOSTILE = [
    "/d/../../etc/passwd", "s3://b/../../x.jpg", "s3://b/a/..\\..\\evil.jpg", "/d/C:\\windows\\x.jpg",
    "/d/NUL.jpg", "/d/com1.tar.jpg", "/d/.maskmill/plan.json", "/d/ .jpg", "/d/...jpg", "/d/-rf.jpg",
    "/d/a\nb.jpg", "/d/\u202egpj.exe", "/d/x. /y.jpg", "https://h/%2e%2e/x", "s3://b//.jpg",
    "/d/" + "ä" * 250, "/" + "/".join(["long"] * 400) + "/x.jpg", "memory://",
]  # fmt: skip


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=8))
def test_names_are_safe_and_unique(texts: list[str]) -> None:
    root = open_storage("/out")
    uris = list(dict.fromkeys([*HOSTILE, *(f"/d/{text}" for text in texts), *(f"s3://b/{t}" for t in texts)]))
    names = named(uris)
    folded = set()
    for name in names:
        parts = name.split("/")
        assert PurePosixPath(name).parts == tuple(parts)
        assert canonical_uri(root.uri_of(f"masks/{name}.png")) == f"/out/masks/{name}.png"
        assert unicodedata.is_normalized("NFC", name)
        assert len(name.encode()) <= LONGEST_NAME
        for part in parts:
            assert part == part.strip(" ") and not part.startswith((".", "-")) and not part.endswith(".")
            assert part.partition(".")[0].casefold() not in WINDOWS
            assert len(part.encode()) <= 140
            assert not set(part) & set('\\:*?"<>|\0\n')
        folded.add(unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold()))
    assert len(folded) == len(uris)


def test_a_safe_component_stays_as_it_is() -> None:
    for name in ("IMG_0001", "猫", "a b", "x.tar", "v1.0", "com10", "console"):
        assert safe(name) == name
