"""The table of what works where: every row says how, and names tests that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "docs" / "what-works.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TABLE.splitlines()
    if line.startswith("|") and not line.startswith(("|---", "| what"))
]


def defined_tests(path: Path) -> set[str]:
    return {
        node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("row", ROWS, ids=[row[0][:60] for row in ROWS])
def test_every_row_says_how_and_names_tests_that_exist(row):
    what, how, shown_by = row
    assert what
    assert re.fullmatch(r"exact|refused|limit: .+", how), how
    named = re.findall(r"`(\w+/test_\w+\.py)::(test_\w+)`", shown_by)
    assert named
    assert re.sub(r"`\w+/test_\w+\.py::test_\w+`", "", shown_by).strip(" ,") == ""
    for file, name in named:
        assert name in defined_tests(ROOT / "tests" / file), f"{file} has no {name}"
