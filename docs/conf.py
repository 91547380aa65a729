"""Settings of the site: ``python -m sphinx -W docs build/docs``.

Sphinx with MyST and Furo, because Material for MkDocs has been in maintenance mode
since November 2025. Notebooks are rendered without being run;
``-D nb_execution_mode=force`` runs them first, for their figures.
"""

import sys
from pathlib import Path

import jupytext

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

project = "woodfisher_jax"
author = "the woodfisher_jax authors"
html_title = "woodfisher_jax"
html_theme = "furo"
html_show_copyright = False

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_execution_timeout = 300
nb_execution_raise_on_error = True

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# The notebooks are text files outside of docs/; Sphinx needs them as .ipynb inside.
NOTEBOOKS = HERE / "notebooks"
NOTEBOOKS.mkdir(exist_ok=True)
for path in sorted((HERE.parent / "notebooks").glob("*.py")):
    jupytext.write(jupytext.read(path), NOTEBOOKS / f"{path.stem}.ipynb")
