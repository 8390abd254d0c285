"""The Python of docs/kept.md runs as it stands there."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "kept.md"


def test_python_of_the_page_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert blocks
    torch.manual_seed(0)
    session = {}
    for code in blocks:
        exec(compile(code, PAGE.name, "exec"), session)
