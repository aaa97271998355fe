"""The configuration of the site. `scripts/docs` builds it, without a network."""

import pathlib
import sys
import tomllib

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

import sam_optax  # noqa: E402

project = "sam_optax"
author = "The sam_optax authors"
copyright = "The sam_optax authors, Apache License 2.0"
version = release = sam_optax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx-mathjax-offline",
    "generated_pages",
    "docstrings",
    "elsewhere",
]

exclude_patterns = ["_build", "_ext", "_generated"]
myst_enable_extensions = ["colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 3

# Single backticks in a docstring link to the name that stands between them, if it has
# a place on the site or in one of the inventories, and are plain code otherwise.
default_role = "py:obj"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_attr_annotations = False

html_theme = "furo"
html_title = f"sam_optax {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = html_logo = "_static/logo.svg"
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#0b5fa5",
        "color-brand-content": "#0b5fa5",
    },
    "dark_css_variables": {
        "color-brand-primary": "#6cb6ff",
        "color-brand-content": "#6cb6ff",
    },
}
project_table = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
html_baseurl = project_table["urls"]["Documentation"]
html_theme_options["source_repository"] = project_table["urls"]["Source"]
html_theme_options["source_branch"] = "main"
html_theme_options["source_directory"] = "docs/"
