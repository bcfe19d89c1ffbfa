"""Imports point one way, and only the engine knows vLLM's internals.

Imports in functions and under ``TYPE_CHECKING`` count like any other: a dependency that comes late, or that is only
written down, is one too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

#: Parts of the package from the bottom to the top, and which of those above them in this list each may import besides
#: itself. A part is a module, or a package with all there is in it; a module belongs to the longest name that fits.
MAY_IMPORT = {
    "kernels": "",
    "options": "",
    "config": "kernels options",
    "results": "",
    "prompts": "options config",
    "model_options": "options config",
    "resampling": "kernels options config",
    "smc": "kernels options config resampling",
    "bounds": "options config resampling smc",
    "twist": "kernels options config",
    "potentials": "options config prompts model_options",
    "objectives": "options config resampling",
    "engine": "kernels options config results twist potentials",
    "engine.v1": "kernels options config results twist potentials engine",
    "engine.v2": "kernels options config results twist potentials engine",
    "_import_hook": "engine",
    "activation": "_import_hook",
    "training": "kernels options config results prompts model_options resampling bounds twist potentials objectives",
    "evaluation": "kernels options config results prompts model_options resampling bounds twist potentials",
    "cli": "options config results prompts model_options resampling potentials training evaluation",
    "": "config results twist potentials _import_hook training",
}
#: Parts that may import all of vLLM, and parts that may import what it offers everybody, in functions; others, nothing.
INSIDE_VLLM = ("engine", "engine.v1", "engine.v2")
USES_VLLM = ("evaluation", "cli")
PUBLIC = ("vllm", "vllm.LLM", "vllm.SamplingParams")
#: Modules that may import more than their parts, and why.
MORE = {
    "training.samplers.vllm": {"vllm": "an engine whose head changes while it runs"},
    "evaluation.evaluator": {
        "vllm.platforms.current_platform": "a fault of vLLM's on a CPU",
        "engine.admission.read_config": "whether the engine's head reads a condition",
    },
}


def within(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.") or not parent


def part_of(module: str) -> str | None:
    """Return the part that a module of the package, or a name in it, belongs to; None if no rule names it."""
    if not module:
        return ""
    return max((part for part in MAY_IMPORT if part and within(module, part)), key=len, default=None)


def imports_of(module: str, tree: ast.AST, package: bool) -> Iterator[tuple[str, bool]]:
    """Yield every name that a module of the package imports, in full, and whether it does so in a function."""
    here = ["vllm_twist", *module.split(".")] if module else ["vllm_twist"]
    here = here if package else here[:-1]
    late = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            above = here[: len(here) + 1 - node.level] if node.level else []
            for alias in node.names:
                yield ".".join(filter(None, [*above, node.module, alias.name])).removesuffix(".*"), id(node) in late
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in late


def broken(module: str, source: str, package: bool = False) -> list[str]:
    """Return what is wrong with the imports of a module of the package, by its name there."""
    own = part_of(module)
    if own is None:
        return [f"no rule names {module}"]
    found = []
    for name, late in imports_of(module, ast.parse(source), package):
        if any(within(name.removeprefix("vllm_twist."), more) for more in MORE.get(module, ())):
            continue
        if within(name, "vllm_twist"):
            # The bare package has the version.
            part = part_of(name.removeprefix("vllm_twist").removeprefix("."))
            if part != own and part not in MAY_IMPORT[own].split() and name != "vllm_twist":
                found.append(f"{module} imports {name}")
        elif within(name, "vllm"):
            if own not in INSIDE_VLLM and not (own in USES_VLLM and name in PUBLIC):
                found.append(f"{module} imports {name}")
            elif own not in INSIDE_VLLM and not late:
                found.append(f"{module} imports {name} when it is imported")
    return found


def modules(root: Path) -> dict[str, Path]:
    """Return the file of each module of the package, by its name in it."""
    # ``kernels`` is a link.
    paths = {*(root / "vllm_twist").rglob("*.py"), *(root / "vllm_twist/kernels").glob("*.py")}
    names = {path: path.relative_to(root / "vllm_twist").with_suffix("").parts for path in paths}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in names.items()}


def test_imports_point_one_way(repo_root: Path):
    found = [
        problem
        for module, path in sorted(modules(repo_root).items())
        for problem in broken(module, path.read_text(), package=path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


def test_rules_point_one_way_and_name_what_there_is(repo_root: Path):
    """Each part may import only parts above it in the list, and each has a module."""
    parts = list(MAY_IMPORT)
    for part, allowed in MAY_IMPORT.items():
        assert set(allowed.split()) <= set(parts[: parts.index(part)]), part
    assert {part_of(module) for module in modules(repo_root)} == set(parts)
    assert {*INSIDE_VLLM, *USES_VLLM} <= set(parts) and set(MORE) <= set(modules(repo_root))


@pytest.mark.parametrize(
    "module, source, problem",
    [
        ("brand_new", "import math", "no rule names brand_new"),
        ("config", "from vllm_twist.twist import TwistHead", "config imports vllm_twist.twist.TwistHead"),
        ("resampling", "from vllm_twist import smc", "resampling imports vllm_twist.smc"),
        ("training.draws", "from ..cli import main", "training.draws imports vllm_twist.cli.main"),
        ("training.draws", "from vllm_twist import TwistHead", "training.draws imports vllm_twist.TwistHead"),
        ("training.draws", "def f():\n    import vllm", "training.draws imports vllm"),
        ("evaluation.report", "if TYPE_CHECKING:\n    import vllm.v1", "evaluation.report imports vllm.v1"),
        ("evaluation.report", "from vllm import LLM", "evaluation.report imports vllm.LLM when it is imported"),
        ("evaluation.report", "import vllm_twist.engine.v1", "evaluation.report imports vllm_twist.engine.v1"),
        ("engine.groups", "from vllm_twist import objectives", "engine.groups imports vllm_twist.objectives"),
        ("engine.v1.state", "from ..v2 import state", "engine.v1.state imports vllm_twist.engine.v2.state"),
        ("engine.worker", "from .v1 import runner", "engine.worker imports vllm_twist.engine.v1.runner"),
    ],
)  # fmt: skip
def test_the_check_sees(module: str, source: str, problem: str):
    assert broken(module, source) == [problem]


def test_what_is_allowed():
    assert not broken("training.samplers.vllm", "def f():\n    from vllm.platforms import current_platform")
    assert not broken("cli.eval", "def f():\n    import vllm, vllm_twist\n    from vllm import LLM")
    source = "from . import state\nfrom ..groups import Group\nimport vllm.v1.request"
    assert not broken("engine.v1", source, package=True)


def test_kernels_stand_alone(repo_root: Path):
    """Their folder is linked into the package: they know neither vLLM nor the package by its name."""
    for path in (repo_root / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith("vllm") for name in names), path.name


def test_bookkeeping_knows_neither_torch_nor_vllm(repo_root: Path):
    tree = ast.parse((repo_root / "vllm_twist/engine/groups.py").read_text())
    assert not any(name.split(".")[0] in ("torch", "vllm") for name, _ in imports_of("engine.groups", tree, False))
