"""Write the tables of docs/reference/settings.md from the laboratory's settings: ``python tools/settings_page.py``."""

from dataclasses import fields
from pathlib import Path

from marks import between

from steppe.lab.presets import FAIR, PRESETS
from steppe.lab.settings import Settings

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "settings.md"
DIFFER = ("train_size", "noise", "model", "epochs", "batch_size", "lr", "weight_decay")


def settings() -> str:
    """Return a row for every setting that the command line has."""
    head = "| option | default | meaning |\n|---|---|---|\n"
    shown = [one for one in fields(Settings) if one.metadata.get("option")]
    return head + "".join(
        f"| `--{one.name.replace('_', '-')}` | {'' if one.default is None else f'`{one.default}`'} "
        f"| {one.metadata['option'].rstrip('.')} |\n"
        for one in shown
    )


def presets() -> str:
    """Return a row for every data source: what ``run`` takes, and what ``compare`` takes where that differs."""
    head = f"| data | {' | '.join(name.replace('_', ' ') for name in DIFFER)} |\n{'|---' * (len(DIFFER) + 1)}|\n"
    rows = []
    for name in PRESETS:
        found, fair = PRESETS[name].settings, FAIR[name].settings
        rows.append((f"`{name}`", found))
        if found != fair:
            rows.append((f"`{name}`, in `steppe compare`", fair))
    return head + "".join(
        f"| {name} | {' | '.join(str(getattr(one, key)) for key in DIFFER)} |\n" for name, one in rows
    )


def with_tables(text: str) -> str:
    """Return the page's text with both tables made anew."""
    return between(between(text, "settings", settings()), "presets", presets())


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
