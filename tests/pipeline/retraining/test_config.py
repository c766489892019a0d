from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from models.errors import MaskMillError
from pipeline.retraining.config import (
    Model,
    Retraining,
    as_settings,
    check_config,
    example,
    label_recipe,
    load_classes,
    open_evaluation,
    parse_config,
    read_config,
    tracking_uri,
    training_recipe,
    write_example,
)

ROOT = Path(__file__).resolve().parents[3]
SMALL: dict[str, Any] = {
    "name": "pets",
    "output": "out",
    "images": "photos",
    "classes": "cat, dog",
    "models": [{"kind": "maskclip-plus"}],
    "evaluation": {"images": "images", "truth": "masks"},
}


def parsed(folder: Path = Path("/data"), **changes: Any) -> Retraining:
    written = {key: value for key, value in (SMALL | changes).items() if value is not None}
    return parse_config(yaml.safe_dump(written).encode(), "retrain.yaml", folder=folder)


def refused(text: str | bytes | None = None, **changes: Any) -> MaskMillError:
    with pytest.raises(MaskMillError) as caught:
        if text is None:
            parsed(**changes)
        else:
            data = text if isinstance(text, bytes) else text.encode()
            parse_config(data, "retrain.yaml", folder=Path("/data"))
    assert caught.value.exit_status == 2 and caught.value.remedy
    return caught.value


# --- the example --------------------------------------------------------------------------------------------


def fields(kind: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Name and description of every field of a model and of those in it."""
    for name, field in kind.model_fields.items():
        yield field.alias or name, field.description or ""
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from fields(part)


def test_the_example_is_a_configuration_that_explains_every_field() -> None:
    text = example()
    config = parse_config(text.encode(), "retrain.yaml", folder=Path("/data"))
    check_config(config, "retrain.yaml")
    words = " ".join(re.sub(r"^\s*# ", "", line) for line in text.splitlines())
    names = [*fields(Retraining)]
    assert {"name", "hold_out", "set", "min_new", "delta", "hours"} <= {name for name, _ in names}
    for name, description in names:
        assert re.search(rf"^ *(- |# )?{name}:", text, re.MULTILINE), name
        assert " ".join(description.split()) in words, name
    # A comment that stands instead of a field is one that can be written so.
    instead = {key: value for key, value in yaml.safe_load(text).items() if key != "classes"}
    line = next(line for line in text.splitlines() if line.startswith("# ontology:"))
    instead |= yaml.safe_load(line.removeprefix("# "))
    again = parse_config(yaml.safe_dump(instead).encode(), "retrain.yaml", folder=Path("/data"))
    assert again.ontology == "/data/classes.yaml"


def test_the_example_replaces_no_file(tmp_path: Path) -> None:
    file = write_example(tmp_path / "retrain.yaml")
    assert file.read_text() == example()
    file.write_text("mine")
    with pytest.raises(MaskMillError) as caught:
        write_example(file)
    assert caught.value.code == "output_exists" and file.read_text() == "mine"


# --- reading ------------------------------------------------------------------------------------------------


def test_relative_paths_begin_from_the_folder_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = parsed(Path("/etc/pets"), images="../photos/*.jpg", output="s3://bucket/pets/")
    assert config.images == "/etc/photos/*.jpg" and config.output == "s3://bucket/pets/"
    assert config.evaluation.images == "/etc/pets/images"
    assert tracking_uri(config) == "sqlite:////etc/pets/mlruns.db"
    assert tracking_uri(parsed(tracking="sqlite:///deep/runs.db")) == "sqlite:////data/deep/runs.db"
    assert tracking_uri(parsed(tracking="https://mlflow.example.org")) == "https://mlflow.example.org"
    config = parsed(ontology="own.yaml", classes=None, label={"recipe": "mine.yaml"})
    assert config.ontology == "/data/own.yaml" and config.label.recipe == "/data/mine.yaml"
    config = parsed(ontology="voc20", classes=None, label={"recipe": "toy"})
    assert config.ontology == "voc20" and config.label.recipe == "toy"


def test_the_environment_says_where_mlflow_is_unless_the_file_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking_uri(parsed()) == "http://127.0.0.1:5000"
    assert tracking_uri(parsed(tracking="https://other")) == "https://other"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "off")
    with pytest.raises(MaskMillError, match="cannot do without tracking"):
        tracking_uri(parsed())


def test_what_the_fields_name_is_loaded(tmp_path: Path) -> None:
    config = parsed(
        classes=["cat", "salt, pepper"],
        label={"recipe": "toy", "set": {"head": "plain"}},
        models=[
            {"kind": "maskclip-plus", "recipe": "toy", "set": {"iterations": 7}},
            {"kind": "clipseg", "recipe": "toy", "registered": "finder"},
        ],
    )
    assert load_classes(config).names == ("background", "cat", "salt, pepper")
    assert load_classes(config).templates == "toyworld"
    assert label_recipe(config).maskclip.head == "plain"
    assert training_recipe(config.models[0]).loop.iterations == 7
    assert [model.folder for model in config.models] == ["student", "clipseg"]
    assert [config.registered(model) for model in config.models] == ["pets-student", "finder"]
    assert parsed().registered(parsed().models[0]) == "pets"
    (tmp_path / "images").mkdir()
    with pytest.raises(MaskMillError, match="There are no images"):
        open_evaluation(parsed(tmp_path))
    assert open_evaluation(parsed(evaluation={"hold_out": 0.2})) is None
    toys = open_evaluation(parsed(evaluation={"dataset": "toyworld"}))
    assert toys is not None and toys.name == "toyworld"


def test_settings_are_written_so_that_set_reads_them() -> None:
    recipe = Model(kind="maskclip-plus", recipe="toy", set={"student.backbone": "light", "guided": [1, 5]})
    assert as_settings(recipe.settings) == ['student.backbone="light"', "guided=[1, 5]"]
    assert training_recipe(recipe).selftrain.guided == (1, 5)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"name": "a/b"}, "retrain.yaml:8: name: must be letters, digits"),
        ({"imags": "x"}, "there is no such field. Did you mean images?"),
        ({"label": {"by": "champ"}}, "label.by: Input should be 'teacher' or 'champion'"),
        ({"label": {"recipee": "x"}}, "label.recipee: there is no such field. Did you mean recipe?"),
        ({"models": []}, "models: "),
        ({"models": [{"kind": "clipsg"}]}, "models.0.kind: Input should be"),
        ({"models": [{"kind": "clipseg", "st": {}}]}, "models.0.st: there is no such field"),
        ({"models": [{"kind": "clipseg"}, {"kind": "clipseg"}]}, "two models of one name: clipseg"),
        (
            {"models": [{"kind": kind, "registered": "x"} for kind in ("clipseg", "maskclip-plus")]},
            "two models registered as one: x",
        ),
        ({"classes": None}, "give either classes or ontology"),
        ({"ontology": "voc20"}, "give either classes or ontology"),
        ({"evaluation": {}}, "give one of images with truth, dataset, or hold_out, not none"),
        ({"evaluation": {"images": "i"}}, "images and truth belong together"),
        ({"evaluation": {"dataset": "voc20", "hold_out": 0.1}}, "hold_out, not 2"),
        ({"evaluation": {"dataset": "voc2"}}, "there is no dataset voc2. Did you mean voc2"),
        ({"evaluation": {"dataset": "phrasecut"}}, "PhraseCut asks for phrases"),
        ({"evaluation": {"hold_out": 1.0}}, "evaluation.hold_out: Input should be less than 1"),
        ({"evaluation": {"hold_out": 0.1, "root": "x"}}, "root and split belong to dataset"),
        ({"evaluation": {"hold_out": 0.1}, "label": {"by": "champion"}}, "label.by champion needs"),
        ({"gate": {"dleta": 1}}, "gate.dleta = 1: Extra inputs are not permitted. Did you mean delta?"),
        ({"gate": {"delta": 2}}, "gate.delta = 2: Input should be less than or equal to 1"),
        ({"when": {"min_new": 0}}, "when.min_new: Input should be greater than or equal to 1"),
        ({"when": {"budget": {"hours": "x"}}}, "when.budget.hours: Input should be a valid number"),
        ({"webhook_env": "https://hooks.example.org/secret"}, "webhook_env is the name of an environment"),
        ({"workers": -1}, "workers: "),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_field(changes: dict[str, Any], part: str) -> None:
    error = refused(**changes)
    assert error.code == "setting_invalid" and part in error.message
    assert "--init" in error.remedy and "hooks.example.org" not in str(error)


def test_errors_name_the_line() -> None:
    text = yaml.safe_dump(SMALL, sort_keys=False).replace(
        "- kind: maskclip-plus", "- kind: maskclip\n  nme: x"
    )
    error = refused(text)
    assert (
        "retrain.yaml:6: models.0.kind" in error.message and "retrain.yaml:7: models.0.nme" in error.message
    )
    error = refused(yaml.safe_dump(SMALL | {"gate": {"seed": 1, "delta": -1}}, sort_keys=False))
    assert error.message.startswith("retrain.yaml:12: gate.delta = -1")
    assert "retrain.yaml:3: not valid YAML" in refused("name: pets\noutput: [\n").message
    assert "retrain.yaml:1: not UTF-8" in refused(b"name: p\xe9ts\n").message
    assert "holds no fields" in refused("- a\n").message
    assert "aliases are not supported" in refused("a: &x 1\nb: *x\n").message


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"images": "s3://key:pass@bucket/photos"}, "wrong_use"),
        ({"output": "https://me:pa55word@host/x"}, "wrong_use"),
        ({"evaluation": {"images": "s3://a:b/c@bucket/x", "truth": "m"}}, "wrong_use"),
        ({"tracking": "https://me:pa55word@mlflow.example.org"}, "wrong_use"),
        ({"images": "https://host/list.txt?X-Amz-Signature=pa55word&X-Amz-Expires=5"}, "wrong_use"),
    ],
)
def test_addresses_hold_no_secrets(changes: dict[str, Any], code: str) -> None:
    error = refused(**changes)
    assert error.code == code and "pa55word" not in str(error)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"label": {"recipe": "maskclp"}}, "Did you mean maskclip?"),
        ({"label": {"set": {"had": "value"}}}, "Did you mean maskclip.head?"),
        ({"models": [{"kind": "maskclip-plus", "recipe": "tyo"}]}, "Did you mean toy?"),
        ({"models": [{"kind": "maskclip-plus", "set": {"iteratons": 5}}]}, "Did you mean loop.iterations?"),
        ({"models": [{"kind": "maskclip-plus", "recipe": "toy-zero-shot"}]}, "annotation-free"),
        ({"ontology": "voc2", "classes": None}, "Did you mean voc2"),
        (
            {"evaluation": {"images": "i", "truth": "m", "ontology": "cityscapes"}},
            "Did you mean cityscapes19?",
        ),
        ({"tracking": "file:///tmp/x"}, "not a tracking URI"),
        ({"webhook_env": "NO_SUCH_VARIABLE_HERE"}, "NO_SUCH_VARIABLE_HERE"),
    ],
)
def test_wrong_names_are_told_with_the_file(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    file = tmp_path / "retrain.yaml"
    written = {key: value for key, value in (SMALL | changes).items() if value is not None}
    file.write_text(yaml.safe_dump(written))
    with pytest.raises(MaskMillError) as caught:
        read_config(file)
    assert part in str(caught.value) and caught.value.message.startswith(str(file))


def test_a_missing_file_is_told_with_how_to_write_one(tmp_path: Path) -> None:
    with pytest.raises(MaskMillError, match="There is no configuration") as caught:
        read_config(tmp_path / "retrain.yaml")
    assert "maskmill retrain --init" in caught.value.remedy


def test_what_may_not_change_has_names() -> None:
    fixed = parsed().fixed()
    assert fixed["models.student.registered"] == "pets"
    assert parsed(when={"min_new": 9}, gate={"delta": 0.1}).fixed() == fixed
    changed = parsed(name="dogs", label={"by": "champion"}).fixed()
    differing = {name for name in fixed if fixed[name] != changed[name]}
    assert differing == {"name", "label.by", "models.student.registered"}


def test_reading_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "retrain.yaml").write_text(yaml.safe_dump(SMALL))
    code = (
        "import sys; from pipeline.retraining.config import read_config; "
        f"read_config({str(tmp_path / 'retrain.yaml')!r}); "
        "print({'torch', 'ray', 'mlflow', 'open_clip', 'scipy', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
