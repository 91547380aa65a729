"""Writes the tables of options in docs/ again, from the dataclasses.

python scripts/option_tables.py
"""

import re
from pathlib import Path

from woodfisher_jax.layerwise.settings import Layerwise
from woodfisher_jax.methods import METHODS
from woodfisher_jax.options import Field, fields_of
from woodfisher_jax.rows.compute import Compute
from woodfisher_jax.selection.goal import Goal
from woodfisher_jax.training.config import (
    Config,
    DataConfig,
    DistributedConfig,
    PruneConfig,
    TrainConfig,
)
from woodfisher_jax.training.config.language import TextConfig

DOCS = Path(__file__).parents[1] / "docs"

SECTIONS: dict[str, type] = {
    "config": Config,
    "data": DataConfig,
    "train": TrainConfig,
    "prune": PruneConfig,
    "distributed": DistributedConfig,
    "goal": Goal,
    "compute": Compute,
    "layerwise": Layerwise,
    "text": TextConfig,
}
"""Dataclasses by the name of their table."""

METHODS_TABLE = "methods"
"""Name of the table of the options of all methods."""

BEGIN = r"<!-- options: (\w+) -->\n"
END = "<!-- end of options -->"


def rewritten(page: str) -> str:
    """A page of the documentation with its tables as the dataclasses have them.

    Args:
        page: Markdown; tables are between ``<!-- options: NAME -->``, with a name of
            SECTIONS or METHODS_TABLE, and ``<!-- end of options -->``.
    """
    return re.sub(
        f"{BEGIN}.*?{END}",
        lambda found: (
            f"<!-- options: {found[1]} -->\n\n{option_table(found[1])}\n{END}"
        ),
        page,
        flags=re.DOTALL,
    )


def option_table(name: str) -> str:
    """The options of a dataclass, or of all methods, as a Markdown table.

    Args:
        name: Of SECTIONS, or METHODS_TABLE.
    """
    if name != METHODS_TABLE:
        rows = [_row(field) for field in fields_of(SECTIONS[name]).values()]
        return _table(["option", "values", "default", "meaning"], rows)
    kinds = list(dict.fromkeys(type(row) for row in METHODS.values()))
    owners: dict[str, dict[Field, list[str]]] = {}
    for kind in kinds:
        for name, field in fields_of(kind).items():
            # A method may have an option in a form of its own.
            own = owners.setdefault(name, {})
            own.setdefault(field, []).append(f"`{kind.__name__}`")
    rows = [
        [*_row(field), ", ".join(names)]
        for own in owners.values()
        for field, names in own.items()
    ]
    return _table(["option", "values", "default", "meaning", "of"], rows)


def _row(field: Field) -> list[str]:
    return [
        f"`{field.name}`",
        field.expected if field.expected != "None" else "in Python only",
        f"`{field.default!r}`",
        field.doc,
    ]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def main() -> None:
    """Rewrites every page that has such a table."""
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (new := rewritten(text)) != text:
            page.write_text(new, encoding="utf-8")
            print(page)


if __name__ == "__main__":
    main()
