"""Dense against sparse products, and against a small network, as they were timed."""

from collections.abc import Sequence

from woodfisher_jax.report.elements import markup as html
from woodfisher_jax.report.elements.markup import Html, paragraph
from woodfisher_jax.report.elements.quantities import percent
from woodfisher_jax.report.record import Nested, RunRecord


def section(record: RunRecord) -> Html:
    """Dense against sparse products on the machine that they were timed on.

    Args:
        record: The run.
    """
    found = record.latency
    if not found:
        return html.joined(
            [
                paragraph(
                    "Not measured. This command times the products of the pruned "
                    "arrays, dense and sparse, on the machine that it runs on, and "
                    "adds them to this page:"
                ),
                html.code(f"python -m woodfisher_jax.report {record.folder} --latency"),
            ]
        )
    kinds = ("dense", "bcoo", "csr")
    rows = [
        [f"{one['batch_size']:,}", *(f"{one[kind]:.3g}" for kind in kinds)]
        for one in found["products"]
    ]
    machine = f"{found['processor'] or 'unknown processor'}, {found['cores']} cores"
    headers = ["rows at a time", "dense, ms", "BCOO, ms", "CSR, ms"]
    caption = (
        f"Median time of all pruned arrays' products, one after the other, on "
        f"{machine}; {found['products'][0]['device']} for dense and BCOO."
    )
    return html.joined(
        [
            _forward_table(found.get("forward", []), machine),
            html.table(headers, rows, caption=caption, words=0),
            html.element(
                "ul", *(html.element("li", _verdict(one)) for one in found["products"])
            ),
            paragraph(
                "Of sparse arrays only products are timed, no whole network: "
                "activations, norms and the patches of convolutions come on top. "
                "Dense is x W, compiled by XLA; its time does not depend on how many "
                "weights are zero, so a pruned network saved dense is as fast as "
                "before. BCOO is a sparse array of JAX, CSR one of SciPy on the CPU. "
                "At fractions of a millisecond the call itself counts as much as the "
                f"arithmetic. Sparsity then: {percent(found['sparsity'])}.",
                kind="note",
            ),
        ]
    )


def _forward_table(passes: Sequence[Nested], machine: str) -> Html:
    """Whole forward passes of a network from which structure was taken out."""
    if not passes:
        return html.joined([])
    rows = []
    for one in passes:
        (dense, *_), (small, *_) = one["dense"], one["small"]
        shown = [
            f"{middle:.3g} ({lower:.3g} to {upper:.3g})"
            for middle, lower, upper in (one["dense"], one["small"])
        ]
        where = f"{one['runtime']}, {one['device']}"
        rows.append([f"{one['batch_size']:,}", where, *shown, f"{dense / small:.2f}"])
    caption = (
        "Whole forward pass of the network as its model has it and as it is in this "
        f"run, with fewer outputs a layer: medians and quartiles on {machine}."
    )
    headers = ["images at a time", "run by", "dense, ms", "small, ms", "times faster"]
    return html.table(headers, rows, caption=caption, words=0)


def _verdict(one: Nested) -> str:
    """Which of dense and sparse is faster, and by how much."""
    parts = []
    for name, label in (("bcoo", "BCOO"), ("csr", "CSR")):
        ratio = one[name] / one["dense"]
        if 0.95 <= ratio <= 1.05:
            parts.append(f"{label} is as fast as dense, to 5 %")
        else:
            how = "slower" if ratio > 1 else "faster"
            factor = max(ratio, 1 / ratio)
            parts.append(f"{label} is {how} than dense, by a factor of {factor:.1f}")
    rows = one["batch_size"]
    given = "One row" if rows == 1 else f"{rows:,} rows"
    return f"{given} at a time: {'; '.join(parts)}."
