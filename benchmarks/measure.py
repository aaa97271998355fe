"""What benchmarks share: programs timed in turn, and compared as ratios."""

import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Program(NamedTuple):
    """A compiled program with its arguments, and what the compiler says of it.

    `bytes_accessed` is the compiler's count, with every branch; `bytes_moved` is what
    the instructions outside of branches read and write.
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
    """Compiles anew, whatever was compiled before; the fastest of several counts."""

    def compile_once():
        def fresh(*arguments):
            return function(*arguments)

        start = time.perf_counter()
        # What is donated and not used gives its memory to a result.
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

    Of its entry alone: a branch that is not taken moves nothing, and one that is taken
    is not seen.
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
    each = int(bits.group()) / 8 if bits else 1  # a pred takes a byte
    return each * math.prod(int(n) for n in shape.split(",") if n)


def time_in_turn(
    calls: dict[str, Callable[[], Any]],
    rounds: int,
    tell: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each round; a round makes every call, and `tell` hears of it.

    Each is made twice and the second one counts: in a training a step follows itself,
    and not one that left other data in the caches, or other threads still spinning.
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
    """Bytes per second that SGD on one float32 array of this size reads and writes.

    Of the fastest of three runs of many steps, so that only the device counts.
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
    """Of the two times of one round: these hold where single times do not, on machines
    that are shared and noisy."""
    pairs = [a / b for a, b in zip(times, reference, strict=True)]
    return Spread(*statistics.quantiles(pairs, n=4, method="inclusive"))


def print_ratios(programs: dict[str, Program], rounds: int, carried: int = 0) -> None:
    """A table of all programs over the first of them.

    The first results of a call are the first arguments of the next, as many as are
    carried; they may be donated.
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
