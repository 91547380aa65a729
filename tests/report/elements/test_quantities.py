"""Numbers as pages show them."""

import pytest

from woodfisher_jax.report.elements import quantities
from woodfisher_jax.report.elements.quantities import MINUS, NONE


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("fixed", 1234.5, "1,234.50"),
        ("fixed", -0.5, f"{MINUS}0.50"),
        ("fixed", None, NONE),
        ("fixed", float("nan"), NONE),
        ("significant", 0.000123456, "0.000123"),
        ("significant", -1.5e-7, f"{MINUS}1.5e{MINUS}7"),
        ("significant", float("nan"), NONE),
        ("percent", 0.95, "95.00 %"),
        ("percent", None, NONE),
        ("scaled", 0, "0"),
        ("scaled", 999, "999"),
        ("scaled", 999.9, "1 k"),
        ("scaled", 4_089_184_256, "4.09 G"),
        ("scaled", 1e20, "1e+05 P"),
        ("scaled", None, NONE),
        ("scaled", float("nan"), NONE),
        ("storage", 512, "512 B"),
        ("storage", 1_230_000_000, "1.23 GB"),
        ("storage", None, NONE),
        ("number", 12_345, "12.3 k"),
        ("number", 97.2222, "97.22"),
        ("power_of_ten", -12, "10⁻¹²"),
        ("power_of_ten", -3.65, "10⁻³·⁶⁵"),
        ("duration", 0.25, "0.2 s"),
        ("duration", 119.9, "119.9 s"),
        ("duration", 120, "2.0 min"),
        ("duration", 7200, "2.0 h"),
        ("duration", None, NONE),
    ],
)
def test_the_text_of_a_number(name: str, value: float | None, text: str) -> None:
    assert getattr(quantities, name)(value) == text


def test_one_is_no_plural() -> None:
    found = [quantities.counted(number, "run") for number in (0, 1, 1200)]
    assert found == ["0 runs", "1 run", "1,200 runs"]
