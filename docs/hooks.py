"""For mkdocs: the site has what lies beside docs/ too. Notebooks become pages, and links lead to the copies."""

import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
COPIED = ["CHANGELOG.md", "examples/*.md", "examples/*.py", "examples/results/**/*.md", "examples/results/**/*.png"]
COPIED += ["benchmarks/results/*.md"]


def on_files(files, config):
    for path in sorted(path for pattern in COPIED for path in ROOT.glob(pattern)):
        source = path.relative_to(ROOT).as_posix()
        files.append(File(source, str(ROOT), config.site_dir, config.use_directory_urls))
    for path in sorted(ROOT.glob("examples/*.ipynb")):
        resources = {"unique_key": path.stem, "output_files_dir": path.stem}
        page, resources = MarkdownExporter().from_filename(str(path), resources)
        for name, content in {f"{path.name[:-6]}.md": page, **resources["outputs"]}.items():
            files.append(File.generated(config, f"examples/{name}", content=content))
    return files


def on_page_markdown(markdown, **_):
    markdown = re.sub(r"\]\(((?:\.\./)*)\.\./(CHANGELOG|examples|benchmarks)", r"](\1\2", markdown)
    return markdown.replace(".ipynb)", ".md)")


class Docstrings(griffe.Extension):
    """Sphinx's roles, and sections of one example, in the words of mkdocstrings."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            text = re.sub(r":(?:class|func|meth|mod|attr):`~?([^`]+)`", r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
