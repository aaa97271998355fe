"""Shared by the benchmarks: times programs in turn, and compares them as ratios."""

import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Program(NamedTuple):
    """A compiled program with its arguments, and what it costs.

    `flops`, `bytes_accessed` and `temporary_bytes` are the compiler's own numbers; its
    count of bytes includes every branch. `bytes_moved` is what the instructions outside
    of branches read and write.
    """

    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    flops: float
    bytes_accessed: float
    bytes_moved: float
    temporary_bytes: int
    compile_seconds: float


def compile_program(
    function: Callable[..., Any],
    *arguments: Any,
    donate: Sequence[int] = (),
    times: int = 1,
) -> Program:
    """Compiles a function several times, never from a cache, and keeps the fastest."""

    def compile_once():
        def fresh(*arguments):
            return function(*arguments)

        start = time.perf_counter()
        # keep_unused, because a donated argument gives its memory to a result even if
        # the function does not use it.
        jitted = jax.jit(fresh, donate_argnums=donate, keep_unused=True)
        compiled = jitted.lower(*arguments).compile()
        return time.perf_counter() - start, compiled

    seconds, compiled = min((compile_once() for _ in range(times)), key=lambda t: t[0])
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return Program(
        compiled,
        arguments,
        cost["flops"],
        cost["bytes accessed"],
        bytes_moved(compiled.as_text()),
        memory.temp_size_in_bytes if memory else 0,
        seconds,
    )


_INSTRUCTION = re.compile(r"%?([\w.-]+) = (.*?) ([\w-]+)\((.*?)\)(?:,|$)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_NOTHING_MOVES = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
    *("conditional", "iota"),
}


def bytes_moved(program: str) -> float:
    """What the instructions of an optimised program read and write, in bytes.

    Only the entry computation counts. So branches count as nothing, which is right if
    they are not taken, and too little if they are.
    """
    entry = program[program.index("\nENTRY") :]
    sizes: dict[str, float] = {}
    moved = 0.0
    for line in entry[: entry.index("\n}")].splitlines()[1:]:
        match = _INSTRUCTION.search(line)
        if not match:
            continue
        name, shape, operation, operands = match.groups()
        sizes[name] = sum(_size(*array) for array in _ARRAY.findall(shape))
        if operation not in _NOTHING_MOVES:
            read = re.findall(r"%?([\w.-]+)", operands)
            moved += sizes[name] + sum(sizes.get(operand, 0) for operand in read)
    return moved


def _size(dtype: str, shape: str) -> float:
    bits = re.search(r"\d+", dtype)
    each = int(bits.group()) / 8 if bits else 1  # a pred (a bool) takes a byte
    return each * math.prod(int(n) for n in shape.split(",") if n)


def time_in_turn(
    calls: dict[str, Callable[[], Any]],
    rounds: int,
    tell: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """The seconds that each call takes, for every round. `tell` is called after each.

    A round makes every call twice in a row, and times the second. In training too, a
    step follows itself. A different call before it would leave other data in the
    caches, and other threads that still spin.
    """
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            jax.block_until_ready(call())
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
        tell()
    return times


def bandwidth(size: int) -> float:
    """Bytes per second that SGD reads and writes, on one float32 array of this size.

    Measured in the fastest of three runs. Each runs many steps in one program, so that
    calls from Python do not count.
    """
    steps = max(4, 2**27 // size)

    def descend(w, g):
        return jax.lax.fori_loop(0, steps, lambda _, w: w - 0.1 * g, w)

    w, g = jnp.zeros(size), jnp.ones(size)
    run = jax.jit(descend, donate_argnums=0).lower(w, g).compile()
    w = jax.block_until_ready(run(w, g))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        w = jax.block_until_ready(run(w, g))
        seconds.append(time.perf_counter() - start)
    return 3 * steps * g.nbytes / min(seconds)


class Spread(NamedTuple):
    """A median, and the range that holds half of the values."""

    low: float
    median: float
    high: float

    def __str__(self):
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def ratios(times: Iterable[float], reference: Iterable[float]) -> Spread:
    """The spread of the ratio of two times of the same round.

    On a shared, noisy machine these ratios are steadier than the times themselves.
    """
    pairs = [a / b for a, b in zip(times, reference, strict=True)]
    return Spread(*statistics.quantiles(pairs, n=4, method="inclusive"))


def print_ratios(programs: dict[str, Program], rounds: int, carried: int = 0) -> None:
    """Prints a table of what all programs cost, divided by what the first one costs.

    The first `carried` results of each call become the first arguments of the next, so
    the programs may donate these arguments.
    """

    def make_call(program):
        arguments = list(program.arguments)

        def call():
            results = program.run(*arguments)
            arguments[:carried] = results[:carried]
            return results

        return call

    calls = {name: make_call(program) for name, program in programs.items()}
    times = time_in_turn(calls, rounds)
    first, reference = next(iter(programs.items()))
    width = max(map(len, programs))
    columns = "".join(f"{name:>8}" for name in ("flops", "moved", "memory", "compile"))
    print(f"{'over ' + first:{width}} {'time':>24}{columns}")
    for name, program in programs.items():
        spread = str(ratios(times[name], times[first]))
        flops = program.flops / reference.flops
        moved = program.bytes_moved / reference.bytes_moved
        memory = program.temporary_bytes / max(reference.temporary_bytes, 1)
        seconds = program.compile_seconds / reference.compile_seconds
        numbers = [flops, moved, memory, seconds]
        print(f"{name:{width}} {spread:>24}" + "".join(f"{x:8.3f}" for x in numbers))


def compact_json(content: Any, indent: str = "") -> str:
    """JSON with a line for each record that holds no others, and five digits a number.

    A measurement has no more digits than these, and a line for each step of a benchmark
    can be read and compared.
    """
    parts = content.values() if isinstance(content, dict) else content
    if not isinstance(content, (dict, list)) or not any(
        isinstance(part, (dict, list)) for part in parts
    ):
        return json.dumps(_rounded(content))
    deeper = indent + " "
    if isinstance(content, dict):
        lines = [
            f"{deeper}{json.dumps(key)}: {compact_json(part, deeper)}"
            for key, part in content.items()
        ]
    else:
        lines = [f"{deeper}{compact_json(part, deeper)}" for part in content]
    left, right = "{}" if isinstance(content, dict) else "[]"
    return "\n".join([left, ",\n".join(lines), indent + right])


def _rounded(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _rounded(part) for key, part in content.items()}
    if isinstance(content, list):
        return [_rounded(part) for part in content]
    return float(f"{content:.5g}") if isinstance(content, float) else content
