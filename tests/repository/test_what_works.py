"""The table of what works where: every row says how, and names tests that pytest collects."""

import ast
import re
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parents[1]
TABLE = (TESTS.parent / "docs" / "what-works.md").read_text(encoding="utf-8")
NAMED = r"`(\w+/test_\w+\.py)::(test_\w+)`"


@cache
def functions(file: str) -> frozenset[str]:
    """At the level of the module: what lies within a class or another function is not collected under that name."""
    path = TESTS / file
    if not path.is_file():
        return frozenset()
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    return frozenset(node.name for node in nodes if isinstance(node, ast.FunctionDef))


def what_is_wrong(line: str) -> list[str]:
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    if len(cells) != 3:
        return [f"it has {len(cells)} cells"]
    what, how, shown_by = cells
    wrong = [] if what else ["it does not say what"]
    if not re.fullmatch(r"exact|refused|limit: .+", how):
        wrong.append(f"{how!r} is not exact, refused or 'limit: …'")
    tests = re.findall(NAMED, shown_by)
    if not tests or re.sub(NAMED, "", shown_by).strip(" ,"):
        wrong.append("the last cell is not a list of tests")
    return wrong + [f"{file} has no {name}" for file, name in tests if name not in functions(file)]


def test_every_row_says_how_and_names_tests_that_exist():
    rows = [line for line in TABLE.splitlines() if line.startswith("|") and not line.startswith(("|---", "| what |"))]
    assert len(rows) > 100
    bad = {row[2:80]: wrong for row in rows if (wrong := what_is_wrong(row))}
    assert not bad, "\n".join(f"{row}…: {'; '.join(wrong)}" for row, wrong in bad.items())
