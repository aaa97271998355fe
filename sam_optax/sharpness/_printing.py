"""Results as text that fits a screen: few numbers are shown, many are summarised."""

import textwrap
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.core import Tracer

WIDTH = 80
_SHOWN = 6  # the most numbers of an array that are shown one by one


def describe(name: str, fields: Mapping[str, Any]) -> str:
    """`name(field=value, ...)`, on one line, or with a field on each line."""
    texts = [f"{field}={summary(value)}" for field, value in fields.items()]
    line = f"{name}({', '.join(texts)})"
    if len(line) <= WIDTH:
        return line
    shortened = [
        textwrap.shorten(text, WIDTH - 3, placeholder=" ...") for text in texts
    ]
    return f"{name}(\n" + "".join(f"  {text},\n" for text in shortened) + ")"


def summary(value: Any) -> str:
    """An array or a tree of arrays in a few words."""
    leaves = jax.tree.leaves(value)
    if not all(hasattr(leaf, "dtype") for leaf in leaves) or not leaves:
        return str(value)
    if len(leaves) == 1 and value is leaves[0]:
        return _summary_of_array(value)
    arrays = "1 array" if len(leaves) == 1 else f"{len(leaves)} arrays"
    return f"<{arrays}, {optax.tree.size(value)} numbers>"


def _summary_of_array(array: Any) -> str:
    kind = f"{array.dtype}[{','.join(map(str, np.shape(array)))}]"
    if isinstance(array, Tracer) or not getattr(array, "is_fully_addressable", True):
        return f"<{kind}>"
    values = np.asarray(array).astype(np.float64)
    if values.ndim == 0:
        return number(values)
    if values.ndim == 1 and values.size <= _SHOWN:
        return f"[{' '.join(map(number, values))}]"
    if values.size == 0:
        return f"<{kind}>"
    return f"<{kind} from {number(values.min())} to {number(values.max())}>"


def number(value: Any, digits: int = 5) -> str:
    return f"{float(value):.{digits}g}"


def table(cells: list[list[str]]) -> str:
    """Aligned columns; those that do not fit beside each other come below.

    The first row and the first column are names. They are repeated in each block.
    """
    columns = [_aligned(column) for column in zip(*cells, strict=True)]
    names, columns = columns[0], columns[1:]
    blocks, room = [], 0
    for column in columns:
        needed = 2 + len(column[0])
        if not blocks or needed > room:
            blocks.append([names])
            room = WIDTH - len(names[0])
        blocks[-1].append(column)
        room -= needed
    lines = [
        "\n".join("  ".join(row).rstrip() for row in zip(*block, strict=True))
        for block in blocks
    ]
    return "\n\n".join(lines)


def _aligned(column: Any) -> list[str]:
    """The cells of a column, as wide as the widest: names left, the others right."""
    width = max(map(len, column))
    is_names = column[0] == ""
    return [cell.ljust(width) if is_names else cell.rjust(width) for cell in column]
