from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from jobs.export import Export
from models.errors import MaskMillError
from pipeline.labelling.prepare import prepare_labeller, student_recipe
from pipeline.toyworld.scenes import generate
from pipeline.trained.export import SMALLEST
from pipeline.trained.student import read_student_record
from tests.pipeline.trained.test_student import toy_student


@pytest.mark.slow
def test_a_torch_program_labels_like_the_labeller(tmp_path: Path) -> None:
    model = toy_student(tmp_path / "run")
    said = io.StringIO()
    file = tmp_path / "made" / "student.pt2"
    status = Export(source=str(tmp_path / "run"), format="torch", output=str(file)).run(Console(file=said))
    assert status == 0
    assert str(file) in said.getvalue() and "uint8 (batch, 3, height, width)" in said.getvalue()
    assert [path.name for path in file.parent.iterdir()] == [file.name]

    extra = {"maskmill": ""}
    program = torch.export.load(file, extra_files=extra).module()
    record = read_student_record(tmp_path / "run")
    assert json.loads(extra["maskmill"])["classes"] == list(record.ontology.names)
    for shape in ((1, 3, SMALLEST, SMALLEST), (2, 3, 97, 33)):
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        with torch.inference_mode():
            wanted = model(images)
        assert (program(images) - wanted).abs().max() < 1e-5 * wanted.abs().max()

    image = generate(3, 1, 96).images[0]
    logits = program(torch.from_numpy(image).permute(2, 0, 1)[None])[0]
    labeller = prepare_labeller(*student_recipe(record.uri), precision="fp32").build()
    (prediction,) = labeller.label([image], [(96, 96)])
    assert (logits.argmax(0).numpy() == prediction.labels).mean() > 0.999
    assert np.abs(255 * logits.softmax(0).amax(0).numpy() - prediction.confidence).max() < 1
    assert len(np.unique(prediction.labels)) > 2


def test_an_existing_file_stays_and_the_suffix_must_fit(tmp_path: Path) -> None:
    kept = tmp_path / "student.onnx"
    kept.write_text("mine")
    for output, code in ((kept, "output_exists"), (tmp_path / "student.bin", "wrong_use")):
        with pytest.raises(MaskMillError) as caught:
            Export(source=str(tmp_path), format="onnx", output=str(output)).run()
        assert caught.value.code == code
    with pytest.raises(MaskMillError) as caught:
        Export(source=str(tmp_path), format="torch", output=str(tmp_path / "student.pt2")).run()
    assert caught.value.code == "name_unknown"
    assert kept.read_text() == "mine" and not (tmp_path / "student.pt2").exists()
