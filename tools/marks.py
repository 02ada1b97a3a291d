"""Text between two marks of a page, and the tables that tools write there."""

from collections.abc import Iterable, Sequence


def between(text: str, name: str, made: str) -> str:
    """Return the text with ``made`` between ``<!-- name: begin -->`` and ``<!-- name: end -->``."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    before, rest = text.split(begin)
    return before + begin + made + end + rest.split(end)[1]


def markdown(lines: Iterable[Sequence[str]]) -> str:
    """Return a table; the second line holds the alignment of the columns."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
