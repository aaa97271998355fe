"""The site: what is generated for it, and, with the slow tests, its build."""

import importlib
import inspect
import os
import pathlib
import re
import subprocess
import sys

import pytest
from matplotlib.image import imread

import sam_optax

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "_ext"))
generated_pages = importlib.import_module("generated_pages")
docstrings = importlib.import_module("docstrings")
sys.path.remove(str(DOCS / "_ext"))


@pytest.fixture(scope="module")
def pages():
    return generated_pages.pages()


def names_on(text):
    return re.findall(r"^\.\. auto(?:function|class|data):: (\S+)$", text, re.M)


def test_every_public_object_is_documented_once(pages):
    documented = [name for text in pages.values() for name in names_on(text)]
    assert len(documented) == len(set(documented))
    objects = {}
    for name in documented:
        module, _, attribute = name.rpartition(".")
        value = getattr(importlib.import_module(module), attribute)
        assert id(value) not in objects, (name, objects[id(value)])
        objects[id(value)] = name
    for module_name in generated_pages.MODULES:
        module = importlib.import_module(module_name)
        for name in generated_pages.public_names(module):
            assert id(getattr(module, name)) in objects, f"{module_name}.{name}"


def test_every_public_module_has_a_page(pages):
    package = pathlib.Path(sam_optax.__file__).parent
    public = {"sam_optax"} | {
        f"sam_optax.{path.stem}"
        for path in package.iterdir()
        if not path.name.startswith("_") and (path.suffix == ".py" or path.is_dir())
    }
    assert public == set(generated_pages.MODULES)
    for module in public:
        assert f".. automodule:: {module}\n" in pages[f"reference/{module}.rst"]


def test_public_names_are_those_that_users_import(pages):
    """By hand, because the generator and the test above share `public_names`."""
    names = generated_pages.documented_names()
    assert {"sam_value_and_grad", "Recorder", "METHODS"} <= set(names["sam_optax"])
    assert "sam" in names["sam_optax.ascents"]  # not the method of the same name
    assert {"worst_case", "Sharpness", "hessian"} <= set(names["sam_optax.sharpness"])
    assert names["sam_optax.nnx"] == ["value_and_ascent_grad"]
    assert set(names["sam_optax.plot"]) >= {"spectrum", "lines", "surfaces", "training"}
    assert {"record", "Method"} <= set(names["sam_optax.methods"])
    assert "k_sam" not in names["sam_optax.data"]  # it has a page of its own


def test_every_method_has_a_card_and_a_page(pages):
    methods = {**sam_optax.METHODS, **sam_optax.methods.FURTHER_METHODS}
    cards = [text for path, text in pages.items() if path.startswith("_generated/")]
    found = re.findall(r"grid-item-card:: (\S+)$", "\n".join(cards), re.M)
    assert sorted(found) == sorted(methods)
    for name, method in methods.items():
        page = pages[f"methods/{name}.rst"]
        assert method.title in page
        assert method.url in page
        assert f".. autofunction:: {generated_pages.home(method)}\n" in page


def test_the_cards_are_in_the_group_of_their_cost(pages):
    def group(name):
        return [
            path
            for path, text in pages.items()
            if path.startswith("_generated/") and f"card:: {name}\n" in text
        ]

    assert group("sam_every_k") == group("ae_sam") == ["_generated/fewer.rst"]
    assert group("sam") == ["_generated/two.rst"]
    assert group("multi_step_sam") == ["_generated/more.rst"]
    assert group("saf") == ["_generated/further.rst"]


def test_advice_is_about_methods_and_shows_what_is_there():
    methods = {**sam_optax.METHODS, **sam_optax.methods.FURTHER_METHODS}
    for name in generated_pages.all_advice():
        assert name in methods
        advice = generated_pages.advice(name)
        assert advice.when.endswith(".")
        if advice.evidence:
            assert (DOCS / f"{advice.evidence}.md").exists()


def test_every_page_is_in_the_navigation():
    """Otherwise nobody finds it; Sphinx would warn, but only in a build."""
    index = (DOCS / "index.md").read_text()
    trees = re.findall(r"```\{toctree\}\n(.*?)```", index, re.DOTALL)
    listed = {line for tree in trees for line in tree.split() if line}
    pages = {path.stem for path in DOCS.glob("*.md")} - {"index"}
    assert pages <= listed, pages - listed


def test_the_tables_in_markdown_have_a_row_for_every_method():
    for methods, table in (
        (sam_optax.METHODS, sam_optax.methods.methods_table()),
        (
            sam_optax.methods.FURTHER_METHODS,
            sam_optax.methods.further_methods_table(),
        ),
    ):
        rows = table.splitlines()[2:]
        assert [row.split("`")[1] for row in rows] == list(methods)
        for row, method in zip(rows, methods.values(), strict=True):
            assert f"| {method.title} | {method.equation} |" in row
            assert not method.url or f"[{method.source}]({method.url}) |" in row


def test_docstrings_become_restructuredtext():
    lines = """T = |w| + η, and `p*q` stays, as does ``|x|``.

.. math::
  T = |w|

Differences from the authors' code, of which
there is one:
  1. Theirs divides by
     |g|, with --flag.

>>> abs(-1 * 2)
2""".splitlines()
    assert docstrings.prepare(lines) == [
        r"T = \|w\| + η, and `p*q` stays, as does ``|x|``.",
        *lines[1:7],
        "",
        "1. Theirs divides by",
        r"   \|g\|, with ``--flag``.",
        *lines[9:],
    ]


def test_calls_on_the_migration_page_have_the_arguments_of_the_functions():
    page = (DOCS / "migrate-classes.md").read_text()
    spaces = (sam_optax, sam_optax.data, sam_optax.ascents, sam_optax.descents)
    called = set()
    for name, arguments in re.findall(r"`(?:\w+\.)?([a-z]\w+)\(([^`]*)\)`", page):
        homes = [space for space in spaces if name in vars(space)]
        known = inspect.signature(getattr(homes[0], name)).parameters if homes else ()
        for keyword in re.findall(r"(\w+)=", arguments) if homes else ():
            assert keyword in known, (name, keyword)
            called.add(name)
    assert {"fsam", "asam", "look_sam", "decoupled_wsam", "ssam", "bsam"} <= called


@pytest.mark.slow
def test_the_site_builds_without_a_network_and_documents_every_name(tmp_path):
    pytest.importorskip("sphinx_design")
    inventory = importlib.import_module("sphinx.util.inventory")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "sphinx", "--builder", "html", "--quiet"]
    command += [
        "--fail-on-warning",
        "--keep-going",
        "--doctree-dir",
        tmp_path / "trees",
    ]
    proxies = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    subprocess.run([*command, DOCS, site], check=True, env=os.environ | proxies)
    check = [sys.executable, ROOT / "scripts" / "check_links.py", site]
    subprocess.run(check, check=True)
    found = inventory.InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    objects = {name for kind in found.data.values() for name in kind}
    for name, texts in generated_pages.pages().items():
        assert set(names_on(texts)) <= objects, name


@pytest.mark.slow
def test_the_gallery_is_what_its_script_draws(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    importlib.import_module("gallery").main(["--quick", "--output", str(tmp_path)])
    shown = {path.name for path in (DOCS / "figures").glob("gallery-*.png")}
    assert shown == {path.name for path in tmp_path.iterdir()}
    for path in tmp_path.iterdir():
        assert imread(path).std() > 0.05, path.name
