"""The layout of the package: which part may import which."""

import ast
import pathlib

import sam_optax

PACKAGE = pathlib.Path(sam_optax.__file__).parent

# From the ground up. A module imports from its own floor and from those below it.
FLOORS = [
    {"_tree", "_sharding", "_checks", "_random", "_hyperparameters", "_parts"},
    {"_masks", "_rounding"},
    {"_step"},
    {"_doors", "_recorder", "sharpness"},
    {"methods", "nnx", "plot"},
    {"ascents", "descents", "cadences", "data"},
    {"__init__"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imports_by_module():
    """Module name -> the modules of the package that it imports."""
    graph = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts)
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found = [f"{node.module}.{alias.name}" for alias in node.names]
                found.append(node.module)
            else:
                continue
            graph[name] |= {x for x in found if x.startswith("sam_optax.")}
    return {
        name: {x for x in found if x in graph or f"{x}.__init__" in graph}
        for name, found in graph.items()
    }


def room_of(module):
    return module.split(".")[1]


def test_no_module_imports_from_a_floor_above():
    graph = imports_by_module()
    assert {room_of(name) for name in graph} == set(FLOOR_OF)
    upwards = [
        f"{name} imports {found}"
        for name, imported in graph.items()
        for found in imported
        if FLOOR_OF[room_of(found)] > FLOOR_OF[room_of(name)]
    ]
    assert upwards == []


def test_no_modules_import_each_other_in_a_circle():
    graph = imports_by_module()
    done, open_path = set(), []

    def visit(name):
        assert name not in open_path, " > ".join([*open_path, name])
        if name in done:
            return
        open_path.append(name)
        for found in graph.get(name, graph.get(f"{name}.__init__", ())):
            if f"{found}.__init__" != name:  # a package names its own modules
                visit(found if found in graph else f"{found}.__init__")
        open_path.pop()
        done.add(name)

    for name in graph:
        visit(name)


def test_the_core_needs_jax_and_optax_only():
    """Flax stands in `nnx`, matplotlib in `plot` and matfree in `sharpness`."""
    extras = {"nnx", "plot", "sharpness"}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if room in extras:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            for name in names:
                assert name.split(".")[0] not in ("flax", "matplotlib", "matfree"), path
