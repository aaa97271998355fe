"""Makes the docstrings of the library into valid reStructuredText.

The docstrings are written to be read in a terminal as well: a bar stands for an
absolute value there, and a star for a product. In reStructuredText both begin markup.
And a list may stand below its paragraph, indented; there it needs an empty line.
"""

import collections
import re
from typing import Any

# Inline code, inline roles and links, in which nothing is escaped.
CODE = re.compile(r"(``.+?``|`[^`]+`_{0,2})", re.DOTALL)
FIELD = type(collections.namedtuple("Named", "field").field)
MATH = re.compile(r"^\s*\.\. math::")


def prepare(lines: list[str]) -> list[str]:
    """The lines of a docstring as reStructuredText.

    The bars and stars of the prose are escaped; mathematics and doctests stay as they
    are. A list of differences gets an empty line before it, and loses its indent.
    """
    return _escape_prose(_set_lists_apart(lines))


def _set_lists_apart(lines: list[str]) -> list[str]:
    result: list[str] = []
    indent = 0  # of the list that this line is in
    for line in lines:
        starts = re.match(r"(\s+)1\. ", line)
        if starts and result and re.match(r"\S", result[-1]):
            indent = len(starts[1])
            result.append("")
        elif line.strip() and not line.startswith(" " * indent):
            indent = 0
        result.append(line[indent:])
    return result


def _escape_prose(lines: list[str]) -> list[str]:
    result, inside = [], None
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if inside is not None and line.strip() and indent <= inside:
            inside = None
        if inside is None and (MATH.match(line) or line.rstrip().endswith("::")):
            inside = indent
        is_code = inside is not None or line.lstrip().startswith((">>>", "..."))
        result.append(line if is_code else _escape(line))
    return result


def _escape(line: str) -> str:
    parts = CODE.split(line)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"(?<!\\)([|*])", r"\\\1", parts[i])
        # The two dashes of an option would become one long one.
        parts[i] = re.sub(r"(?<!\S)(--[\w-]+)", r"``\1``", parts[i])
    return "".join(parts)


def _process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]):
    lines[:] = prepare(lines)


def _skip(
    app: Any, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
    """Leaves out the fields of named tuples: the docstring of the class has them."""
    return True if isinstance(obj, FIELD) else None


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", _process, priority=400)
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True}
