"""Options of a pruning step in the config: those of every method, its goal, its limits.

They are read from the dataclasses of the methods in METHODS, of Goal and of Compute
when they are needed, so that a method which a config file adds to METHODS is known.
"""

from collections.abc import Mapping
from typing import Any

from woodfisher_jax.methods import METHODS
from woodfisher_jax.options import Field, check_known, checked, fields_of
from woodfisher_jax.rows.compute import Compute
from woodfisher_jax.selection.goal import Goal

OF_RUNS = ("num_samples", "sparsity")
"""Options that the section has fields of its own for."""


def step_fields(method: str) -> dict[str, Field]:
    """The options of a pruning step that a config may set, by name.

    Args:
        method: Whose field and default are taken where several methods have an option.
    """
    row = METHODS.get(method)
    kinds = [type(one) for one in (row, *METHODS.values()) if one is not None]
    found: dict[str, Field] = {}
    for section in (*kinds, Goal, Compute):
        for name, field in fields_of(section).items():
            if field.plain and field.range.in_config and name not in OF_RUNS:
                found.setdefault(name, field)
    own = fields_of(type(row)).keys() & found.keys() if row else ()
    return found | {
        name: found[name]._replace(default=getattr(row, name)) for name in own
    }


def changed(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that differ from their defaults, checked one by one.

    Args:
        method: A name of METHODS.
        options: By name.

    Raises:
        OptionError: If there is no such option, or a value is out of range.
    """
    fields = step_fields(method)
    found = {}
    for name, given in options.items():
        check_known(name, fields, "prune")
        value = checked(fields[name], given)
        if value != fields[name].default:
            found[name] = value
    return found
