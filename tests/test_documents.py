"""What README and the pages of docs/ show runs as it stands there: each page's blocks of Python, in their order, in one namespace.

A comment before a block says what it can't do without, <!-- needs numba -->, and at a page's beginning <!-- all need torch --> what none
can: they are skipped where that isn't installed. A comment <!-- set-up ... --> holds code that runs unseen. Cython and C are compiled.
"""

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sysconfig
import textwrap

import pytest

import cbn

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()]
BLOCK = re.compile(
    r"^<!-- set-up\n(?P<hidden>.*?)^-->|"
    r"(?:^<!-- needs (?P<needs>[\w., ]+) -->\n)?^ *```(?P<language>python|cython|c)\n(?P<shown>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)

pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="the documents are not here")


def blocks(text):
    """(number of lines before the code, code, language, what it needs) of each block."""
    of_all = re.match(r"<!-- all need ([\w., ]+) -->$", text, re.MULTILINE)
    for match in BLOCK.finditer(text):
        part = "hidden" if match["hidden"] is not None else "shown"
        needs = [name for name in re.split(r"[, ]+", f"{of_all[1] if of_all else ''} {match['needs'] or ''}") if name]
        yield text.count("\n", 0, match.start(part)), textwrap.dedent(match[part]), match["language"] or "python", needs


def missing(needs):
    return [name for name in needs if importlib.util.find_spec(name.partition(".")[0]) is None]


def compile_cython(code):
    """To C, where a wrong name, number of arguments or type is an error."""
    from Cython.Compiler.Main import CompilationOptions, compile_single

    path = pathlib.Path("page.pyx")
    path.write_text("# cython: language_level=3\n" + code)
    assert compile_single(str(path), CompilationOptions(include_path=[str(pathlib.Path(cbn.__file__).parents[1])]), "page").num_errors == 0


def check_c(code):
    compiler, include = os.environ.get("CC", "cc"), sysconfig.get_path("include")
    if shutil.which(compiler) and pathlib.Path(include, "Python.h").exists():
        command = [compiler, "-fsyntax-only", "-Werror", f"-I{include}", f"-I{cbn.get_include()}", "-xc", "-"]
        subprocess.run(command, input=code, text=True, check=True)


@pytest.fixture
def as_it_was():
    """The process's settings, which pages show how to change."""
    before = cbn.get_num_threads(), cbn.get_cache_limit()
    yield
    cbn.set_num_threads(before[0])
    cbn.set_cache_limit(before[1])


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=lambda page: page.name)
def test_blocks(page, tmp_path, monkeypatch, as_it_was):
    monkeypatch.chdir(tmp_path)  # what is written stays there
    namespace = {"__name__": page.name}
    skipped = []
    for line, code, language, needs in blocks(page.read_text()):
        if missing(needs):
            skipped += missing(needs)
        elif language == "cython":
            compile_cython(code)
        elif language == "c":
            check_c(code)
        else:
            exec(compile("\n" * line + code, str(page), "exec"), namespace)
    if skipped:
        pytest.skip(f"{', '.join(dict.fromkeys(skipped))} missing: the blocks that need these were left out, all others ran")


def test_every_block_is_found():
    """Whatever looks like one."""
    for page in PAGES:
        text = page.read_text()
        found = sum(match["shown"] is not None for match in BLOCK.finditer(text))
        assert found == len(re.findall(r"^ *```(?:python|py|cython|c)\b(?!-)", text, re.MULTILINE)), page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_linked_to(page):
    """Those of the gallery are made when the pages are."""
    prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#]+)", prose):
        if "://" not in link and not link.startswith("gallery/"):
            assert (page.parent / link).exists(), link


def test_the_reference_has_every_name():
    described = re.findall(r"^\.\. auto(?:function|class):: (\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(described) == sorted(cbn.__all__)
