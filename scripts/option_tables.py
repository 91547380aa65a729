"""Writes the tables of options in docs/ again, from the dataclasses.

python scripts/option_tables.py
"""

from pathlib import Path

from woodfisher_jax.training.config.explain import rewritten

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    """Rewrites every page that has such a table."""
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (new := rewritten(text)) != text:
            page.write_text(new, encoding="utf-8")
            print(page)


if __name__ == "__main__":
    main()
