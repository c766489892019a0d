"""Two ontologies as one."""

from __future__ import annotations

from pipeline.ontology.ontology import BACKGROUND, Ontology


def unite(first: Ontology, second: Ontology) -> Ontology:
    """The classes of one ontology, and behind them those of another that it does not have.

    A class is the same if it has the name, or if the name of one is a synonym of the other, in any case. What
    they have in common looks as it does in ``first``. A background of either stays the background.

    Args:
        first: keeps its name, templates and ids, unless only ``second`` has a background.
        second: the other.

    Raises:
        MaskMillError: ``ontology_invalid`` if a word has two meanings in them.
    """
    taken = {word.casefold() for entry in first.classes for word in (entry.name, *entry.synonyms)}
    names = {entry.name.casefold() for entry in first.classes}
    more = []
    for entry in second.classes:
        words = {entry.name.casefold(), *(word.casefold() for word in entry.synonyms)}
        if entry.name.casefold() in taken or words & names:
            continue
        fields = entry.model_dump(mode="json")
        fields["synonyms"] = [word for word in entry.synonyms if word.casefold() not in taken]
        taken |= words
        more.append(fields)
    fields = first.to_dict()
    fields["classes"] += more
    # "background" itself may always be one of its words.
    words_of = first.background if first.background is not None else second.background
    if words_of is not None:
        fields["background"] = [w for w in words_of if w.casefold() not in taken] or [BACKGROUND]
    fields["ignore_index"] = None if more else first.ignore_index
    return Ontology.from_dict(fields, origin="the classes of both tables")
