"""What MkDocs does beyond its plugins when it builds the site."""

import re
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File


_root = Path(__file__).parent.parent
_others = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/**/*.md", "benchmarks/**/*.png")


def on_files(files, config):
    """Add pages and pictures from outside `docs/`."""
    for pattern in _others:
        for path in _root.glob(pattern):
            name = path.relative_to(_root).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, **_):
    """Links between files of the repository become links between pages."""
    if page.file.src_uri.startswith("benchmarks/"):
        return markdown.replace("](../docs/", "](../")
    if "/" not in page.file.src_uri:
        markdown = markdown.replace("](../benchmarks/", "](benchmarks/")
        return markdown.replace("](docs/", "](")
    return markdown


_formula = re.compile(
    r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.DOTALL
)


def on_page_content(html, **_):
    """Mathematics becomes MathML, which needs no script in the browser."""
    return _formula.sub(_to_mathml, html)


def _to_mathml(match):
    inline, display = match[2], match[3]
    latex = unescape(display if inline is None else inline).strip()
    return convert(latex, display="block" if inline is None else "inline")
