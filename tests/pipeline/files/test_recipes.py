from __future__ import annotations

from pathlib import Path

import pytest

from models.errors import MaskMillError
from models.settings import Settings
from pipeline.files.recipes import Recipe, RecipeBook


class Loop(Settings):
    steps: int = 10
    rate: float = 0.1
    size: int = 4


class Crop(Settings):
    size: tuple[int, int] = (8, 8)
    flip: bool = True


class Nested(Recipe):
    loop: Loop = Loop()
    crop: Crop = Crop()
    note: str = ""


BOOK = RecipeBook(Nested, (Nested(name="base"), Nested(name="fast", loop=Loop(steps=2))), default="base")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["loop.steps=3"], Nested(name="base", loop=Loop(steps=3))),
        (["steps=3"], Nested(name="base", loop=Loop(steps=3))),  # no other group has it
        (["crop.size=[4, 6]", "flip=false"], Nested(name="base", crop=Crop(size=(4, 6), flip=False))),
        (["steps=3", "loop.rate=1"], Nested(name="base", loop=Loop(steps=3, rate=1.0))),
        (["note=a = b"], Nested(name="base", note="a = b")),
    ],
)
def test_settings_reach_groups(settings: list[str], expected: Nested) -> None:
    assert BOOK.load("base", settings) == expected


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["size=3"], "loop.size or crop.size"),
        (["loop.stepz=3"], "Did you mean loop.steps"),
        (["stepz=3"], "Did you mean loop.steps"),
        (["loop=3"], "no field 'loop'"),
        (["loop.steps=many"], "steps = many"),
        (["steps"], "key=value"),
    ],
)
def test_mistakes_in_groups_are_named(settings: list[str], says: str) -> None:
    with pytest.raises(MaskMillError) as caught:
        BOOK.load("base", settings)
    assert caught.value.code == "setting_invalid" and says in str(caught.value)


def test_a_file_may_nest_or_not(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: fast\nloop: {rate: 0.5}\nflip: false\n")
    expected = Nested(name="mine", loop=Loop(steps=2, rate=0.5), crop=Crop(flip=False))
    assert BOOK.load(str(path)) == expected


def test_changes_keep_the_rest_of_a_group() -> None:
    changed = BOOK.change(BOOK.recipes["fast"], {"loop": {"rate": 3.0}})
    assert changed.loop == Loop(steps=2, rate=3.0)
    assert BOOK.from_dict(changed.to_dict()) == changed
    assert changed.hash != BOOK.recipes["fast"].hash


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"note: x\nloop: 2: 3", ":2: not valid YAML"),
        (b"note: x\nloop: caf\xe9", ":2: not UTF-8 text"),
        (b"note: " + b"[" * 100_000, "nested too deeply"),
        (b"a: &a [x]\nb: *a", ":2: YAML aliases are not supported"),
        (b"note: 2020-13-45", "cannot be read: month must be in 1..12"),
        (b"- note", "holds no fields"),
        (b"", "holds no fields"),
        (b"base: [fast]", "is not a recipe"),
        (b"base: nothing", "is not a recipe"),
        (b"1: 2", "no field '1'"),
        (b"note: x\n\x00", "not valid YAML"),
    ],
)
def test_files_that_are_no_recipes(data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(data)
    with pytest.raises(MaskMillError) as caught:
        BOOK.load(str(tmp_path / "mine.yaml"))
    assert caught.value.code == "setting_invalid" and says in str(caught.value)
    assert "mine.yaml" in str(caught.value)


def test_paths_that_are_no_recipes(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    for name, says in (
        ("folder.yaml", "directory"),
        ("absent.yaml", "no recipe file"),
        ("x" * 300 + ".yaml", "no recipe file"),
    ):
        with pytest.raises(MaskMillError, match=says) as caught:
            BOOK.load(str(tmp_path / name))
        assert caught.value.code == "setting_invalid"


@pytest.mark.parametrize("value", ["2020-13-45", "[" * 100_000, "a: b: c", "*x"])
def test_values_that_are_no_yaml_are_words(value: str) -> None:
    assert BOOK.load("base", [f"note={value}"]).note == value
