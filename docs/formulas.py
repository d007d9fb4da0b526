"""Formulas as SVG, made while the pages are: no script, no font and no network are needed to see them."""

import html
import re

import ziamath
from docutils import nodes

SIZE = 16       # pixels to an em: sizes in the page are relative to its text


def drawn(tex):
    formula = ziamath.Latex(tex, size=SIZE, color="currentColor")
    width, height = (float(n) / SIZE for n in re.search(r'width="([\d.]+)" height="([\d.]+)"', formula.svg()).groups())
    style = f"width: {width:.3f}em; height: {height:.3f}em; vertical-align: {formula.getyofst() / SIZE:.3f}em"
    attributes = f'class="formula" role="img" aria-label="{html.escape(tex)}" style="{style}"'
    return re.sub(r'width="[\d.]+" height="[\d.]+"', attributes.replace("\\", r"\\"), formula.svg(), count=1)


def visit_inline(self, node):
    self.body.append(drawn(node.astext()))
    raise nodes.SkipNode


def visit_block(self, node):
    """What \\qquad separates is set side by side where there is room."""
    parts = re.split(r",?\s*\\qquad", node.astext().strip())
    self.body.append('<div class="formulas">' + "".join(f"<div>{drawn(part)}</div>" for part in parts) + "</div>\n")
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("svg", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True}
