from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.formats.registry import FORMATS, find_reader, make_format

DOCS = Path(__file__).resolve().parents[3] / "docs/formats.md"


@pytest.mark.parametrize("name", FORMATS)
def test_entries_name_what_is_there(name):
    form = make_format(name, {})
    assert form.name == name and form.max_classes >= 254
    assert not FORMATS[name].reader or callable(find_reader(name))
    assert "{" not in FORMATS[name].next_step.format(output="out")


def test_the_page_lists_every_format():
    assert sorted(re.findall(r"^\| `([a-z][a-z-]*)` \|", DOCS.read_text(), re.M)) == sorted(FORMATS)
