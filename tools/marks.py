"""Text between two marks of a page, which a tool writes."""


def between(text: str, name: str, made: str) -> str:
    """Return the text with ``made`` between ``<!-- name: begin -->`` and ``<!-- name: end -->``."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    before, rest = text.split(begin)
    return before + begin + made + end + rest.split(end)[1]
