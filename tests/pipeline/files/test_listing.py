"""Listing what is below a prefix of an object store, page by page and folder by folder."""

from __future__ import annotations

import itertools
from collections import Counter

import boto3
import pytest

from models.errors import MaskMillError
from pipeline.files.listing import list_below
from pipeline.files.storage import Storage, open_storage

NAMES = [
    "top.jpg",
    *(f"a/{number}.jpg" for number in range(9)),
    *(f"b/{one}/{two}/x.jpg" for one in range(3) for two in range(3)),
    *(f"c/1/2/3/4/5/{number}.jpg" for number in range(9)),
    "c/1/here.jpg",
    "c/1/2/3/4/there.jpg",
    "odd name/ü #1.jpg",
]


@pytest.fixture
def store(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """``NAMES`` in an object store whose pages hold four of them."""
    client, name = boto3.client("s3"), bucket.split("/")[2]
    for key in NAMES:
        client.put_object(Bucket=name, Key=f"table/{key}", Body=b"x")
    client.put_object(Bucket=name, Key="table/b/", Body=b"")  # the place of a folder, for consoles
    client.put_object(Bucket=name, Key="table-of-another/a.jpg", Body=b"x")
    storage = open_storage(bucket)
    whole = storage.fs.call_s3
    monkeypatch.setattr(
        storage.fs,
        "call_s3",
        lambda method, **more: whole(method, **more, **({"MaxKeys": 4} if "list" in method else {})),
    )
    return storage


@pytest.mark.parametrize("in_order", [False, True])
def test_every_name_is_listed_once(store: Storage, in_order: bool) -> None:
    found = list(list_below(store, in_order=in_order))
    assert Counter(found) == Counter(NAMES)
    if in_order:
        assert found == sorted(found)


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("place", ["s3://nowhere-at-all/a", "of another"])
def test_where_nothing_is_nothing_is_listed(store: Storage, in_order: bool, place: str) -> None:
    storage = open_storage(place) if place.startswith("s3") else store.child("nothing")
    assert not list(list_below(storage, in_order=in_order))


def test_who_has_enough_may_stop(store: Storage) -> None:
    assert len(set(itertools.islice(list_below(store), 3))) == 3


def test_a_listing_that_fails_halfway_is_told(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = store.fs.call_s3

    def fail(method: str, **more: object) -> object:
        if str(more.get("Prefix", "")).startswith("table/b/2") and not more.get("Delimiter"):
            raise PermissionError("Access Denied")
        return whole(method, **more)

    monkeypatch.setattr(store.fs, "call_s3", fail)
    with pytest.raises(MaskMillError):
        list(list_below(store))
