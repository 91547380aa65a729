"""Writes a page on one run, or on several compared.

python -m woodfisher_jax.report runs/digits
python -m woodfisher_jax.report runs/sweep --out=sweep.html
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from woodfisher_jax.exit_codes import FAILED, USAGE, exits
from woodfisher_jax.progress import live
from woodfisher_jax.report import language
from woodfisher_jax.report.comparison import compare, comparison_csv, comparison_page
from woodfisher_jax.report.environment import processor
from woodfisher_jax.report.page import write_page
from woodfisher_jax.report.record import find_runs, is_run, read_record, write_latency

# The command alone knows training: the defaults, and the network of a run to time.
from woodfisher_jax.training.config import Config, to_dict
from woodfisher_jax.training.forward_passes import forward_passes
from woodfisher_jax.training.resuming.saved_run import read_run
from woodfisher_jax.trees.masks import sparsity
from woodfisher_jax.weights.files import check_output
from woodfisher_jax.weights.latency import BATCH_SIZES, latency
from woodfisher_jax.written_files import WriteError, replace_file


def report(
    folders: Sequence[Path],
    out: Path | None = None,
    time_products: bool = False,
    overwrite: bool = False,
) -> list[Path]:
    """Writes the page of a run, or the page and the table of several.

    Args:
        folders: Of runs, or folders that hold some, at any depth.
        out: The page; default ``report.html`` in the folder of the run. For several
            runs ``comparison.html`` in the one folder given, or in the working
            directory; their table lies beside it, as ``.csv``.
        time_products: Whether to time the run's pruned arrays first, dense and sparse.
        overwrite: Whether ``out`` and its table may replace existing files.

    Returns:
        The files.

    Raises:
        ValueError: If there is no run, a file of one is damaged, or the runs do not
            compare.
        OSError: If ``out`` exists or its folder does not, or a file cannot be written.
        MissingExtraError: If matplotlib is not installed.
    """
    if out is not None:
        check_output(out, suffix=".html", overwrite=overwrite)
    found = [run for folder in folders for run in find_runs(folder)]
    if len(folders) == 1 and (is_run(folders[0]) or len(found) == 1):
        run = folders[0] if is_run(folders[0]) else found[0]
        if language.is_language(run):
            return [language.write_page(run, out)]
        if time_products:
            measure(run)
        return [write_page(run, to_dict(Config()), out)]
    if time_products:
        raise ValueError(
            f"--latency with {len(found)} runs; give one: it takes the machine for "
            "itself, and its result goes to that run's page"
        )
    if out is not None:
        check_output(out.with_suffix(".csv"), suffix=".csv", overwrite=overwrite)
    unique = {run.resolve(): run for run in found}
    page = out or (folders[0] if len(folders) == 1 else Path()) / "comparison.html"
    comparison = compare(
        [read_record(run, to_dict(Config())) for run in unique.values()]
    )
    replace_file(page, comparison_page(comparison))
    replace_file(page.with_suffix(".csv"), comparison_csv(comparison))
    return [page, page.with_suffix(".csv")]


def measure(run: Path) -> None:
    """Times the products of a run's pruned arrays, and writes the times beside them.

    Of a network from which structure was taken out, forward passes are timed too.

    Raises:
        ValueError: If nothing was saved, or nothing of two dimensions is prunable.
    """
    saved = read_run(run)
    params, masks = saved.variables["params"], saved.masks
    times = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "sparsity": sparsity(masks),
        "products": [latency(params, masks, n)._asdict() for n in BATCH_SIZES],
        "forward": [one._asdict() for one in forward_passes(saved)],
    }
    write_latency(run, times)


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    found = argparse.ArgumentParser(
        prog="python -m woodfisher_jax.report",
        description="Writes a page on a run, or on several compared: one HTML file "
        "that needs no other file and no network.",
        epilog="examples:\n"
        "  one run, finished or not:   %(prog)s runs/digits\n"
        "  with its latency:           %(prog)s runs/digits --latency\n"
        "  all runs below a folder:    %(prog)s runs/sweep\n"
        "  some runs:                  %(prog)s runs/a runs/b --out=ab.html\n\n"
        "A run's own page is written when it ends; this command writes it again. "
        "Several runs\nare grouped: those that differ in their seed alone are one "
        "point with an error bar.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        type=Path,
        help="folder of a run (its --workdir), or a folder with runs at any depth",
    )
    found.add_argument(
        "--out",
        type=Path,
        metavar="FILE.html",
        help="the page (default: report.html in the folder of the run; for several "
        "runs comparison.html in the one folder given, or here, and comparison.csv)",
    )
    found.add_argument(
        "--latency",
        action="store_true",
        help="time the products of the run's pruned arrays, dense and sparse, on this "
        "machine, and forward passes of a small network; best while nothing else runs",
    )
    found.add_argument(
        "--overwrite", action="store_true", help="replace the files of --out"
    )
    return found


def cli(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m woodfisher_jax.report``."""
    given = parser().parse_args(arguments)
    codes = {
        ValueError: USAGE,
        FileExistsError: USAGE,
        FileNotFoundError: USAGE,
        OSError: FAILED,
    }
    with exits(codes), live("report"):
        try:
            paths = report(given.runs, given.out, given.latency, given.overwrite)
        except WriteError as error:
            if given.out is not None or given.latency:
                raise
            elsewhere = "--out=FILE.html writes the page elsewhere"
            raise WriteError(f"{error}; {elsewhere}") from error
    print("\n".join(map(str, paths)))


if __name__ == "__main__":
    cli()
