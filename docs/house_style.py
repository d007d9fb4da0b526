"""Docstrings, and the comments of cbn.h, as this project writes them, turned into what numpydoc and Sphinx's C domain read.

They have text, formulas that are indented, and lines "name, name : what it is" whose further lines are indented; then "Returns ..." and
"Raises ...".
"""

import pathlib
import re
import textwrap

import cbn
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

ENTRY = re.compile(r"([A-Za-z_]\w*(?:, [A-Za-z_]\w*)*) : (.*)")
FORMULA = "    "         # how far a formula is indented at least
CHOICE = re.compile(r'\s+("\w+")(?::|  )\s*(.*)')        # of an entry's values, in lines of their own
DECLARED = re.compile(r"^(/\*(?:(?!\*/).)*\*/)\n((?:typedef int \w+_function\([^;]*;\n*)+)", re.DOTALL | re.MULTILINE)   # of cbn.h
TYPE = re.compile(r"int (\w+)_function\((.*?)\);", re.DOTALL)


def escaped(line):
    """What means something in reStructuredText, outside of backticks, doesn't; public names in backticks are links."""
    parts = line.split("`")
    for i, part in enumerate(parts):
        if i % 2 == 0:
            parts[i] = re.sub(r"([*|\\]|_\b(?!\w))", r"\\\1", part)
        else:
            parts[i] = f":py:obj:`~cbn.{part}`" if part in cbn.__all__ else f"``{part}``"
    return "".join(parts)


def text_of(lines):
    """Paragraphs and, of indented lines after an empty one, literal blocks."""
    out, literal = [], False
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith(FORMULA) and not literal and not before.strip():
            out += ["::", ""]
            literal = True
        elif line.strip() and not line.startswith(FORMULA):
            literal = False
        out.append(line if literal else escaped(line.strip()))
    return out


def entry_of(name, lines):
    """A parameter: its description, with choices as a list."""
    out, in_list = [], False
    for line in lines:
        choice = CHOICE.match(line)
        if choice:
            out += ["", f"- ``{choice[1]}``: " + escaped(choice[2])]
            in_list = True
        else:
            out.append(("  " if in_list else "") + escaped(line.strip()))
    return [name, *("    " + line for line in out)]


def split(lines):
    """(text before the entries, entries as lists of (name, lines), what follows each of Returns, Raises and neither)."""
    text, entries, after = [], [], {"Returns": [], "Raises": [], "Notes": []}
    to = text
    for line in lines:
        entry, word = ENTRY.match(line), line.split(" ", 1)[0]
        if entry:
            line, to = entry[2], []
            entries.append((entry[1], to))
        elif word in ("Returns", "Raises"):
            line, to = line.removeprefix(word).strip(), after[word]
        elif entries and (not line or to is entries[-1][1] and not line.startswith(" ")):
            to = after["Notes"]
        to.append(line)
    return text, entries, after


def numpydoc_of(lines):
    """A docstring with numpydoc's sections."""
    text, entries, after = split(lines)
    out = text_of(text)
    if entries:
        out += ["", "Parameters", "----------", *(line for entry in entries for line in entry_of(*entry))]
    for name in ("Returns", "Raises"):
        if after[name]:
            out += ["", name, "-" * len(name), escaped(" ".join(line.strip() for line in after[name])).replace(" : ", ": ")]
    if any(after["Notes"]):
        out += ["", "Notes", "-----", *text_of(after["Notes"])]
    return out


def rewrite(app, what, name, obj, options, lines):
    lines[:] = numpydoc_of(textwrap.dedent("\n".join(lines)).split("\n"))


# ---- cbn.h ----

def comment_of(text):
    return textwrap.dedent("\n".join(line.removeprefix(" *") for line in text[2:-2].split("\n"))).strip("\n").split("\n")


def fields_of(lines):
    """A comment as reStructuredText: entries are a list of definitions, wherever they stand."""
    out, block, entry = [], [], None
    for line in [*lines, ""]:
        match = ENTRY.match(line.strip())
        if match or entry is not None and not line.startswith("      "):
            if entry is not None:
                out += [*entry, ""]
            out += text_of(block)
            block, entry = [], None
        if match:
            entry = ["", f"``{match[1]}``", "    " + escaped(match[2])]
        elif entry is not None:
            entry.append("    " + escaped(line.strip()))
        else:
            block.append(line)
    return out + text_of(block)


class Header(SphinxDirective):
    """`preamble`: the comment that opens cbn.h; `constants`: its enums; `functions`: each with its comment."""

    required_arguments = 1

    def run(self):
        path = pathlib.Path(cbn.get_include()) / "cbn.h"
        text = path.read_text()
        self.env.note_dependency(str(path))
        return getattr(self, self.arguments[0])(text)

    def parsed(self, lines):
        node = nodes.container()
        self.state.nested_parse(StringList(lines, "cbn.h"), self.content_offset, node)
        return node.children

    def preamble(self, text):
        return self.parsed(fields_of(comment_of(text[: text.index("*/") + 2])))

    def constants(self, text):
        code = "\n\n".join(re.findall(r"^enum \{.*?\};", text, re.DOTALL | re.MULTILINE))
        return [nodes.literal_block(code, code, language="c")]

    def functions(self, text):
        lines, count = [], 0
        for comment, types in DECLARED.findall(text):
            declared = [f"int {name}({' '.join(arguments.split())})" for name, arguments in TYPE.findall(types)]
            lines += [".. c:function:: " + declared[0], *(" " * 16 + d for d in declared[1:]), ""]
            lines += [*("    " + line for line in fields_of(comment_of(comment))), ""]
            count += len(declared)
        if count != len(re.findall(r"^static \w+_function \*", text, re.MULTILINE)):
            raise self.error("cbn.h declares functions in a way that house_style.py doesn't know")
        return self.parsed(lines)


def setup(app):
    app.connect("autodoc-process-docstring", rewrite, priority=100)     # before numpydoc
    app.add_directive("cbn-header", Header)
    return {"parallel_read_safe": True}
