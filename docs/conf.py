"""Settings of the site: ``python -m sphinx -W docs build/docs``.

Sphinx with MyST and Furo, because Material for MkDocs has been in maintenance mode
since November 2025. Nothing is fetched from a network when a page is read: formulas are
MathML, which browsers render themselves. Notebooks are shown as ``docs/notebooks`` has
them, with their outputs.
"""

import sys
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

project = "woodfisher_jax"
author = "the woodfisher_jax authors"
html_title = "woodfisher_jax"
html_theme = "furo"
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["site.css"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False


def formula(display: str):
    """A visitor that writes a formula as MathML, as "inline" or as "block"."""

    def visit(translator, node: nodes.Node) -> None:
        translator.body.append(convert(node.astext(), display=display))
        raise nodes.SkipNode

    return visit, None


def without_a_text(app, what, name, field, skip, options) -> bool | None:
    """Leaves out fields of named tuples, which the docstring of the class explains."""
    return True if "Alias for field number" in (field.__doc__ or "") else None


def setup(app: Sphinx) -> None:
    """Registers the renderer of formulas and the fields that are left out."""
    app.add_html_math_renderer("mathml", formula("inline"), formula("block"))
    app.connect("autodoc-skip-member", without_a_text)


html_math_renderer = "mathml"
