"""Cheap checks that the repository is what its README, pyproject.toml and .ci/run say."""

import ast
import inspect
import itertools
import re
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
from torch import nn

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


def code_blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


# ---------------------------------------------------------------------- the package


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def running_nodes(tree):
    """All nodes but those of imports for type checkers, which do not run."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            yield node
            yield from running_nodes(node)


def imported_modules(path):
    """Modules of the package that this one imports, at its top or within a function."""
    names = {module_name(other) for other in FILES}
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    found = set()
    for node in running_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            parts = {f"{source}.{alias.name}" for alias in node.names} & names
            found |= parts or {source}
    return (found & names) - {module_name(path)}


def test_files_are_short_and_named_for_what_they_hold():
    assert FILES
    assert [path.name for path in FILES if len(path.read_text(encoding="utf-8").splitlines()) > 320] == []
    assert [path.name for path in FILES if path.stem in {"utils", "util", "helpers", "common", "misc"}] == []


def test_imports_run_in_one_direction():
    graph = {module_name(path): imported_modules(path) for path in FILES}
    assert "torch_dual_ticket.masks.seeded" in graph["torch_dual_ticket.prune"]
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_public_names_are_listed_and_documented():
    public = {
        name
        for name, value in vars(torch_dual_ticket).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(torch_dual_ticket.__all__)
    undocumented = [name for name in public if ">>> " not in (getattr(torch_dual_ticket, name).__doc__ or "")]
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
    commands = "\n".join(code_blocks("sh")).splitlines()
    (command,) = [line for line in commands if line.endswith("pytest -n auto")]
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
    ]


def test_both_commands_of_the_readme_set_up_the_same_way():
    quickstart, test = "\n".join(code_blocks("sh")).splitlines()
    assert quickstart.split(" && ")[:-1] == [part.replace("[test]", "[examples]") for part in test.split(" && ")[:-1]]


def test_python_of_the_readme_runs(tmp_path, monkeypatch):
    """In its order, as somebody would paste it into one session."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    session = {}
    for code in code_blocks("python"):
        exec(compile(code, "README.md", "exec"), session)


@pytest.mark.filterwarnings("ignore:the masked weights still held")  # three updates instead of ten thousand
def test_diff_of_the_readme_runs_with_and_without_its_added_lines():
    (diff,) = code_blocks("diff")
    lines = diff.splitlines()
    assert {line[:1] for line in lines} <= {"+", " ", ""}
    for code in ([line[1:] for line in lines], [line[1:] for line in lines if not line.startswith("+")]):
        model = nn.Linear(8, 4)
        loop = {
            "model": model,
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
            "loss_fn": nn.functional.cross_entropy,
            "loader": [(torch.randn(2, 8), torch.tensor([0, 1]))] * 3,
            "epochs": 1700,
        }
        exec(compile("\n".join(code), "README.md", "exec"), loop)
        if "rst" in loop:
            assert int((model.weight == 0).sum()) == round(0.9 * 32)
