from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import MaskMillError
from pipeline.files.storage import Storage, open_storage
from pipeline.retraining.ledger import Entry, Ledger, replay
from pipeline.table.lease import Lease
from tests.pipeline.retraining.outputs import never


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(tmp_path if request.param == "local" else request.getfixturevalue("bucket"))


def test_what_is_added_is_read_again_and_stays(output: Storage) -> None:
    with Lease.acquire(output, on_lost=never) as lease:
        ledger = Ledger(output)
        assert ledger.entries() == () and ledger.current("pets") is None
        verdict = {"verdict": "promote", "reasons": [{"check": "gain", "figures": {"low": 0.01}}]}
        first = ledger.append(lease, "promoted", "pets", "1", run="0001", verdict=verdict)
        before = output.read_bytes("ledger/000001.json")
        second = ledger.append(lease, "forced", "pets", "2", previous="1", why="ä % {}", user="me")
        other = ledger.append(lease, "promoted", "cars", "7")
    assert [entry.sequence for entry in (first, second, other)] == [1, 2, 3]
    assert first.fencing_token == lease.run_id
    assert output.read_bytes("ledger/000001.json") == before
    read = Ledger(output)
    assert read.entries() == ledger.entries() == (first, second, other)
    assert (read.current("pets"), read.champion_before("pets"), read.current("cars")) == ("2", "1", "7")
    assert read.of("cars") == (other,)


def test_a_reason_is_stored_without_secrets(tmp_path: Path) -> None:
    output = open_storage(tmp_path)
    with Lease.acquire(output, on_lost=never) as lease:
        Ledger(output).append(lease, "forced", "pets", "1", why="see https://me:pa55word@host/x")
    assert b"pa55word" not in output.read_bytes("ledger/000001.json")


def test_of_writers_that_do_not_know_of_each_other_one_gets_the_number(output: Storage) -> None:
    with Lease.acquire(output, on_lost=never) as lease:
        barrier = threading.Barrier(4)
        came: list[Entry | MaskMillError] = []

        class Slow(Ledger):
            def entries(self) -> tuple[Entry, ...]:
                found = super().entries()
                barrier.wait(timeout=60)  # all have seen the same last entry
                return found

        def write(version: str) -> None:
            try:
                came.append(Slow(output).append(lease, "promoted", "pets", version))
            except MaskMillError as error:
                came.append(error)

        threads = [threading.Thread(target=write, args=(version,)) for version in "1234"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    (won,) = [one for one in came if isinstance(one, Entry)]
    assert [one.code for one in came if isinstance(one, MaskMillError)] == ["output_in_use"] * 3
    assert Ledger(output).entries() == (won,)


def test_only_the_holder_of_the_lease_adds(tmp_path: Path) -> None:
    output = open_storage(tmp_path)
    with Lease.acquire(output, on_lost=never) as old:
        pass
    with Lease.acquire(output, on_lost=never), pytest.raises(MaskMillError) as caught:
        Ledger(output).append(old, "promoted", "pets", "1")
    assert caught.value.code == "output_in_use" and Ledger(output).entries() == ()


# -- damage


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """The folder of a ledger of four entries."""
    output = open_storage(tmp_path)
    with Lease.acquire(output, on_lost=never) as lease:
        for version in "1234":
            Ledger(output).append(lease, "promoted", "pets", version)
    return tmp_path / "ledger"


def damage_of(folder: Path) -> MaskMillError:
    with pytest.raises(MaskMillError) as caught:
        Ledger(open_storage(folder.parent)).current("pets")
    return caught.value


def test_a_missing_entry_is_told(written: Path) -> None:
    (written / "000001.json").unlink()
    (written / "000003.json").unlink()
    error = damage_of(written)
    assert error.code == "file_damaged" and error.exit_status == 1
    assert "000001.json is missing, and 1 more" in error.message


def test_entries_that_vanish_while_a_run_knows_them_are_told(written: Path) -> None:
    ledger = Ledger(open_storage(written.parent))
    ledger.entries()
    (written / "000004.json").unlink()
    with pytest.raises(MaskMillError, match=r"000004\.json is missing"):
        ledger.entries()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(b"", "not valid JSON", id="empty"),
        pytest.param(b'{"sequence": 2', "not valid JSON", id="torn"),
        pytest.param(b"[]", "holds a list", id="a list"),
        pytest.param(b"\xff\xfe", "not valid JSON", id="no text"),
        pytest.param(b"{}", "sequence", id="nothing in it"),
    ],
)
def test_a_damaged_entry_is_told(written: Path, content: bytes, says: str) -> None:
    (written / "000002.json").write_bytes(content)
    error = damage_of(written)
    assert error.code == "file_damaged" and "000002.json" in error.message and says in error.message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sequence": 3}, "holds entry 3"),
        ({"kind": "celebrated"}, "kind"),
        ({"more": 1}, "more"),
        ({"name": ""}, "name"),
    ],
)
def test_a_changed_entry_is_told(written: Path, change: dict[str, object], says: str) -> None:
    path = written / "000002.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    error = damage_of(written)
    assert error.code == "file_damaged" and says in error.message


def test_an_entry_of_a_newer_version_is_refused(written: Path) -> None:
    path = written / "000004.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 2}))
    assert damage_of(written).code == "newer_version"


def test_files_that_are_no_entries_are_told_but_for_those_of_a_kill(written: Path) -> None:
    (written / ".000005.json.0123456789abcdef.tmp").write_bytes(b'{"seq')
    assert Ledger(open_storage(written.parent)).current("pets") == "4"
    (written / "0000005.json").write_bytes((written / "000004.json").read_bytes())
    assert "0000005.json is no entry" in damage_of(written).message


# -- replay, against a model of its own


@dataclass(frozen=True)
class Node:
    """A champion, and the one that a rollback from it leads to."""

    version: str
    below: Node | None


moves = st.lists(
    st.tuples(
        st.sampled_from(
            ["promoted", "forced", "back", "far", "by hand", "unfinished", "refused", "failed", "other"]
        ),
        st.sampled_from("123456"),
    ),
    max_size=25,
)


@given(moves)
def test_a_replay_leads_where_a_linked_list_of_champions_does(steps: list[tuple[str, str]]) -> None:
    entries: list[Entry] = []

    def write(kind: str, version: str | None, previous: str | None, name: str = "pets") -> None:
        entries.append(
            Entry.model_validate(
                {
                    "sequence": len(entries) + 1,
                    "kind": kind,
                    "time": "",
                    "name": name,
                    "version": version,
                    "previous": previous,
                    "fencing_token": "t",
                }
            )
        )

    alias: str | None = None  # of the registry
    champion: Node | None = None
    for kind, version in steps:
        if kind == "by hand":
            alias = version
        elif kind in ("promoted", "forced"):
            write("promoting" if kind == "promoted" else "forcing", version, alias)
            write(kind, version, alias)
            for each in (alias, version):
                if each is not None and (champion is None or champion.version != each):
                    champion = Node(each, champion)
            alias = version
        elif kind == "back":
            if champion is not None and champion.below is not None and alias == champion.version:
                write("rolling_back", champion.below.version, champion.version)
                write("rolled_back", champion.below.version, champion.version)
                champion = champion.below
                alias = champion.version
        elif kind == "far":
            below = champion.below if champion is not None else None
            while below is not None and below.version != version:
                below = below.below
            if champion is not None and below is not None and champion.version != version == below.version:
                write("rolled_back", version, champion.version)
                champion, alias = below, version
        elif kind == "unfinished":
            write("promoting", version, alias)
        elif kind == "other":
            write("promoted", version, None, name="cars")
        else:
            write(kind, version, alias)
    standing = replay(entries, "pets")
    chain = []
    node = champion
    while node is not None:
        chain.append(node.version)
        node = node.below
    assert list(standing.champions) == chain[::-1]
    assert standing.champion == (champion.version if champion else None)
    below = champion.below if champion else None
    assert standing.before == (below.version if below else None)
    own = [entry for entry in entries if entry.name == "pets"]
    last = own[-1] if own else None
    assert standing.unfinished == (last if last is not None and last.kind == "promoting" else None)
