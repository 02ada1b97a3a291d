"""Hooks of the site: it holds the changelog, and notebooks as pages with what they print and draw when they are run."""

import base64
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import nbclient
import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT, DRAWN = Path(__file__).parents[1], "image/png"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the changelog, and a page for every notebook; the notebooks themselves stay, to be downloaded."""
    changes = re.sub(r"\]\(docs/", "](", (ROOT / "CHANGELOG.md").read_text())
    files.append(File.generated(config, "changelog.md", content=changes))
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        for made in page_of(PurePosixPath(file.src_uri), ran(file.content_string), config):
            files.append(made)
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Link to the pages of the notebooks and of the changelog, where a file links to the files they are made of."""
    return re.sub(r"(\]\([^)\s]+)\.ipynb\)", r"\1.md)", markdown).replace("](../CHANGELOG.md)", "](changelog.md)")


@cache  # `mkdocs serve` builds the site again and again
def ran(source: str) -> nbformat.NotebookNode:
    """Return a notebook with the outputs of its cells. An error in a cell fails the build."""
    notebook = nbformat.reads(source, as_version=4)
    with TemporaryDirectory() as folder:
        nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
    return notebook


def page_of(name: PurePosixPath, notebook: nbformat.NotebookNode, config: MkDocsConfig) -> Iterator[File]:
    """Yield the pictures of a notebook, and its page."""
    parts: list[str] = []
    for i, cell in enumerate(notebook.cells):
        parts.append(f"```python\n{cell.source}\n```" if cell.cell_type == "code" else cell.source)
        outputs = cell.get("outputs", [])
        if text := "".join(output.text for output in outputs if output.get("name") == "stdout"):
            parts.append(f"```text\n{text.rstrip()}\n```")
        for drawn in (output.data[DRAWN] for output in outputs if DRAWN in output.get("data", {})):
            picture = name.with_name(f"{name.stem}-{i}.png")
            yield File.generated(config, str(picture), content=base64.b64decode(drawn))
            parts.append(f"![What the cell above draws]({picture.name})")
    parts.append(f'[Download this notebook]({name.name} "a Jupyter notebook")')  # a link with a title is left alone
    yield File.generated(config, str(name.with_suffix(".md")), content="\n\n".join(parts))
