"""The README and the pages under docs run, and say what is there.

Each page's Python blocks run in order in one namespace. A `text` block after one is
what it prints, to the printed digits.
"""

import inspect
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

import sam_optax
from lab import assert_trees_close, assert_trees_equal
from sam_optax import plot, sharpness
from sam_optax.methods import _record

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_CODE = [page for page in PAGES if "\n```python\n" in page.read_text()]
assert len(WITH_CODE) > 20
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"-?\d+\.\d+(?:e[+-]?\d+)?")


def assert_prints(actual, expected):
    """Equal but for the last digit of numbers, which differs between processors."""
    assert NUMBER.sub("#", actual).split() == NUMBER.sub("#", expected).split()
    for a, e in zip(NUMBER.findall(actual), NUMBER.findall(expected), strict=True):
        assert float(a) == pytest.approx(float(e), rel=2e-4, abs=1e-6)


@pytest.fixture(autouse=True)
def registry():
    """As it was: a page of documentation puts a method of its own into it."""
    before = dict(_record._methods)
    yield
    _record._methods.clear()
    _record._methods.update(before)


@pytest.mark.parametrize("page", WITH_CODE, ids=[page.stem for page in WITH_CODE])
def test_the_code_of_a_page_runs_and_prints_what_it_says(page, capsys):
    blocks = FENCE.findall(page.read_text())
    assert any(language == "python" for language, _ in blocks)
    namespace, printed = {"__name__": "page"}, ""
    for language, text in blocks:
        if language == "python":
            assert not printed, f"{page.name} does not show that it prints {printed}"
            exec(compile(text, page.name, "exec"), namespace)
            printed = capsys.readouterr().out
        elif language == "text":
            assert_prints(printed, text)
            printed = ""
    assert not printed


def test_every_method_is_registered_documented_and_public():
    registries = (sam_optax.METHODS, sam_optax.methods.FURTHER_METHODS)
    for name, method in (item for r in registries for item in r.items()):
        home = sam_optax if hasattr(sam_optax, name) else sam_optax.data
        assert getattr(home, name) is method.make
        doc = method.make.__doc__
        for section in (".. math::", "Args:", "Returns:", "Raises:"):
            assert section in doc, (name, section)
        assert "Cost:" in doc, name
        if method.source:
            assert "References:" in doc, name
            assert "<https://" in doc, name
        if name in sam_optax.METHODS:
            assert "Differences from" in doc, name
        # "1 before `start`, then 2", "2, side by side": the first number.
        gradients = re.split(r",| before", method.cost)[0]
        gradients = gradients.removesuffix(" + a forward pass")
        assert f"Cost: {gradients} gradient" in doc, name


def test_every_measure_and_picture_is_documented():
    measures = [
        value
        for module in (sharpness, plot)
        for name, value in vars(module).items()
        if inspect.isfunction(value) and not name.startswith("_")
    ]
    assert len(measures) >= 20
    for measure in measures:
        doc = measure.__doc__
        sections = ["Args:", "Returns:", "Examples:"]
        if measure.__module__.startswith("sam_optax.sharpness"):
            sections += [] if measure is sharpness.stream else [".. math::", "Cost:"]
        for section in sections:
            assert section in doc, (measure, section)
        for argument in inspect.signature(measure).parameters:
            assert re.search(rf"^      {argument}: ", doc, re.M), (measure, argument)


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            if not target.startswith("https://"):
                path, _, anchor = target.partition("#")
                linked = page.parent / path if path else page
                assert linked.exists(), (page.name, target)
                if anchor:
                    headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.M)
                    slugs = [
                        re.sub(r"[^\w -]", "", h).lower().replace(" ", "-")
                        for h in headings
                    ]
                    assert anchor in slugs, (page.name, target)


def test_the_core_imports_jax_and_optax_only():
    code = "import sys, sam_optax; print(*{m.split('.')[0] for m in sys.modules})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    extras = {"flax", "matplotlib", "sklearn", "rich", "orbax", "equinox", "hypothesis"}
    extras |= {"matfree"}
    assert not extras & set(result.stdout.split())


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check"],
        ["ruff", "format", "--check"],
        pytest.param(
            ["basedpyright", "--pythonpath", sys.executable],
            marks=pytest.mark.skipif(
                tuple(map(int, optax.__version__.split(".")[:3])) < (0, 2, 8),
                reason="the types of older versions of Optax say less",
            ),
        ),
    ],
    ids=["lint", "format", "types"],
)
def test_style(command):
    program = pathlib.Path(sys.executable).parent / command[0]
    result = subprocess.run(
        [program, *command[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_new_method_takes_at_most_fifteen_lines():
    """The page's method, in its lines and in the contracts that come for nothing."""
    blocks = FENCE.findall((ROOT / "docs" / "new-method.md").read_text())
    method = blocks[0][1]
    code = [line for line in method.split("def temper", 1)[1].splitlines() if line]
    assert len(code) <= 15
    namespace = {"__name__": "page"}
    exec(compile(method, "new-method.md", "exec"), namespace)
    w = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
    g = {"a": jnp.array([4.0, -9.0]), "b": jnp.array(0.0)}
    points = []
    sam = namespace["tempered_sam"](rho=optax.linear_schedule(13**0.5, 0.0, 2))
    state = sam.init(w)
    for _ in range(3):
        d, state = sam.update(g, state, w, grad_fn=lambda p: points.append(p) or g)
        assert_trees_equal(d, g)
    for point, share in zip(points, (1.0, 0.5, 0.0), strict=True):
        moved = jax.tree.map(jnp.subtract, point, w)
        expected = {"a": share * jnp.array([2.0, -3.0]), "b": jnp.array(0.0)}
        assert_trees_close(moved, expected, atol=1e-6)
