"""The kernels stay readable: no long file, no long function, no function of many arguments."""

import pathlib
import re

import pytest

KERNELS = pathlib.Path(__file__).parents[1] / "cbn" / "kernels"
FILES = [path for pattern in ("*.pxi", "*.pxd", "*.h") for path in sorted(KERNELS.glob(pattern))]
MOST_LINES, MOST_LINES_OF_A_FUNCTION, MOST_ARGUMENTS, MOST_COLUMNS = 300, 60, 8, 160


def functions(text):
    """(name, arguments, lines) of each function of Cython code."""
    lines = text.splitlines()
    for start, line in enumerate(lines):
        if not re.match(r"cdef .*\w\(", line) or line.startswith("cdef extern"):
            continue
        end = start + 1
        while end < len(lines) and (not lines[end] or lines[end][0] in " )"):
            end += 1
        code = "\n".join(lines[start:end]).rstrip()
        signature = code[: code.index(":\n")] if ":\n" in code else code
        arguments = signature[signature.index("(") + 1 : signature.rindex(")")]
        yield re.search(r"(\w+)\(", signature)[1], arguments.count(",") + bool(arguments.strip()), code.count("\n") + 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files(path):
    text = path.read_text()
    assert text.count("\n") <= MOST_LINES
    assert max(map(len, text.splitlines())) <= MOST_COLUMNS
    assert text.startswith(("#", "/*")), "opens with what it is for"


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix != ".h"], ids=lambda path: path.name)
def test_functions(path):
    for name, arguments, lines in functions(path.read_text()):
        assert lines <= MOST_LINES_OF_A_FUNCTION, name
        assert arguments <= MOST_ARGUMENTS, name


if __name__ == "__main__":
    every = [(lines, arguments, f"{path.name} {name}") for path in FILES if path.suffix != ".h" for name, arguments, lines in functions(path.read_text())]
    print("lines of all files:", sum(path.read_text().count("\n") for path in KERNELS.iterdir() if path.suffix in (".pxi", ".pxd", ".h", ".pyx")))
    print("longest file:", *max((path.read_text().count("\n"), path.name) for path in FILES))
    print("longest functions:", *[f"{lines} {name}," for lines, _, name in sorted(every)[-4:]])
    print("most arguments:", *[f"{arguments} {name}," for arguments, _, name in sorted((a, l, n) for l, a, n in every)[-6:]])
