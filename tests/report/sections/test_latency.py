"""What was timed, on the page of a run."""

from pathlib import Path

from read_pages import Page, seen, text_of
from written_runs import record_of, write_run

LATENCY = {
    "processor": "a processor",
    "cores": 2,
    "sparsity": 0.9,
    "products": [
        {"batch_size": 1, "device": "cpu", "dense": 2.0, "bcoo": 6.0, "csr": 0.5},
        {"batch_size": 64, "device": "cpu", "dense": 2.0, "bcoo": 2.02, "csr": 4.0},
    ],
}


def test_latency_measured_or_how_to_measure_it(tmp_path: Path) -> None:
    record = record_of(write_run(tmp_path))
    assert f"woodfisher_jax.report {tmp_path} --latency" in seen(tmp_path).text
    found = Page(text_of(record._replace(latency=LATENCY)))
    assert found.row("1") == ["1", "2", "6", "0.5"]
    assert "a processor, 2 cores" in found.text
    assert "Sparsity then: 90.00 %" in found.text
    assert (
        "One row at a time: BCOO is slower than dense, by a factor of 3.0; CSR is "
        "faster than dense, by a factor of 4.0."
    ) in found.text
    assert (
        "64 rows at a time: BCOO is as fast as dense, to 5 %; CSR is slower than "
        "dense, by a factor of 2.0."
    ) in found.text


def test_forward_passes_of_a_small_network(tmp_path: Path) -> None:
    record = record_of(write_run(tmp_path))
    passes = [
        {
            "batch_size": 64,
            "runtime": "jit",
            "device": "cpu",
            "dense": [6.0, 5.5, 7.0],
            "small": [4.0, 3.0, 4.25],
        }
    ]
    page = Page(text_of(record._replace(latency={**LATENCY, "forward": passes})))
    expected = ["64", "jit, cpu", "6 (5.5 to 7)", "4 (3 to 4.25)", "1.50"]
    assert any(expected in table for table in page.tables)
    assert "medians and quartiles on a processor, 2 cores" in page.text
