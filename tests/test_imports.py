"""Who may know whom: no circles, type-only imports included, and `mustdrop` knows neither model nor evaluation."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def modules(*folders):
    """Name -> file of every module in some folders."""
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imported(name, source, package=False):
    """Every name that a module imports anywhere in it, `a.b.c` for c from a.b too, and modules asked for by a string.

    Imports in functions and under TYPE_CHECKING count as much as those at the top.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: -node.level + package or None] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            yield from (value.value for value in node.args[:1] if isinstance(value, ast.Constant))


def graph(known):
    """Name -> modules among the known ones that it imports; the name of a package stands for its `__init__`."""
    edges = {}
    for name, file in known.items():
        names = set(imported(name, file.read_text(), file.name == "__init__.py"))
        found = {one if one in known else one.rpartition(".")[0] for one in names}
        edges[name] = {one for one in found if one in known} - {name}
    return edges


@pytest.mark.parametrize(
    "folders", [["mustdrop"], ["llava/model"], ["llava", "mustdrop"], ["eval", "llava", "mustdrop"]]
)
def test_no_module_imports_itself_in_a_circle(folders):
    try:
        TopologicalSorter(graph(modules(*folders))).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_mustdrop_knows_neither_the_model_nor_the_evaluation():
    for name, file in modules("mustdrop").items():
        foreign = {one for one in imported(name, file.read_text()) if one.split(".")[0] in ("llava", "eval")}
        assert not foreign, f"{name} imports {foreign}"


def test_llava_asks_for_everything_at_the_hooks():
    for name, file in modules("llava").items():
        starts = name.startswith("llava.serve.")  # what people start reads their settings, as they would
        for one in imported(name, file.read_text()):
            known = one.startswith("mustdrop.hooks.") or starts
            assert not one.startswith("mustdrop") or known, f"{name} imports {one}"
            assert one.split(".")[0] != "eval", f"{name} imports {one}"


@pytest.mark.parametrize(
    "text, found",
    [
        ("from a import b", {"a.b"}),
        ("from . import b", {"p.q.b"}),
        ("from ..x import b", {"p.x.b"}),
        ("def f():\n    import a.b", {"a.b"}),
        ("if TYPE_CHECKING:\n    from a.b import C", {"a.b.C"}),
        ("importlib.import_module('a.b').main()", {"a.b"}),
    ],
)
def test_every_kind_of_import_is_seen(text, found):
    assert set(imported("p.q.r", text)) == found


def test_every_public_name_is_there():
    import mustdrop
    from mustdrop import hooks

    for package in (mustdrop, hooks):
        assert all(getattr(package, name) is not None for name in package.__all__)
