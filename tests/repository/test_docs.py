"""What README and docs/ show runs, and what they link to exists."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- not run: ([^\n]+) -->\n)?^```(python|diff)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
ONE_SESSION = {"chosen-masks.md", "compare.md", "kept.md"}  # whose sections go on from those above
LINK = re.compile(r"\]\(([^)#\s]+)")


def sections():
    """What is under one heading of the second level: there, blocks follow one another as in one session."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for section in [text] if page.name in ONE_SESSION else re.split(r"^(?=## )", text, flags=re.MULTILINE):
            blocks = BLOCK.findall(section)
            assert len(blocks) == len(re.findall("```(?:python|diff)", section)), section
            if any(not reason for reason, _, _ in blocks):
                title = section.splitlines()[0].strip("# ")
                yield pytest.param(blocks, id=f"{page.relative_to(ROOT)}: {title}")


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        return self.fc(self.conv2(self.conv1(x).relu()).relu().mean((2, 3)))


def what_the_reader_has():
    """The names that blocks take for granted."""
    model = Classifier()
    data = torch.utils.data.TensorDataset(torch.randn(32, 1, 6, 6), torch.arange(32) % 10)
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    return {
        "torch": torch,
        "nn": nn,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "loss_fn": nn.functional.cross_entropy,
        "loader": loader,
        "validation": loader,
        "epochs": 15,
        "saved": None,
        "device": "cpu",
    }


@pytest.fixture(autouse=True)
def _few_updates(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the masked weights still held")
        warnings.filterwarnings("ignore", message=".*(dataloader' does not have many workers|LeafSpec|logger=False)")
        yield


@pytest.mark.parametrize("blocks", list(sections()))
def test_code_runs(blocks):
    session = what_the_reader_has()
    for reason, language, code in blocks:
        if language == "diff":
            lines = code.splitlines()
            assert {line[:1] for line in lines} <= {"+", " ", ""}
            exec("\n".join(line[1:] for line in lines if not line.startswith("+")), what_the_reader_has())
            code = re.sub(r"(\d+)00\b", r"\1", "\n".join(line[1:] for line in lines))  # a hundredth of the updates
        if not reason:
            exec(compile(code, "block", "exec"), session)
    if any(language == "diff" for _, language, _ in blocks):
        model = session["model"]
        zeros = [int((layer.weight == 0).sum()) for layer in (model.conv1, model.conv2, model.fc)]
        assert zeros == [0, round(0.9 * model.conv2.weight.numel()), 0]


def test_relative_links_lead_to_files():
    pages = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "examples/README.md", "examples/results/README.md"))]
    links = [(page, link) for page in pages for link in LINK.findall(page.read_text(encoding="utf-8"))]
    assert len(links) > 100
    broken = [f"{page.name}: {link}" for page, link in links if "://" not in link and not (page.parent / link).exists()]
    assert broken == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900
