"""Build hook: the README of the package, whose links to files work away from the repository too.

A package index shows the README alone, so a link to ``docs/faq.md`` leads nowhere there. Where ``[project.urls]`` of
pyproject.toml has ``Files``, the address under which the repository's files can be read, links begin with it. As long
as the repository has no address, the package's README has the texts of such links, and no pictures.
"""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)")


class Readme(MetadataHookInterface):
    """Set the package's description."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Read README.md and write the field ``readme``."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        shown = standing_alone(text, metadata.get("urls", {}).get("Files"))
        metadata["readme"] = {"content-type": "text/markdown", "text": shown}


def standing_alone(text: str, address: str | None) -> str:
    """Return a page whose links to files begin with an address, or are their texts where there is none."""
    if address:
        return LINK.sub(lambda link: f"{link[1]}[{link[2]}]({address.rstrip('/')}/{link[3]})", text)
    return LINK.sub(lambda link: "" if link[1] else link[2], text)
