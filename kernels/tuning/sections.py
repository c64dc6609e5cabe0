"""All sections of the tuning, in the order in which they are worth the time.

What it is: `SECTIONS`, and `chosen`, which reads words such as `linear`, `attention.split` and `all`.
What it does not know: what a section does.
"""

from __future__ import annotations

from collections.abc import Sequence

from penstock.kernels.tuning import attending, narrow, rowwise, wide
from penstock.kernels.tuning.section import Section

SECTIONS: dict[str, Section] = {
    section.name: section for section in (*wide.SECTIONS, *attending.SECTIONS, *rowwise.SECTIONS, *narrow.SECTIONS)
}
ALL = "all"


def chosen(words: Sequence[str], *, narrow_too: bool) -> list[Section]:
    """Sections of these names or below them (`w8a8`: `w8a8.few` too); without words all that a model in 16 bits uses, or all. Raises KeyError(word)."""
    if not words:
        return [section for section in SECTIONS.values() if narrow_too or not section.narrow]
    names: set[str] = set()
    for word in words:
        found = [name for name in SECTIONS if word == ALL or name == word or name.startswith(word + ".")]
        if not found:
            raise KeyError(word)
        names.update(found)
    return [section for name, section in SECTIONS.items() if name in names]
