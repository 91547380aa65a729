"""The page of one run: what was pruned, its accuracy, its layers, how to repeat it."""

from collections.abc import Mapping
from pathlib import Path

from woodfisher_jax.report.elements import markup as html
from woodfisher_jax.report.elements.figures import Picture
from woodfisher_jax.report.record import Nested, RunRecord, read_record
from woodfisher_jax.report.sections import (
    costs,
    course,
    latency,
    layers,
    losses,
    origin,
    outcome,
    saliencies,
)


def write_page(folder: Path, defaults: Nested, out: Path | None = None) -> Path:
    """Writes the page of a run from what is in its folder.

    Args:
        folder: Of the run, finished or not.
        defaults: The default config, as nested dicts.
        out: The file; default ``report.html`` in the folder, with the plots as PNG
            beside it.

    Returns:
        The file.

    Raises:
        ValueError: If there is no run, or a file of it is damaged.
        MissingExtraError: If matplotlib is not installed.
    """
    record = read_record(folder, defaults)
    drawn = pictures(record)
    return html.write_page(folder, run_page(record, drawn), drawn, out)


def pictures(record: RunRecord) -> dict[str, Picture]:
    """The figures that are written as PNG too, by the name of their file.

    ``accuracy``, or ``comparison`` with the runs that it is compared with;
    ``sparsity`` of the layers; ``loss_path_N`` of pruning step N.

    Args:
        record: The run.
    """
    return course.pictures(record) | layers.pictures(record) | losses.pictures(record)


def run_page(record: RunRecord, drawn: Mapping[str, Picture]) -> str:
    """The page of a run.

    Args:
        record: The run.
        drawn: Its :func:`pictures`.
    """
    sections = [
        ("Dense and final", outcome.section(record)),
        ("Along the run", course.section(record, drawn)),
        ("Layers", layers.section(record, drawn)),
        ("Saliencies", saliencies.section(record)),
        ("Predicted and measured loss", losses.section(record, drawn)),
        ("Time and memory", costs.section(record)),
        ("Latency", latency.section(record)),
        ("Config and origin", origin.section(record)),
    ]
    title = f"{record.method} on {record.config['data']['name']}"
    return html.page(
        f"{title}: {record.folder.absolute().name}", outcome.head(record), sections
    )
