"""Breaks the library on purpose, one place at a time, and shows what no test notices.

    pip install cosmic-ray
    python tests/mutants.py sam_optax/_tree.py --tests tests/test_tree.py --sample 40

Run it from the repository. Cosmic Ray (https://cosmic-ray.readthedocs.io) makes the
mutants of the modules or folders that are named, with three more operators below. They
are applied in copies, where the tests run until the first that fails. Of the mutants of
one place, the seed chooses one. What survives is a line that nothing tests, or an
equivalent mutant, such as `x - 0` for `x + 0`.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import difflib
import importlib
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time

import parso
import pytest
from cosmic_ray import mutating, plugins, work_item
from cosmic_ray.commands import init
from cosmic_ray.modules import find_modules
from cosmic_ray.operators.operator import Operator
from cosmic_ray.work_db import use_db

# Of what these hold, tests need not notice a change. `tfpdef` is a typed argument.
IGNORED = ("raise_stmt", "assert_stmt", "annassign", "tfpdef", "import_from")


def names(node) -> set[str]:
    """Returns the names that stand in a part of the code."""
    if node.type == "name":
        return {node.value}
    return set().union(*map(names, getattr(node, "children", ())))


class Replace(Operator):
    """Puts a text in the place of a part of the code."""

    def mutate(self, node, index):
        prefix = node.get_first_leaf().prefix
        return parso.python.tree.Name(self.text, node.start_pos, prefix)

    @classmethod
    def examples(cls):
        return ()


class SkipStatement(Replace):
    """Leaves out an assignment that changes what its right-hand side reads."""

    text = "pass"

    def mutation_positions(self, node):
        if node.type == "expr_stmt":
            targets, sources = map(names, (node.children[0], node.children[-1]))
            is_augmented = getattr(node.children[1], "value", "=") != "="
            if targets & sources or is_augmented:
                yield node.start_pos, node.end_pos


class RemoveKeyword(Replace):
    """Leaves out a keyword argument of a call."""

    text = "**{}"  # so that the commas around it may stay

    def mutation_positions(self, node):
        if node.type == "argument" and node.children[1] == "=":
            yield node.start_pos, node.end_pos


class SwapArguments(Replace):
    """Exchanges the last two positional arguments of a call."""

    def mutation_positions(self, node):
        if node.type == "arglist" and len(self.positional(node)) > 1:
            yield node.start_pos, node.end_pos

    def positional(self, node):
        return [x for x in node.children if x.type not in ("argument", "operator")]

    def mutate(self, node, index):
        x, y = self.positional(node)[-2:]
        i, j = node.children.index(x), node.children.index(y)
        node.children[i], node.children[j] = y, x
        x, y = x.get_first_leaf(), y.get_first_leaf()
        x.prefix, y.prefix = y.prefix, x.prefix  # the spaces stay where they are
        return node


OPERATORS = {cls.__name__: cls for cls in (SkipStatement, RemoveKeyword, SwapArguments)}
plugins.OPERATOR_PROVIDERS["own"] = OPERATORS


def is_ignored(leaf) -> bool:
    """Whether a place is in an annotation, a message or the like."""
    while leaf.parent is not None:
        leaf, child = leaf.parent, leaf
        if leaf.type in IGNORED or (
            leaf.type == "funcdef" and leaf.annotation is child
        ):
            return True
    return False


def mutants(paths: list[pathlib.Path], seed: int) -> list[work_item.MutationSpec]:
    """Returns one mutant of each place of the modules."""
    with use_db(":memory:") as database:
        init(find_modules(paths), database, {})
        specs = [item.mutations[0] for item in database.work_items]
    trees = {path: parso.parse(path.read_text()) for path in find_modules(paths)}
    places = collections.defaultdict(list)
    for spec in specs:
        leaf = trees[spec.module_path].get_leaf_for_position(spec.start_pos)
        if not is_ignored(leaf):
            places[str(spec.module_path), spec.start_pos].append(spec)
    choose = random.Random(seed).choice
    return [choose(places[place]) for place in sorted(places)]


def enter_copy(root: str, folder: str) -> None:
    """Makes a copy of the repository, goes there, and imports what tests need."""
    copy = pathlib.Path(folder, f"copy-{os.getpid()}")
    left_out = shutil.ignore_patterns(".*", "__pycache__", "results", "build")
    shutil.copytree(root, copy, ignore=left_out)
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    os.environ["PYTHONPATH"] = str(copy)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/compiled")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    for package in ("jax.numpy", "optax", "flax.nnx", "flax.linen"):
        with contextlib.suppress(ImportError):
            importlib.import_module(package)


def run_tests(tests: list[str], limit: float) -> tuple[bool, str]:
    """Runs the tests in a fork, which need not import JAX again.

    A fork is safe as long as no device has started, and none has before the tests.

    Returns:
      Whether they fail, or take longer than the limit, and what they print.
    """
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            os.setsid()
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
            options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
            os._exit(int(pytest.main([*options, *tests])))
        end = time.perf_counter() + limit
        done, status = 0, 1
        while not done and time.perf_counter() < end:
            time.sleep(0.05)
            done, status = os.waitpid(child, os.WNOHANG)
        if not done:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
        output.seek(0)
        return status != 0, output.read()


def test(spec: work_item.MutationSpec, tests: list[str], limit: float):
    """Returns whether the tests fail with a mutant, and the change of the code."""
    operator = plugins.get_operator(spec.operator_name)(**spec.operator_args)
    with mutating.use_mutation(spec.module_path, operator, spec.occurrence) as codes:
        before, after = (code.splitlines() for code in codes)
        change = difflib.unified_diff(before, after, lineterm="", n=0)
        return run_tests(tests, limit)[0], list(change)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="+", type=pathlib.Path)
    parser.add_argument("--tests", nargs="+", required=True, help="arguments of pytest")
    parser.add_argument("--sample", type=int, help="how many mutants to try at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    specs = mutants(args.modules, args.seed)
    if args.sample and args.sample < len(specs):
        specs = random.Random(args.seed).sample(specs, args.sample)

    with tempfile.TemporaryDirectory() as folder:
        context, made_from = multiprocessing.get_context("spawn"), (os.getcwd(), folder)
        with concurrent.futures.ProcessPoolExecutor(
            args.jobs, context, enter_copy, made_from
        ) as pool:
            start = time.perf_counter()
            fails, output = pool.submit(run_tests, args.tests, 3600).result()
            if fails:
                raise SystemExit(f"the tests fail without a mutant:\n{output}")
            limit = 3 * (time.perf_counter() - start) + 30
            runs = [pool.submit(test, spec, args.tests, limit) for spec in specs]
            tried, killed = collections.Counter(), collections.Counter()
            for spec, run in zip(specs, runs, strict=True):
                is_killed, change = run.result()
                tried[spec.module_path] += 1
                killed[spec.module_path] += is_killed
                if not is_killed:
                    name = spec.operator_name.split("/")[-1]
                    print(f"SURVIVED {spec.module_path}:{spec.start_pos[0]} {name}")
                    print(*change[-2:], sep="\n", flush=True)
    for module, count in tried.items():
        print(f"{module}: {killed[module]} of {count} mutants killed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
