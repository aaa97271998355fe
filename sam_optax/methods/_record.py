"""One record per method. Tables, examples and benchmarks are made from the records."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar, get_args, is_typeddict

import optax

from sam_optax._step import sharpness_aware

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Method:
    """What there is to know about a named method.

    Attributes:
      make: the function that builds the transformation. All its arguments have
        defaults.
      title: the name in words.
      equation: the method in one line. If it does not mention d, d = gᵃ.
      radius: the quantity that equals rho.
      cost: the gradients of a step, as text for tables.
      source: the publication, such as "Foret 2021".
      url: its link, or "".
    """

    make: Callable[..., optax.GradientTransformationExtraArgs]
    title: str
    equation: str
    radius: str
    cost: str
    source: str
    url: str
    _gradients: float | Callable[..., float]

    def gradients(self, **arguments: Any) -> float:
        """The number of gradients that a step takes on average.

        Args:
          arguments: those of the method that differ from its defaults.

        Returns:
          The number of gradients; NaN where it depends on the data or on a schedule.
        """
        bound = inspect.signature(self.make).bind(**arguments)
        if not callable(self._gradients):
            return float(self._gradients)
        bound.apply_defaults()
        names = inspect.signature(self._gradients).parameters
        return float(self._gradients(**{name: bound.arguments[name] for name in names}))


@dataclass(frozen=True)
class FurtherMethod:
    """What there is to know about a method that is not a transformation.

    Attributes:
      make: the public function.
      title: the name in words.
      equation: the method in one line.
      use: where to put the value that `make` returns.
      cost: the gradients of a step, as text for tables.
      source: the publication, or "".
      url: its link, or "".
    """

    make: Callable[..., object]
    title: str
    equation: str
    use: str
    cost: str
    source: str
    url: str


_methods: dict[str, Method] = {}
_further_methods: dict[str, FurtherMethod] = {}

METHODS: Mapping[str, Method] = MappingProxyType(_methods)
FURTHER_METHODS: Mapping[str, FurtherMethod] = MappingProxyType(_further_methods)


def record(
    *,
    title: str,
    equation: str,
    radius: str = "‖ε‖",
    source: str,
    url: str = "",
    gradients: float | Callable[..., float] = 2,
    cost: str | None = None,
) -> Callable[[_Function], _Function]:
    """A decorator that puts a method into `METHODS`, under the function's name.

    It also replaces `**options` in the function's signature by the arguments that it
    stands for, because `help` and `optax.inject_hyperparams` look there. If `**options`
    is annotated with an unpacked TypedDict, these are the keys of the TypedDict.
    Otherwise they are all keyword arguments of `sharpness_aware` that the function does
    not name itself. A method that sets its own descent or cadence needs the annotation,
    so that these two are not listed::

        @methods.record(title="My SAM", equation="ε = ρ g/‖g‖", source="Me 2026")
        def my_sam(rho=0.05, **options: Unpack[methods.Options]):
            ascent = sam_optax.ascents.sam(rho)
            return sam_optax.sharpness_aware(ascent, descent=..., **options)

    Args:
      title: the name in words.
      equation: the method in one line.
      radius: the quantity that equals rho. Default "‖ε‖".
      source: the publication, such as "Foret 2021".
      url: its link. Default "": none.
      gradients: the number of gradients that a step takes on average. If it depends on
        arguments of the method, a function of these, such as `lambda k: 1 + 1 / k`.
        Default 2.
      cost: the same as text for tables. Default None: the number.

    Returns:
      The decorator. It returns the function itself.

    Raises:
      ValueError: from the decorator, if another function has registered the same name.
        If you define the same function again, as in a notebook, its record is replaced.
      TypeError: if gradients is a function and cost is missing.
    """
    if cost is None:
        if callable(gradients):
            raise TypeError("Where gradients is a function, cost= must say it in text.")
        cost = f"{gradients:g}"

    def register(make: _Function) -> _Function:
        _check_name(make)
        _write_out_options(make)
        _methods[make.__name__] = Method(
            make, title, equation, radius, cost, source, url, gradients
        )
        return make

    return register


def record_further(
    *,
    title: str,
    equation: str,
    use: str,
    source: str = "",
    url: str = "",
    cost: str,
) -> Callable[[_Function], _Function]:
    """Like `record`, for `FURTHER_METHODS`; the function keeps its signature."""

    def register(make: _Function) -> _Function:
        _check_name(make)
        _further_methods[make.__name__] = FurtherMethod(
            make, title, equation, use, cost, source, url
        )
        return make

    return register


def _check_name(make: Callable[..., object]) -> None:
    known = {**_methods, **_further_methods}.get(make.__name__)
    if known is None:
        return
    home, other = (f"{f.__module__}.{f.__qualname__}" for f in (make, known.make))
    if home != other:
        raise ValueError(
            f"There is already a method called {make.__name__!r}, made by {other}. "
            f"Give {home} another name."
        )


def _write_out_options(make: Callable[..., object]) -> None:
    signature = inspect.signature(make, eval_str=True)
    named = list(signature.parameters.values())
    if not named or named[-1].kind is not inspect.Parameter.VAR_KEYWORD:
        return
    options = named.pop()
    known = inspect.signature(sharpness_aware).parameters
    names = [name for name, p in known.items() if p.kind is p.KEYWORD_ONLY]
    for annotation in get_args(options.annotation):
        if is_typeddict(annotation):
            names = list(annotation.__annotations__)
    taken = {parameter.name for parameter in named}
    named += [known[name] for name in names if name not in taken]
    function: Any = make
    function.__signature__ = signature.replace(parameters=named)


def methods_table() -> str:
    """The named methods as a Markdown table."""
    return _table(
        ["method", "", "equation", "equal to ρ", "gradients per step", "source"],
        (
            [name, m.title, m.equation, m.radius, m.cost, _link(m)]
            for name, m in METHODS.items()
        ),
    )


def further_methods_table() -> str:
    """The methods that are not transformations, as a Markdown table."""
    return _table(
        ["name", "", "equation", "goes into", "gradients per step", "source"],
        (
            [name, m.title, m.equation, m.use, m.cost, _link(m)]
            for name, m in FURTHER_METHODS.items()
        ),
    )


def _link(method: Method | FurtherMethod) -> str:
    return f"[{method.source}]({method.url})" if method.url else method.source


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    cells = [[f"`{name}`", *rest] for name, *rest in rows]
    return "\n".join(_line(row) for row in [header, ["---"] * len(header), *cells])


def _line(cells: list[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"
