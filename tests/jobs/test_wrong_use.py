"""Wrong use is reported at once: no heavy imports, no Ray, nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipeline.ontology.reading import load_ontology
from tests.pipeline.formats.tables import toy_table
from tests.pipeline.retraining.outputs import new_output

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "ray", "mlflow", "open_clip", "matplotlib", "transformers", "uvicorn", "scipy")

CASES = {
    # label
    "label --images photos --classes cat --output out --recipe maskclp": "Did you mean maskclip?",
    "label --images photos --classes cat --output out --set had=value": "Did you mean maskclip.head?",
    "label --images photos --classes cat --output out --set head=vale": "setting_invalid",
    "label --images nowhere --classes cat --output out": "nowhere",
    "label --images photos --ontology voc2 --output out": "Did you mean voc2",
    "label --images photos --ontology voc20 --classes cat --output out": "--classes or --ontology, not both",
    "label --classes cat --output out": "--images or --manifest",
    "label --images photos --classes cat --output out --model nowhere": "nowhere",
    "label --images photos --classes cat --output out --model x --recipe toy": "Give one of them.",
    "label --images photos --classes cat --output out --max-failure-rate 5": "--max-failure-rate",
    "label --images photos --classes cat --output out --set pretrained=./no.pt": "weights_missing",
    "label --images photos --classes cat --output out": "weights_missing",
    "label --images photos --classes 'cat;dog' --output out": "does ; separate two names",
    "label --images latin.txt --classes cat --output out": "latin.txt:2: not UTF-8",
    "label --images photos --classes cat --output photos/cat.jpg": "photos/cat.jpg is a file",
    "label --images photos --classes cat --output photos/cat.jpg/out": "photos/cat.jpg, which is a file",
    "label --images photos --ontology photos --output out": "no ontology file",
    "label --images photos --ontology odd.yaml --output out": "odd.yaml:2: classes.0.synonyms",
    "label --images photos --classes cat --output out --recipe latin.yaml": "latin.yaml:1: not UTF-8",
    "label --images photos --classes cat --output out --recipe deep.yaml": "deep.yaml",
    "label --images photos --classes cat --output out --recipe folder.yaml": "Is a directory",
    "label --images photos --classes cat --output http://example.org/x": "not written to",
    "label --images photos --classes cat --output out --changed --overwrite": "Leave one of them out.",
    "label --images photos --classes cat --output out --retry-failed --overwrite": "Leave one of them out.",
    "label --images photos --classes cat --output out --recipe toy --set memory=none": "input_missing",
    # memory
    "memory": "does not know what to do",
    "memory bild table --output out": "Did you mean memory build?",
    "memory build nowhere --output out": "nowhere",
    "memory build table --output out --workers -1": "--workers -1",
    "memory build table --output photos/cat.jpg": "photos/cat.jpg is a file",
    "memory show nowhere": "input_missing",
    # review
    "review nowhere": "nowhere",
    "review photos --worst 0 --random 0": "No image is asked for.",
    "review photos --worst -1": "numbers of images",
    "review photos --honeypot-share 1": "--honeypot-share 1.0 is not a share",
    "review photos --output queue": "does not end in .json",
    "review photos --agreement": "input_missing",
    "serve --review nowhere": "input_missing",
    "serve --review photos --model toy": "Serve them one by one.",
    # verify
    "verify nowhere": "nowhere",
    "verify photos": "input_missing",
    "verify photos --images photos --manifest m.parquet": "not both",
    "verify photos --workers -1": "--workers -1",
    # stats
    "stats nowhere": "nowhere",
    "stats table --against photos": "input_missing",
    "stats table --estimate photos": "has its truth in",
    "stats table --page photos": "photos is a folder",
    "stats table --page s3://bucket/page.html": "it is a local file",
    "stats table --threshold 5": "no number from 0 to 1",
    "stats table --merge kat,dog=pet": "kat",
    # split
    "split nowhere": "nowhere",
    "split photos": "input_missing",
    "split table --train 0.9": "do not sum to 1",
    "split table --by patient": "--by patient needs the file",
    "export table --format png --output out --val-share -1": "--val-share -1",
    "train maskclip-plus --labels table --output out --part test": "input_missing",
    "train clipseg --output out --dataset voc20 --part test": "--labels TABLE",
    "evaluate --dataset toyworld --recipe toy --part test --output out": "for --labels",
    # train
    "train maskclip-plus --labels nowhere --output out": "nowhere",
    "train maskclip-plus --labels nowhere --output out --recipe maskclip-plus": "Did you mean",
    "train maskclip-plus --labels nowhere --output out --set iteratons=5": "Did you mean loop.iterations?",
    "train maskclip-plus --labels nowhere --output out --ontology voc2": "voc2",
    "train maskclip-plus --labels nowhere --output out --workers -1": "--workers -1",
    "train maskclip-plus --labels nowhere --output out --known-complete": "--known-view and --known-complete",
    "train maskclip-plus --labels table --output out --second nowhere": "nowhere",
    "train maskclip-plus --labels table --output o --second table --set teacher=online": "--second confirms",
    "train clipseg --output out": "Give truth, or labels, or both.",
    "train clipseg --output out --dataset voc20 --threshold 0.5": "--labels TABLE",
    "train clipseg --output out --dataset voc20 --corrections off": "--labels TABLE",
    "train clipseg --output out --labels nowhere": "nowhere",
    "train clipseg --output out --labels nowhere --recipe tyo": "Did you mean toy?",
    "train clipseg --output out --labels nowhere --set iteratons=5": "Did you mean loop.iterations?",
    "train clipseg --output out --dataset phrasecut": "--split train",
    "train clipseg --output out --dataset phrasecut --split train --root nowhere": "nowhere",
    "train clipseg --output out --dataset voc20 --images photos": "Give truth",
    # evaluate
    "evaluate --dataset voc20 --root nowhere --recipe tyo --output out": "Did you mean toy?",
    "evaluate --dataset voc20 --root nowhere --recipe toy --output out": "nowhere",
    "evaluate --dataset voc2 --recipe toy --output out": "Did you mean voc2",
    "evaluate --dataset toyworld --recipe toy --zero-shot voc2 --output out": "Did you mean voc2",
    "evaluate --dataset toyworld --recipe toy --set had=plain --output out": "Did you mean maskclip.head?",
    "evaluate --dataset toyworld --labels nowhere --output out": "nowhere",
    "evaluate --dataset toyworld --output out": "--labels or --recipe",
    "evaluate --dataset toyworld --recipe toy --common --output out": "for --labels",
    "evaluate --dataset toyworld --recipe toy --threshold 0.5 --output out": "for --labels",
    "evaluate --dataset toyworld --labels nowhere --common --others ignore": "Did you mean ignored?",
    "evaluate --dataset toyworld --labels nowhere --others ignored": "--common leaves out",
    "evaluate --dataset toyworld --recipe toy --zero-shot voc20 --output out": "zero-shot split voc20",
    "evaluate --dataset toyworld --recipe toy --set pretrained=./no.pt --output out": "weights_missing",
    "evaluate --dataset coco-json --root coco --recipe toy --ontology odd.yaml --output out": "a word",
    "evaluate --dataset coco-json --root coco --recipe toy --ontology toyworld --output out": "annotation 5",
    "evaluate --dataset pairs --root own --recipe toy --ontology toyworld --output out": "2 x 3",
    "evaluate --images own/images --truth photos --recipe toy --ontology toyworld --output out": "no mask",
    "evaluate --dataset pairs --root own --split photos --recipe toy --ontology toyworld": "is a folder",
    "evaluate --dataset pairs --root own --split latin.txt --recipe toy --ontology toyworld": "latin.txt:2",
    "evaluate --dataset toyworld --recipe toy --output photos/cat.jpg": "photos/cat.jpg is a file",
    "evaluate --dataset toyworld --recipe toy --output photos/cat.jpg/out": "which is a file",
    "train clipseg --dataset coco-json --root coco --split val2017 --ontology toyworld --output x": "ation 5",
    "train clipseg --dataset toyworld --split seed-3 --output photos/cat.jpg/out": "which is a file",
    # benchmark
    "benchmark toyworld --output photos/cat.jpg/out": "which is a file",
    "benchmark toyword": "toyword",
    "benchmark toyworld --row nonsense --output out": "nonsense",
    "benchmark toyworld --row heads --row studnets --output out": "Did you mean students?",
    "benchmark toyworld --seeds 1 --output out": "--seeds 1",
    "benchmark toyworld --set head=plain --output out": "rows are fixed",
    "benchmark maskclip --dataset voc2 --output out": "voc2",
    "benchmark maskclip --root voc20 --output out": "NAME=VALUE",
    "benchmark maskclip-robustness --row X --output out": "--row X",
    "benchmark maskclip --row MaskClip --output out": "Did you mean MaskCLIP",
    "benchmark clipseg-referring --row nonsense --output out": "--row nonsense",
    "benchmark prompt-strategies --row nonsense --output out": "--row nonsense",
    "benchmark maskclip-robustnes --output out": "Did you mean maskclip-robustness?",
    "benchmark maskclip --set head=plain --output out": "--set",
    "benchmark clipseg-referring --weights CLIPSeg=x.pth --output out": "--weights",
    "benchmark prompt-strategies --dataset voc2 --output out": "voc2",
    "benchmark concepts --images nowhere --output out": "nowhere",
    "benchmark concepts --images photos --recipe tyo --output out": "Did you mean toy?",
    # the others
    "segment photos --output out": "Nothing is asked for.",
    "segment nowhere --prompt cat --output out": "nowhere",
    "segment photos --prompt cat --output out --weights no.pth": "weights_missing",
    "segment photos --prompt cat --output out --threshold 2": "--threshold",
    "segment photos --prompt cat --output photos/cat.jpg/out": "which is a file",
    "serve --model nowhere": "There is no model nowhere",
    "serve --model maskclp": "Did you mean maskclip?",
    "serve --model toy --per-minute -1": "--per-minute",
    "export nowhere --format onnx --output out.onnx": "nowhere",
    "export nowhere --format torch --output out.onnx": ".pt2",
    "export nowhere --format png --output out": "nowhere",
    "export table --format pgn --output out": "Did you mean png?",
    "export table --format onnx --output out.onnx": "is a label table",
    "export table --format png --output photos": "no export of maskmill",
    "export table --format png --output photos/cat.jpg": "photos/cat.jpg is a file",
    "export table --format png --output out --val-share 2": "--val-share 2",
    "export table --format png --output out --set min_area=2": "no option min_area",
    "export table --format png --output out --drop nonsense": "There is no class nonsense",
    "export table --format png --output out --manifest nowhere.parquet": "nowhere",
    "import --format coco --input nowhere --output out": "nowhere",
    "import --format cocoo --input photos --output out": "Did you mean coco?",
    "import --format coco --output out": "--format needs --input",
    "import --input photos --output out": "Add --format",
    "import --format coco --input photos --dataset voc20 --output out": "--format reads --input",
    "import --output out": "--dataset or --images",
    "import --images photos --truth own/masks --output out": "Add --ontology",
    "import --format coco --input photos --output table": "photos",
    "import photos --output out": "Did you mean --input photos?",
    "import --format coco --input photos --output out --retry-failed --overwrite": "Leave one of them out.",
    "import --images photos --truth own/masks --ontology toyworld --root x --output out": "--root belongs",
    "evaluate --recipe toy --dataset toyworld --known table": "--known and views of a table are for --labels",
    "import --dataset toyworld --output out --retry-failed": "no image has failed",
    "report nowhere": "nowhere",
    "show nowhere": "nowhere",
    "submit": "--status ID and --stop ID",
    "submit lable --images photos": "Did you mean label?",
    "submit label --images photos --classes cat --output out": "does not see the images photos",
    "submit label --images s3://b/x --classes cat --output s3://b/y": "Which cluster?",
    "submit serve": "it never ends",
    "status nowhere": "There is no job and no label table",
    "status table --watch 0": "--watch 0",
    "status table --tracking nowhere://x --watch -1": "--watch -1",
    "runs --limit 0": "--limit 0",
    "runs --compare one": "--compare RUN RUN",
    "promote nowhere --version 2 --force --why so": "is not the output of maskmill retrain",
    "promote nowhere --version 2": "for the gate of maskmill retrain to decide",
    "promote nowhere --version 2 --force": "Add --why TEXT.",
    "promote nowhere --version 2 --force --why ' '": "Add --why TEXT.",
    "promote nowhere --version best --force --why so": "--version best",
    "promote nowhere.yaml --version 2 --force --why so": "There is no nowhere.yaml",
    "promote nowhere": "--version",
    "promote retraining --model pet --version 2 --force --why so": "Did you mean pets?",
    "rollback nowhere": "is not the output of maskmill retrain",
    "rollback latin.yaml": "latin.yaml:1: not UTF-8",
    "rollback odd.yaml": "names no output of a retraining",
    "rollback retraining": "--model pets or --model cars",
    "recipes tyo": "Did you mean toy?",
    "demo --steps 0": "iterations",
    "demo --images 0": "--images 0",
    # retrain
    "retrain": "maskmill retrain --init retrain.yaml",
    "retrain nowhere.yaml": "There is no configuration nowhere.yaml",
    "retrain odd.yaml": "odd.yaml: name: is missing",
    "retrain latin.yaml": "latin.yaml:1: not UTF-8",
    "retrain folder.yaml": "is a folder, not a file",
    "retrain --init odd.yaml": "odd.yaml is there already",
    "retrain retrain-1.yaml": "retrain-1.yaml:1: labl: there is no such field. Did you mean label?",
    "retrain retrain-2.yaml": "retrain-2.yaml: There is no recipe 'maskclp'",
    "retrain retrain-3.yaml": "There are no images in",
    "retrain odd.yaml --abandon --step label": "--abandon and --step exclude each other",
    "retrain retrain-4.yaml": "there is no",
    "retrain retrain-5.yaml": "photos/cat.jpg is a file",
    # what the parser refuses
    "label --images photos": "--output",
    "label --outptu out": "--output",
    "train": "maskclip-plus",
    "train --labels nowhere --output out": "maskmill train maskclip-plus",
    "label photos --classes cat --output out": "Did you mean --images photos?",
    "serve toy": "Did you mean --model toy?",
    "label --images photos --classes cat --output out --model clipsg": "Did you mean clipseg?",
    "label --images photos --classes cat --output out --model maskclip": "Give --recipe maskclip.",
    "label --images photos --classes cat --output out --recipe maskclip.yaml": "There is no recipe file",
    "label --images photos --classes cat --output out --set head": "Write --set head=VALUE.",
    "evaluate --images photos --recipe toy": "--images needs --truth.",
    "evaluate --images photos --truth photos --recipe toy": "Add --ontology",
    "evaluate --images photos --truth photos --recipe toy --ontology voc20": "There are no mask PNGs",
    "evaluate --dataset voc20 --root nowhere --recipe toy --protocol sed --output out": "Did you mean seed?",
    "runs --tracking off": "Tracking is off",
    "datasets voc2": "Did you mean voc2",
    "nonsense": "There is no command nonsense.",
    "lable --images photos": "Did you mean label?",
    "train maskclip --labels nowhere": "Did you mean train maskclip-plus?",
    "label --images photos --output out --class cat": "--classes STR",
    "label --images photos --output out --classes cat --no-backgroud": "--no-background",
}

PROGRAM = f"""
import contextlib, io, json, pathlib, shlex, sys
import models.hub
from jobs.cli import main
models.hub.reachable = lambda host: False  # as without a network

def traces():
    files = {{str(path) for path in pathlib.Path().rglob("*")}}
    return files | {{f"import {{name}}" for name in {HEAVY} if name in sys.modules}}

answers, before = {{}}, traces()
for line in sys.stdin:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main(shlex.split(line))
        except SystemExit as end:
            status = end.code
    after = traces()
    answers[line.strip()] = status, said.getvalue(), sorted(after - before)
    before = after
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, list[str]]]:
    """Exit status, output, and new files and imports, by command line."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "photos").mkdir()
    (folder / "photos" / "cat.jpg").touch()
    toy_table(folder / "table", 2, size=16)
    (folder / "latin.txt").write_bytes("photos/cat.jpg\nphotos/garçon.jpg\n".encode("latin-1"))
    (folder / "latin.yaml").write_bytes("name: garçon".encode("latin-1"))
    (folder / "deep.yaml").write_text("name: " + "[" * 100_000)
    (folder / "folder.yaml").mkdir()
    (folder / "odd.yaml").write_text("classes:\n  - {name: cat, synonyms: kitty}\n")
    for number, line in enumerate(
        (
            "labl: {recipe: toy}",
            "label: {recipe: maskclp}",
            "evaluation: {images: nothing, truth: nothing}",
            "images: nothing",
            "output: photos/cat.jpg",
        ),
        1,
    ):
        usual = {
            "name": "name: pets",
            "output": "output: out",
            "images": "images: photos",
            "classes": "classes: cat",
            "models": "models: [{kind: clipseg}]",
            "evaluation": "evaluation: {hold_out: 0.5}",
        }
        lines = [line, *(text for key, text in usual.items() if not line.startswith(f"{key}:"))]
        (folder / f"retrain-{number}.yaml").write_text("\n".join(lines))
    for place in ("own/images", "own/masks", "coco/annotations", "coco/val2017"):
        (folder / place).mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(folder / "own/images/a.png")
    Image.new("L", (3, 2)).save(folder / "own/masks/a.png")
    Image.new("RGB", (4, 4)).save(folder / "coco/val2017/a.png")
    new_output(folder / "retraining", "pets", "cars", "sqlite:///nowhere.db")
    names = load_ontology("toyworld").names
    (folder / "coco/annotations/instances_val2017.json").write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "a.png", "height": 4, "width": 4}],
                "categories": [{"id": number, "name": name} for number, name in enumerate(names)],
                "annotations": [
                    {
                        "id": 5,
                        "image_id": 1,
                        "category_id": 2,
                        "segmentation": {"size": [4, 4], "counts": [3]},
                    }
                ],
            }
        )
    )
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=folder,
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "MLFLOW_TRACKING_URI": "",
            "COLUMNS": "200",
            "HF_HUB_CACHE": str(folder / "no-cache"),
        },
        input="\n".join(CASES),
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, tuple[int, str, list[str]]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(("line", "words"), CASES.items())
def test_it_is_told_at_once(line: str, words: str, answers: dict[str, tuple[int, str, list[str]]]) -> None:
    status, said, traces = answers[line]
    assert status == 2 and words in said and "Traceback" not in said
    assert not traces
