"""Where a run comes from: its config, the command, versions."""

import pprint
import textwrap
from typing import Any

from woodfisher_jax.report.elements import markup as html
from woodfisher_jax.report.elements.markup import Html, details, paragraph
from woodfisher_jax.report.elements.quantities import NONE
from woodfisher_jax.report.record import Nested, RunRecord, flat


def section(record: RunRecord) -> Html:
    """The config, the command, a config file that stands alone, and versions.

    Args:
        record: The run.
    """
    changes = flat(_changes(record.config, record.defaults))
    fields, defaults = flat(record.config), flat(record.defaults)
    rows = [
        [name, _text(value), _text(defaults.get(name, NONE))]
        for name, value in fields.items()
    ]
    changed = [n for n, name in enumerate(fields) if name in changes]
    headers = ["field", "here", "default"]
    short = html.table(
        headers,
        [rows[number] for number in changed],
        caption="What differs from the defaults.",
        words=3,
    )
    caption = "All fields; those that differ are marked."
    whole = html.table(headers, rows, caption=caption, words=3, marked=changed)
    alone = [
        paragraph("All that differs from the defaults, as a file for --config:"),
        html.code(config_file(record)),
    ]
    if record.command:
        folded = details("The same from a config file alone", *alone)
        alone = [html.code(record.command), folded]
    parts = [
        short,
        details(f"All {len(rows)} fields", whole),
        html.element("h3", "To repeat this run"),
        *alone,
    ]
    versions = record.results["versions"]
    if versions:
        cells = [[name, v or "not installed"] for name, v in versions.items()]
        caption = "Versions that it ran with."
        parts.append(
            html.table(["package", "version"], cells, caption=caption, words=2)
        )
    return html.joined(parts)


def _text(value: Any) -> str:
    return "none" if value is None else str(value)


def config_file(record: RunRecord) -> str:
    """A Python file for ``--config`` that states what differs from the defaults.

    Args:
        record: The run.
    """
    changes = _changes(record.config, record.defaults)
    literal = pprint.pformat(changes, sort_dicts=False)
    return (
        '"""python -m woodfisher_jax.main --config=config.py"""\n\n'
        "from ml_collections import ConfigDict\n\n\n"
        "def get_config() -> ConfigDict:\n"
        f"    return ConfigDict(\n{textwrap.indent(literal, ' ' * 8)}\n    )\n"
    )


def _changes(values: Nested, defaults: Nested) -> Nested:
    """What of nested dicts differs from the defaults."""
    changed: Nested = {}
    for key, value in values.items():
        if isinstance(value, dict):
            inner = _changes(value, defaults.get(key) or {})
            changed |= {key: inner} if inner else {}
        elif key not in defaults or value != defaults[key]:
            changed[key] = value
    return changed
