"""Writes the pages that are made from the library itself.

- methods/NAME.rst: a page for each method of `METHODS` and `FURTHER_METHODS`, from its
  record, its docstring, and the advice in `advice.toml`;
- _generated/GROUP.rst: a card for each of them, which methods.md includes;
- reference/MODULE.rst: the other public names of each module, every one once;
- examples/NAME.rst: the source of each script in `examples/`.

The pages are written before Sphinx reads the sources, and git ignores them. Apart from
`setup`, nothing here needs Sphinx, so the tests can look at the pages without it.
"""

import ast
import importlib
import pathlib
import tomllib
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import sam_optax
from sam_optax.methods import FURTHER_METHODS, METHODS, FurtherMethod, Method

DOCS = pathlib.Path(__file__).parent.parent
EXAMPLES = DOCS.parent / "examples"
MODULES = {
    "sam_optax": "The helpers and what they return",
    "sam_optax.ascents": "From the gradient to the perturbation",
    "sam_optax.descents": "From the two gradients to the one that is used",
    "sam_optax.cadences": "On which steps the second gradient is taken",
    "sam_optax.data": "Which examples each gradient sees",
    "sam_optax.methods": "The records of the methods",
    "sam_optax.nnx": "Flax NNX",
    "sam_optax.sharpness": "Measure sharpness",
    "sam_optax.plot": "Draw measures and trainings",
}
# The groups of cards, by the gradients of a step with default settings.
GROUPS = {
    "fewer": lambda gradients: gradients < 2,
    "two": lambda gradients: gradients == 2,
    "more": lambda gradients: gradients > 2,
}


@dataclass(frozen=True)
class Advice:
    """When to use a method, and a figure about it, both optional."""

    when: str = ""
    figure: str = ""
    evidence: str = ""


def pages() -> dict[str, str]:
    """The text of every generated page, by its path under docs."""
    result = {
        f"_generated/{group}.rst": _grid(
            _card(name, method)
            for name, method in METHODS.items()
            if belongs(_gradients(method))
        )
        for group, belongs in GROUPS.items()
    }
    result["_generated/further.rst"] = _grid(
        _card(name, method) for name, method in FURTHER_METHODS.items()
    )
    result["_generated/navigation.rst"] = ".. toctree::\n   :hidden:\n\n" + "".join(
        f"   {name} </methods/{name}>\n" for name in _all_methods()
    )
    for name, method in _all_methods().items():
        result[f"methods/{name}.rst"] = _method_page(name, method)
    names = documented_names()
    for module in MODULES:
        result[f"reference/{module}.rst"] = _reference_page(module, names[module])
    for path in sorted(EXAMPLES.glob("*.py")):
        result[f"examples/{path.stem}.rst"] = _example_page(path)
    return result


def public_names(module: types.ModuleType) -> list[str]:
    """The names that a module offers: those of `__all__`, or its own without _."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    package = (module.__name__,) if _is_leaf(module) else ("sam_optax",)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not isinstance(value, types.ModuleType)
        and (name.isupper() or getattr(value, "__module__", "").startswith(package))
    ]


def documented_names() -> dict[str, list[str]]:
    """The names that the reference page of each module documents.

    A name that two modules offer stands at the first of them. Methods have pages of
    their own, so they are on none of these.
    """
    seen = {id(method.make) for method in _all_methods().values()}
    result = {}
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        result[module_name] = []
        for name in public_names(module):
            value = getattr(module, name)
            if id(value) not in seen:
                seen.add(id(value))
                result[module_name].append(name)
    return result


def home(method: Method | FurtherMethod) -> str:
    """Where users find a method: `sam_optax.sam`, `sam_optax.data.k_sam`."""
    name = method.make.__name__
    space = "sam_optax" if hasattr(sam_optax, name) else "sam_optax.data"
    return f"{space}.{name}"


def all_advice() -> dict[str, dict[str, str]]:
    return tomllib.loads((DOCS / "advice.toml").read_text())


def advice(name: str) -> Advice:
    return Advice(**all_advice().get(name, {}))


def _all_methods() -> dict[str, Method | FurtherMethod]:
    return {**METHODS, **FURTHER_METHODS}


def _is_leaf(module: types.ModuleType) -> bool:
    return not hasattr(module, "__path__")


def _heading(text: str) -> str:
    return f"{text}\n{'=' * len(text)}\n"


def _gradients(method: Method) -> float:
    """The gradients of a step with default settings, or 1.5 where the data decide."""
    gradients = method.gradients()
    return gradients if gradients == gradients else 1.5


def _grid(cards: Iterable[str]) -> str:
    return ".. grid:: 1 1 2 2\n   :gutter: 3\n\n" + "\n".join(cards)


def _card(name: str, method: Method | FurtherMethod) -> str:
    note = advice(name)
    lines = [
        f".. grid-item-card:: {name}",
        f"   :link: /methods/{name}",
        "   :link-type: doc",
        "   :class-title: method-name",
        "",
        f"   **{method.title}** · {method.source or 'this library'}",
        "",
        f"   {_rst(method.equation)}",
        "",
    ]
    if note.when:
        lines += [f"   {_rst(note.when)}", ""]
    lines += ["   .. card-footer::", "", f"      {_cost(method)}"]
    return "\n".join(f"   {line}".rstrip() for line in lines) + "\n"


def _cost(method: Method | FurtherMethod) -> str:
    return f"gradients a step: {_rst(method.cost)}"


def _method_page(name: str, method: Method | FurtherMethod) -> str:
    note = advice(name)
    facts = [("in one line", method.equation)]
    if isinstance(method, Method):
        facts.append(("equal to ρ", method.radius))
    else:
        facts.append(("goes into", method.use))
    facts.append(("gradients a step", method.cost))
    if method.source:
        source = f"`{method.source} <{method.url}>`_" if method.url else method.source
        facts.append(("source", source))
    lines = [_heading(f"{method.title}: ``{name}``"), ".. list-table::"]
    lines += ["   :widths: 22 78", "   :class: facts", ""]
    for key, value in facts:
        lines += [
            f"   * - {key}",
            f"     - {value if key == 'source' else _rst(value)}",
        ]
    lines.append("")
    if note.when:
        lines += [f"**When to use it.** {_rst(note.when)}", ""]
    if note.evidence:
        lines += [f"Measured here: :doc:`/{note.evidence}`.", ""]
    if note.figure:
        lines += _figure(note.figure, f"{name}, measured")
    lines += [f".. autofunction:: {home(method)}", ""]
    return "\n".join(lines)


def _figure(name: str, alt: str) -> list[str]:
    """A figure, in two versions where its name has no suffix."""
    if name.endswith(".png"):
        return [f".. image:: /figures/{name}", f"   :alt: {alt}", ""]
    lines = []
    for style in ("light", "dark"):
        lines += [f".. image:: /figures/{name}-{style}.png", f"   :alt: {alt}"]
        lines += [f"   :class: only-{style}", ""]
    return lines


def _reference_page(module_name: str, names: list[str]) -> str:
    module = importlib.import_module(module_name)
    title = f"``{module_name}``: {_lower_first(MODULES[module_name])}"
    lines = [_heading(title), f".. automodule:: {module_name}", "   :no-members:", ""]
    if module is sam_optax:
        lines += ["The named methods have :doc:`pages of their own </methods>`.", ""]
    for name in names:
        lines += [*_directive(module, name), ""]
    return "\n".join(lines)


def _lower_first(text: str) -> str:
    return text if text.startswith("Flax") else text[0].lower() + text[1:]


def _directive(module: types.ModuleType, name: str) -> Iterator[str]:
    value, full_name = getattr(module, name), f"{module.__name__}.{name}"
    if isinstance(value, type):
        yield f".. autoclass:: {full_name}"
        yield "   :members:"
    elif callable(value) and hasattr(value, "__module__") and hasattr(value, "__doc__"):
        yield f".. autofunction:: {full_name}"
    else:
        yield f".. autodata:: {full_name}"
        yield "   :no-value:"


def _example_page(path: pathlib.Path) -> str:
    """What the docstring says, and the code after it."""
    module = ast.parse(path.read_text())
    lines = [_heading(path.name)]
    for paragraph in (ast.get_docstring(module) or "").split("\n\n"):
        if paragraph.startswith("    "):  # a command
            lines += [".. code-block:: sh", ""]
        lines += [paragraph, ""]
    lines += [f".. literalinclude:: ../../examples/{path.name}", "   :language: python"]
    lines.append(f"   :lines: {(module.body[0].end_lineno or 0) + 2}-")
    return "\n".join(lines) + "\n"


def _rst(text: str) -> str:
    """Markdown of the records as reStructuredText: `code` becomes ``code``."""
    parts = text.split("`")
    for i, part in enumerate(parts):
        parts[i] = part.replace("|", r"\|").replace("*", r"\*") if i % 2 == 0 else part
    return "``".join(parts)


def write_pages() -> None:
    """Writes what has changed, and removes the pages of what is no longer there."""
    wanted = pages()
    for folder in ("_generated", "methods", "reference", "examples"):
        for old in (DOCS / folder).glob("*.rst"):
            if str(old.relative_to(DOCS)) not in wanted:
                old.unlink()
    for path, text in wanted.items():
        target = DOCS / path
        target.parent.mkdir(exist_ok=True)
        if not target.exists() or target.read_text() != text:
            target.write_text(text)


def setup(app: object) -> dict[str, bool]:
    write_pages()
    return {"parallel_read_safe": True}
