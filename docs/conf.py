"""The documentation: `sphinx-build -W -E docs build/docs`, then open build/docs/index.html. Nothing is downloaded."""

import os
import sys
from pathlib import Path

# Pictures and data are computed on the CPU, whatever the machine has.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
sys.path.insert(0, str(Path(__file__).parent))

import attnlab

project = "attnlab"
release = attnlab.__version__
copyright = "the attnlab authors"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.viewcode", "myst_parser", "attnlab_docs"]
exclude_patterns = ["api/examples", "attnlab_docs"]

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4
suppress_warnings = ["misc.highlighting_failure"]

# Every cross reference is checked; types in signatures are other libraries' or Python's.
nitpicky = True
nitpick_ignore_regex = [("py:class", ".*"), ("py:exc", ".*")]
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # methods stand where they are described
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_display_short_literal_types = True
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"attnlab {release}"
html_static_path = ["_static"]
html_css_files = ["attnlab.css"]
html_math_renderer = "mathml"
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5a8a", "color-brand-content": "#0b5a8a"},
    "dark_css_variables": {"color-brand-primary": "#7cc4f0", "color-brand-content": "#7cc4f0"},
}
pygments_style = "default"
pygments_dark_style = "monokai"
