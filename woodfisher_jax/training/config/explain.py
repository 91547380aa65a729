"""Documentation of the fields: ``--helpfull``, and the tables of the pages."""

import re
from collections.abc import Mapping
from typing import Any

from woodfisher_jax.methods import METHODS
from woodfisher_jax.options import Field, fields_of
from woodfisher_jax.rows.compute import Compute
from woodfisher_jax.selection.goal import Goal
from woodfisher_jax.training.config.sections import (
    Config,
    DataConfig,
    DistributedConfig,
    PruneConfig,
    TrainConfig,
)
from woodfisher_jax.training.config.values import (
    is_pruner,
    section_fields,
    subsections,
    to_dict,
)


def explained(config: Config) -> str:
    """Every field of a config with its value and its documentation."""
    return "\n".join(_explained(Config, to_dict(config), "config"))


def _explained(section: type, values: Mapping[str, Any], where: str) -> list[str]:
    fields, inner = section_fields(section, values), subsections(section)
    lines = [f"\n{where}"]
    for key, value in values.items():
        if not isinstance(value, dict):
            doc = fields[key].doc if key in fields else "A setting of the above."
            shown = tuple(value) if isinstance(value, list) else value
            lines.append(f"  --{where}.{key}={shown}\n      {doc}")
    for key, value in values.items():
        if isinstance(value, dict):
            kind = PruneConfig if is_pruner(key) else inner[key]
            lines += _explained(kind, value, f"{where}.{key}")
    return lines


# ----------------------------------------------------------------------------- tables

SECTIONS: dict[str, type] = {
    "config": Config,
    "data": DataConfig,
    "train": TrainConfig,
    "prune": PruneConfig,
    "distributed": DistributedConfig,
    "goal": Goal,
    "compute": Compute,
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
    fields = {n: field for kind in kinds for n, field in fields_of(kind).items()}
    rows = [
        [
            *_row(field),
            ", ".join(f"`{k.__name__}`" for k in kinds if name in fields_of(k)),
        ]
        for name, field in fields.items()
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
