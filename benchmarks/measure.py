"""What benchmarks share: programs timed in turn, and compared as ratios."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Program(NamedTuple):
    """A compiled program with its arguments, and what its compilation took."""

    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    flops: float
    temporary_bytes: int
    compile_seconds: float


def compile_program(function: Callable[..., Any], *arguments: Any) -> Program:
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return Program(
        compiled,
        arguments,
        compiled.cost_analysis()["flops"],
        memory.temp_size_in_bytes if memory else 0,
        seconds,
    )


def time_in_turn(programs: dict[str, Program], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round; a round runs every program once."""
    for program in programs.values():  # the first run of a program is not like the next
        jax.block_until_ready(program.run(*program.arguments))
    times = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program.run(*program.arguments))
            times[name].append(time.perf_counter() - start)
    return times


def print_ratios(programs: dict[str, Program], rounds: int) -> None:
    """A table of all programs over the first of them.

    Times are medians of the ratios of one round, with the range that holds half of
    them: ratios hold where single times do not, on machines that are shared and noisy.
    """
    times = time_in_turn(programs, rounds)
    first, reference = next(iter(programs.items()))
    width = max(map(len, programs))
    print(
        f"{'over ' + first:{width}} {'time':>24} {'flops':>7} {'memory':>7} "
        f"{'compile':>8}"
    )
    for name, program in programs.items():
        ratios = [a / b for a, b in zip(times[name], times[first], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        spread = f"{middle:.3f} ({low:.3f} to {high:.3f})"
        flops = program.flops / reference.flops
        memory = program.temporary_bytes / max(reference.temporary_bytes, 1)
        seconds = program.compile_seconds / reference.compile_seconds
        print(f"{name:{width}} {spread:>24} {flops:7.3f} {memory:7.3f} {seconds:8.2f}")
