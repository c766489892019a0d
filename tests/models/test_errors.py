from __future__ import annotations

import pytest

from models.errors import did_you_mean


@pytest.mark.parametrize(
    ("word", "known", "hint"),
    [
        ("vox20", ["voc20", "ade150"], "Did you mean voc20? "),
        ("VOC20", ["voc20", "ade150"], "Did you mean voc20? "),
        ("maskclip_plus", ["maskclip-plus-voc20", "MaskCLIP-plus"], "Did you mean MaskCLIP-plus? "),
        ("zebra", ["voc20"], ""),
        ("", ["voc20"], ""),
        ("x", [], ""),
    ],
)
def test_a_misspelt_name_gets_a_suggestion(word: str, known: list[str], hint: str) -> None:
    assert did_you_mean(word, known) == hint


def test_several_suggestions() -> None:
    assert did_you_mean("toy", ["toya", "toyb", "else"], most=2) in (
        "Did you mean toyb or toya? ",
        "Did you mean toya or toyb? ",
    )
