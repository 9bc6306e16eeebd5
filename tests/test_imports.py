"""Who imports whom: no circle, neither between files nor between the rooms of the package."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import cggr_compile

ROOT = Path(cggr_compile.__file__).parent
# packages that import whatever files there are in them
TABLES = ("cggr_compile.scorings", "cggr_compile.selections")


def files():
    """Every module's file, by the module's name."""
    paths = [*ROOT.rglob("*.py"), *(ROOT / "passes").rglob("*.py")]  # rglob does not enter a symbolic link
    names = {".".join((ROOT.name, *path.relative_to(ROOT).with_suffix("").parts)): path for path in paths}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def imported(source, modules, deferred):
    """The ``modules`` that a text imports: as it is itself imported, or with ``deferred`` also in its functions.

    What is imported for type checkers alone does not count: it never runs.
    """
    found, open_nodes = set(), [ast.parse(source)]
    while open_nodes:
        node = open_nodes.pop()
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "the package has no relative imports"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in modules else node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            open_nodes.extend(node.orelse)
        elif deferred or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            open_nodes.extend(ast.iter_child_nodes(node))
    return found & modules


def graph(deferred):
    modules = files()
    names = frozenset(modules)
    imports = {name: imported(path.read_text(), names, deferred) for name, path in modules.items()}
    for table in TABLES:
        imports[table] |= {name for name in names if name.startswith(f"{table}.")}
    return imports


def room(module):
    """The folder a module lies in; None for the ground floor."""
    name = module.split(".")[1:2]
    return name[0] if name and (ROOT / name[0]).is_dir() else None


def between_rooms(imports):
    rooms = {}
    for module, others in imports.items():
        for other in others:
            if room(module) and room(other) and room(module) != room(other):
                rooms.setdefault(room(module), set()).add(room(other))
    return rooms


def circle(imports):
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return None


@pytest.mark.parametrize("deferred", [False, True])
def test_no_circle_between_files(deferred):
    imports = graph(deferred)
    assert len(imports) > 80 and sum(map(len, imports.values())) > 200
    assert circle(imports) is None


def test_no_circle_between_rooms():
    rooms = between_rooms(graph(deferred=True))
    assert circle(rooms) is None
    below = {name: others - {"compat"} for name, others in rooms.items()}
    assert below["lowerings"] == {"ops", "kernels"} and below["ops"] == {"kernels", "scorings"}
    assert below["selections"] == {"ops"} and not {"kernels", "scorings"} & {n for n, o in below.items() if o}
    assert "compat" not in rooms  # it knows PyTorch, and nothing of ours


def test_importing_the_package_imports_no_kernel():
    """They need Triton; what a kernel shares with the operators that do without is the one exception."""
    imports, seen, new = graph(deferred=False), set(), {"cggr_compile", "cggr_compile.lowerings"}
    while new:
        seen |= new
        new = set().union(*(imports[module] for module in new)) - seen
    assert {module for module in seen if room(module) == "kernels"} == {"cggr_compile.kernels.routing_gradient"}


def test_nothing_imports_an_integration():
    """They import the library that they are for."""
    imports = graph(deferred=True)
    inside = {module for module in imports if room(module) == "integrations"}
    assert len(inside) > 3
    assert not [module for module, others in imports.items() if module not in inside and others & inside]


def test_these_checks_can_fail():
    modules = frozenset({"a", "a.b", "a.c"})
    text = "import a.b\ndef f():\n    from a import c\nif TYPE_CHECKING:\n    import a\n"
    assert imported(text, modules, False) == {"a.b"} and imported(text, modules, True) == {"a.b", "a.c"}
    assert circle({"a.b": {"a.c"}, "a.c": {"a.b"}}) == ["a.b", "a.c", "a.b"]
    assert between_rooms({"cggr_compile.ops.moe": {"cggr_compile.kernels.moe"}}) == {"ops": {"kernels"}}
