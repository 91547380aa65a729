"""What a run took, how fast its network is, and how to have the run again."""

from typing import Any

from woodfisher_jax.report.charts import Bars, bar_chart
from woodfisher_jax.report.page import Html, details, element, joined, paragraph, table
from woodfisher_jax.report.quantities import NONE, duration, percent, storage
from woodfisher_jax.report.record import RunRecord
from woodfisher_jax.training import config as config_
from woodfisher_jax.training.config import Config

Nested = dict[str, Any]

# ------------------------------------------------------------------- time and memory


def costs(record: RunRecord) -> Html:
    """Wall time of the phases, and memory."""
    parts = []
    phases = seconds_of_phases(record)
    if phases:
        chart = bar_chart(
            "Time a phase",
            list(phases),
            [Bars("seconds", list(phases.values()))],
            [duration(value) for value in phases.values()],
            x_label="wall time, s",
        )
        parts.append(element("div", chart, class_="charts"))
    rows = [["process, peak", storage(record.results["peak_rss_bytes"])]]
    plans = {stage["pruner"]: stage for stage in record.results["stages"]}
    for pruner, stage in plans.items():
        if stage.get("store") is not None:
            rows += [
                [
                    f"{pruner}, planned",
                    storage(stage["peak_bytes_planned"]),
                ],
                [f"{pruner}, limit", storage(stage["limit_bytes"])],
                [f"{pruner}, gradients", _gradients(stage)],
            ]
    device = record.results["device"]
    if device:
        rows.append(["devices", f"{device['count']} x {device['kind']}"])
    caption = (
        "Memory. Planned: the peak of a pruning step as it was foreseen; limit: what "
        "it could have had; gradients: what of them was kept, and where."
    )
    parts.append(table(["", "memory"], rows, caption=caption, words=2))
    return joined(parts)


def _gradients(stage: Nested) -> str:
    if not stage["store"]:
        return "none"
    return f"{storage(stage['store_bytes'])} {stage['store_dtype']}, {stage['store']}"


def seconds_of_phases(record: RunRecord) -> dict[str, float]:
    """Wall time by phase, those that took none left out; "" of it all where unknown."""
    rows, stages = record.rows, record.results["stages"]
    total = record.results["seconds_total"]
    if total is None:
        return {}
    events = [row["event"] for row in rows]
    dense = events.index("dense") if "dense" in events else len(rows)

    def trained(part: list[Nested]) -> float:
        return sum(r.get("seconds") or 0.0 for r in part if r["event"] == "train")

    def pruned(name: str) -> float:
        return sum(stage.get(name) or 0.0 for stage in stages)

    parts = [pruned(f"seconds_{n}") for n in ("gradients", "curvature", "update")]
    phases = {
        "training, dense": trained(rows[:dense]),
        "training, pruned": trained(rows[dense:]),
        "gradients": parts[0],
        "curvature, masks": parts[1],
        "update": parts[2],
        "judging pruned": pruned("seconds") - sum(parts),
    }
    phases["start, tests, saves"] = total - sum(phases.values())
    return {name: value for name, value in phases.items() if value > 0.005}


# --------------------------------------------------------------------------- latency


def latency(record: RunRecord) -> Html:
    """Dense against sparse products on the machine they were timed on."""
    found = record.latency
    if not found:
        again = f"python -m woodfisher_jax.report {record.folder} --latency"
        return joined(
            [
                paragraph(
                    "Not measured. This times the products of the pruned arrays, dense "
                    "and sparse, on the machine it runs on, and writes this page anew:"
                ),
                element("pre", element("code", again)),
            ]
        )
    rows, words = [], []
    for one in found["products"]:
        batch = f"{one['batch_size']:,}"
        rows.append(
            [batch, *(significant_ms(one[k]) for k in ("dense", "bcoo", "csr"))]
        )
        words.append(verdict(one))
    machine = f"{found['processor'] or 'unknown processor'}, {found['cores']} cores"
    headers = ["rows at a time", "dense, ms", "BCOO, ms", "CSR, ms"]
    caption = (
        f"Median time of all pruned arrays' products, one after the other, on "
        f"{machine}; {found['products'][0]['device']} for dense and BCOO."
    )
    return joined(
        [
            table(headers, rows, caption=caption, words=0),
            element("ul", *(element("li", sentence) for sentence in words)),
            paragraph(
                "Only matrix products are timed, no whole network: activations, "
                "norms and the moving of patches in convolutions come on top of each. "
                "Dense is x W, compiled by XLA; what it takes does not depend on how "
                "many weights are zero, so a pruned network saved dense is as fast as "
                "before. BCOO is a sparse array of JAX, CSR one of SciPy on the CPU. "
                "At fractions of a millisecond the call itself counts as much as the "
                f"arithmetic. Sparsity then: {percent(found['sparsity'])}.",
                kind="note",
            ),
        ]
    )


def significant_ms(value: float) -> str:
    """Milliseconds, to three digits."""
    return f"{value:.3g}"


def verdict(one: Nested) -> str:
    """Which is faster, in words; nobody should have to compare."""
    parts = []
    for name, label in (("bcoo", "BCOO"), ("csr", "CSR")):
        ratio = one[name] / one["dense"]
        if ratio > 1.05:
            parts.append(f"{label} is slower than dense, by a factor of {ratio:.1f}")
        elif ratio < 0.95:
            parts.append(
                f"{label} is faster than dense, by a factor of {1 / ratio:.1f}"
            )
        else:
            parts.append(f"{label} is as fast as dense, to 5 %")
    rows = one["batch_size"]
    given = "One row" if rows == 1 else f"{rows:,} rows"
    return f"{given} at a time: {'; '.join(parts)}."


# ---------------------------------------------------------------------------- origin


def origin(record: RunRecord) -> Html:
    """The config, the command, a config file that stands alone, and versions."""
    config = record.config
    fields, defaults = flat(config), flat(defaults_of(config))
    rows = [
        [name, _value(value), _value(defaults.get(name, NONE))]
        for name, value in fields.items()
    ]
    changed = [n for n, name in enumerate(fields) if _differs(fields, defaults, name)]
    headers = ["field", "here", "default"]
    parts = [
        table(
            headers,
            [rows[n] for n in changed],
            caption="What differs from the defaults.",
            words=3,
        ),
        details(
            f"All {len(rows)} fields",
            table(
                headers,
                rows,
                caption="All fields; those that differ are marked.",
                words=3,
                marked=changed,
            ),
        ),
        element("h3", "To have this run again"),
    ]
    if record.command:
        parts.append(element("pre", element("code", record.command)))
        parts.append(details("The same from a config file alone", *_alone(config)))
    else:
        parts += _alone(config)
    versions = record.results["versions"]
    if versions:
        parts.append(
            table(
                ["package", "version"],
                [[name, v or "not installed"] for name, v in versions.items()],
                caption="Versions it ran with.",
                words=2,
            )
        )
    return joined(parts)


def _alone(config: Nested) -> list[Html]:
    text = paragraph("All that differs from the defaults, as a file for --config:")
    return [text, element("pre", element("code", config_file(config)))]


def config_file(config: Nested) -> str:
    """A config file that states what differs from the defaults, and nothing else.

    Args:
        config: As nested dicts.

    Returns:
        A Python file for ``--config``.
    """
    values = _literal(_changes(config, defaults_of(config)), "    ")
    return (
        '"""python -m woodfisher_jax.main --config=config.py"""\n\n'
        "from ml_collections import ConfigDict\n\n\n"
        "def get_config() -> ConfigDict:\n"
        f"    return ConfigDict({values})\n"
    )


def _literal(value: Any, indent: str) -> str:
    """Nested dicts as Python has them, a line a value."""
    if not isinstance(value, dict) or not value:
        return repr(value)
    inner = indent + "    "
    lines = [f"{inner}{key!r}: {_literal(v, inner)},\n" for key, v in value.items()]
    return f"{{\n{''.join(lines)}{indent}}}"


def defaults_of(config: Nested) -> Nested:
    """The defaults; of a further pruner they are what the first one has."""
    defaults = config_.to_dict(Config())
    further = {n: config["prune"] for n in config if config_.is_pruner(n)}
    return {**defaults, **further}


def flat(config: Nested, where: str = "") -> dict[str, Any]:
    """Fields by their whole names, such as ``prune.method``."""
    fields: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{where}.{key}" if where else key
        fields |= flat(value, name) if isinstance(value, dict) else {name: value}
    return fields


def _changes(values: Nested, defaults: Nested) -> Nested:
    changed: Nested = {}
    for key, value in values.items():
        if isinstance(value, dict):
            inner = _changes(value, defaults.get(key) or {})
            changed |= {key: inner} if inner else {}
        elif key not in defaults or value != defaults[key]:
            changed[key] = value
    return changed


def _differs(fields: Nested, defaults: Nested, name: str) -> bool:
    return name not in defaults or fields[name] != defaults[name]


def _value(value: Any) -> str:
    return "none" if value is None else str(value)
