"""Default values are those that the docstrings name, and an ascent has its method's."""

import inspect
import math
import re

import pytest

import sam_optax
from sam_optax import ascents, cadences, descents

RECORDED = {**sam_optax.METHODS, **sam_optax.methods.FURTHER_METHODS}
METHODS = {name: method.make for name, method in RECORDED.items()}
PARTS = {
    f"{space.__name__}.{name}": getattr(space, name)
    for space in (ascents, descents, cadences)
    for name in space.__all__
    if inspect.isfunction(getattr(space, name))
}


def defaults(function):
    """The numbers among them."""
    parameters = inspect.signature(function).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if isinstance(parameter.default, (int, float))
        and not isinstance(parameter.default, bool)
    }


def entries(function):
    """The text of each argument under Args."""
    doc = inspect.getdoc(function)
    text = doc[doc.index("Args:") : doc.index("Returns:")]
    found = re.findall(r"^  ([\w, ]+): (.*?)(?=^  \w|\Z)", text, re.M | re.S)
    return {
        name: " ".join(entry.split())
        for names, entry in found
        for name in names.split(", ")
    }


def is_named(default, entry):
    """In the sentence that says it; or it stands with another function's argument."""
    _, found, after = entry.partition("Default ")
    if not found:
        return entry.startswith("as for ")
    sentence, *_ = re.split(r"\.(?: |$)", after)
    name = "infinity" if default == math.inf else f"{default:g}"
    return name in re.split(r"[ ,;:]+", sentence)


EVERYTHING = {**METHODS, **PARTS}
DOCUMENTED = {k: f for k, f in EVERYTHING.items() if "Args:" in inspect.getdoc(f)}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_docstring_names_every_default(name):
    documented = entries(DOCUMENTED[name])
    for argument, default in defaults(DOCUMENTED[name]).items():
        assert is_named(default, documented[argument]), (argument, default)


def test_the_docstrings_are_read():
    assert entries(sam_optax.sam)["rho"].startswith("the radius ρ = ‖ε‖_p")
    assert is_named(0.05, entries(sam_optax.sam)["rho"])
    assert not is_named(1.05, entries(sam_optax.sam)["rho"])
    assert not is_named(0.1, entries(sam_optax.fsam)["rho"])  # the paper's


@pytest.mark.parametrize("name", sorted({*METHODS} & {*ascents.__all__}))
def test_an_ascent_has_the_defaults_of_its_method(name):
    ours, methods = (
        inspect.signature(function).parameters
        for function in (getattr(ascents, name), METHODS[name])
    )
    for argument, parameter in ours.items():
        if argument != "p":  # None there, for inject_hyperparams
            assert methods[argument].default == parameter.default


def test_every_method_has_a_record():
    functions = inspect.getmembers(sam_optax.methods, inspect.isfunction)
    tools = {
        "draw_from_bsam",
        "further_methods_table",
        "mask_by_name",
        "methods_table",
        "normalization_layers",
        "record",
    }
    assert {name for name, _ in functions} - tools == {*RECORDED}
