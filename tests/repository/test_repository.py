"""Cheap checks that the repository is what its README, pyproject.toml and .ci/run say."""

import ast
import itertools
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import torch_dual_ticket

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings the same under its old name
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "torch_dual_ticket"
FILES = sorted(PACKAGE.rglob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def shell_commands():
    return "".join(re.findall(r"^```sh\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)).splitlines()


# ---------------------------------------------------------------------- the package


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path):
    """Modules of the package that this one imports: at its top, within a function, or for type checkers alone."""
    names = {module_name(other) for other in FILES}
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            parts = {f"{source}.{alias.name}" for alias in node.names} & names
            found |= parts or {source}
    return (found & names) - {module_name(path)}


def test_files_are_named_for_what_they_hold():
    assert FILES
    assert [path.name for path in FILES if path.stem in {"utils", "util", "helpers", "common", "misc"}] == []


LAYERS = ["masks", "_tensors", "_engine", "_model", "prune", "_rst", "scheduler"]  # each may import those before it
SATELLITES = [
    "baselines",
    "callbacks",
    "deploy",
    "export",
    "kept",
    "report",
]  # and these all of them, but not one another


def room_of(module):
    return [*module.split("."), ""][1]


def test_imports_run_downwards():
    """Those for type checkers, too: what a file must know of another to be understood is a dependency."""
    graph = {module_name(path): imported_modules(path) for path in FILES}
    assert "torch_dual_ticket.masks.seeded" in graph["torch_dual_ticket.prune"]
    list(TopologicalSorter(graph).static_order())  # raises CycleError
    ranks = {name: index for index, name in enumerate(["_tables", *LAYERS])}
    upwards = []
    for module, imported in graph.items():
        mine = room_of(module)
        for theirs in {room_of(other) for other in imported} - {mine, ""}:
            downwards = theirs in ranks if mine in SATELLITES else ranks.get(theirs, 99) < ranks.get(mine, 99)
            if mine and not downwards:
                upwards.append((module, theirs))
    assert upwards == []


def test_few_modules_stand_directly_in_the_package():
    """What belongs together stands together, in a folder."""
    assert len([path for path in FILES if path.parent == PACKAGE]) <= 8


def test_satellites_are_imported_when_they_are_asked_for():
    code = (
        "import sys, torch_dual_ticket as t; assert not [m for m in sys.modules if m.endswith('.baselines')];"
        "assert callable(t.baselines.hold); print(dir(t))"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert ast.literal_eval(shown) == sorted([*torch_dual_ticket.__all__, *SATELLITES, "__version__"])
    with pytest.raises(AttributeError, match="has no attribute 'lost'"):
        torch_dual_ticket.lost  # noqa: B018


def test_public_names_are_documented():
    undocumented = [n for n in torch_dual_ticket.__all__ if ">>> " not in (getattr(torch_dual_ticket, n).__doc__ or "")]
    assert undocumented == []


def test_typed_marker_is_there():
    assert (PACKAGE / "py.typed").is_file()


# ---------------------------------------------------------------------- versions


def test_every_direct_dependency_is_pinned():
    """So a newcomer who installs with the constraints gets what was tested."""
    requirements = itertools.chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    direct = {re.match(r"[A-Za-z0-9_.-]+", requirement).group() for requirement in requirements} - {PROJECT["name"]}
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = set(re.findall(r"^([A-Za-z0-9_.-]+)==", constraints, flags=re.MULTILINE))
    assert pinned == direct


def test_core_needs_torch_alone():
    assert [re.match(r"\w+", requirement).group() for requirement in PROJECT["dependencies"]] == ["torch"]


# ---------------------------------------------------------------------- README and CI


def test_ci_runs_the_test_command_of_the_readme():
    """.ci/run cuts the command out of the README; a stand-in for the shell's eval shows what it would run."""
    (command,) = [line for line in shell_commands() if line.endswith("pytest -n auto")]
    set_up, _, test = command.rpartition(" && ")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").replace('eval "$1"', ":")
    shown = subprocess.run(
        ["bash", "-s", str(ROOT)],
        input=script.replace('cd "$(dirname "${BASH_SOURCE[0]}")/.."', 'cd "$1"'),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    ran = [line[2:] for line in shown.splitlines() if line.startswith("$ ")]
    environment = ran[0].split()[3]
    assert ran[0] == set_up.replace(".venv", environment)
    assert ran[-1] == test.replace(".venv", environment)
    assert [line.removeprefix(f"{environment}/bin/") for line in ran[1:-1]] == [
        "ruff check .",
        "ruff format --check .",
        "mypy",
        f"python -m build --outdir {environment}/dist .",
        f"twine check --strict {environment}/dist/*",
        f"mkdocs build --strict --quiet --site-dir {environment}/site",
    ]


def test_both_commands_of_the_readme_set_up_the_same_way():
    quickstart, test = shell_commands()
    assert quickstart.split(" && ")[:-1] == [part.replace("[test]", "[examples]") for part in test.split(" && ")[:-1]]
