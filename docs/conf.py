"""How the documentation is built, of the installed package: sphinx-build docs docs/_build/html"""

import os
import pathlib
import sys

os.environ["TQDM_DISABLE"] = "1"     # examples draw no progress into their pages
DOCS = pathlib.Path(__file__).parent
sys.path.insert(0, str(DOCS))

import cbn

project = "cbn"
version = release = cbn.__version__
html_title = f"cbn {version}"

extensions = [
    "sphinx.ext.autodoc", "sphinx.ext.autosummary", "numpydoc", "myst_parser", "sphinx_gallery.gen_gallery", "house_style", "formulas",
]  # fmt: skip
exclude_patterns = ["_build", "_examples"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

default_role = "code"
highlight_language = "none"
numpydoc_show_class_members = False
nitpicky = True
nitpick_ignore = [("c:identifier", "ptrdiff_t"), ("py:class", "numpy.ndarray")]

html_theme = "pydata_sphinx_theme"
html_math_renderer = "svg"
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_sidebars = {page: [] for page in ("index", "start", "mathematics", "numerics")}     # which have no others beside them
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "navigation_with_keys": False, "header_links_before_dropdown": 7, "show_prev_next": False, "footer_start": [], "footer_end": [],
}  # fmt: skip

# ---- gallery ----

# Examples as sphinx-gallery wants them, with a heading: copies, so that what they write stays out of examples/.
HEADINGS = {
    "digits": "Handwritten digits, with and without",
    "claims": "What is said of batch normalization",
    "accumulation": "Micro-batches with the numbers of the whole",
    "conv_bn_relu": "Apart, fused and folded",
}
NO_HEADING = ["network"]    # which others import
GALLERY = """Examples
========

Each is a script that runs by itself, `python examples/digits.py`, once cbn is installed with `pip install ".[examples]"`. Their figures and
times are those of the machine that built these pages.

"""


def copy_examples():
    to = DOCS / "_examples"
    to.mkdir(exist_ok=True)
    (to / "GALLERY_HEADER.rst").write_text(GALLERY)
    for name in [*HEADINGS, *NO_HEADING]:
        text = (DOCS.parent / "examples" / f"{name}.py").read_text()
        if name in HEADINGS:
            text = text.replace('"""', f'"""\n{HEADINGS[name]}\n{"=" * len(HEADINGS[name])}\n\n', 1)
        if not (to / f"{name}.py").exists() or (to / f"{name}.py").read_text() != text:
            (to / f"{name}.py").write_text(text)


copy_examples()
sphinx_gallery_conf = {
    "examples_dirs": "_examples",
    "gallery_dirs": "gallery",
    "filename_pattern": "|".join(HEADINGS),
    "ignore_pattern": "|".join(NO_HEADING),
    "download_all_examples": False,
    "notebook_extensions": set(),       # what imports network.py is no notebook
    "show_signature": False,
    "write_computation_times": False,
    "abort_on_example_error": True,
}
