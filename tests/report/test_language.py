import json
from pathlib import Path
from typing import Any

import pytest

from woodfisher_jax.report import language
from woodfisher_jax.report.__main__ import report

KERNELS = ("self_attn/q_proj", "mlp/up_proj")
RESULTS: dict[str, Any] = {
    "task": "language",
    "sparsity": 0.5,
    "nonzero": 1200,
    "prunable": 2400,
    "perplexity": {
        "dense": {"all": 38.851, "by_kind": {"novel": 40.0, "<manual>": 30.0}},
        "pruned": {"all": 93.0, "by_kind": {"novel": 110.25, "<manual>": 70.0}},
    },
    "layers": [
        {
            "path": f"model/layers_{block}/{kernel}/kernel",
            "index": 0,
            "sparsity": 0.5,
            "error": 0.01 * (block + 1),
        }
        for block in (0, 1, 10)
        for kernel in KERNELS
    ],
    "seconds": {"read": 1.0, "prune: weights": 90.25},
    "seconds_total": 95.0,
    "peak_rss_bytes": 2_500_000_000,
    "calibration_tokens": 2048,
    "evaluation_tokens": 4096,
    "config": {"task": "language", "prune": {"sparsity": 0.5}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(RESULTS["config"]))
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    return tmp_path


def test_what_is_printed(capsys: pytest.CaptureFixture) -> None:
    language.print_results(RESULTS)
    printed = capsys.readouterr().out.splitlines()
    cells = [line.split() for line in printed]
    assert ["all", "text", "38.85", "93.00"] in cells
    assert ["novel", "40.00", "110.25"] in cells
    assert ["prune:", "weights", "90.2"] in cells
    assert printed[-1] == (
        "1,200 of 2,400 prunable weights left (50.00 % sparse); peak memory 2.5 GB"
    )


def test_heat_maps_have_a_row_a_matrix_and_a_column_a_block() -> None:
    error = language.maps(RESULTS)["error"]
    axes = error.figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [*KERNELS]
    (mesh,) = axes.collections
    values = mesh.get_array()
    assert values.shape == (2, 11)
    assert values[1, 10] == 0.11
    assert values.mask[:, 2:10].all()
    assert "mlp/up_proj: 0.01 to 0.11" in error.words


def test_the_page_is_written_again_by_the_command(folder: Path) -> None:
    page = language.write_page(folder).read_text()
    assert page.count("<svg") == 2
    assert "&lt;manual&gt;" in page
    assert (folder / "error.png").stat().st_size > 0
    out = folder / "again.html"
    assert report([folder], out) == [out]
    assert out.read_text() == page


def test_it_compares_with_no_other_run(folder: Path) -> None:
    (folder / "b").mkdir()
    (folder / "b" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="run of a language model, which has a page"):
        report([folder / "b", folder])
