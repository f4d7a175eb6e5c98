"""What MkDocs does beyond its plugins when it builds the site."""

import base64
import hashlib
import re
import tempfile
from html import unescape
from pathlib import Path

import jupytext
import nbclient
from latex2mathml.converter import convert
from mkdocs.structure.files import File
from nbconvert import MarkdownExporter


_root = Path(__file__).parent.parent
_tutorial = re.compile(r"(tutorials|explanation)/\w+\.py$")
_others = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/**/*.md", "benchmarks/**/*.png")


def on_files(files, config):
    """Add pages and pictures from outside `docs/`, and what the tutorials show."""
    for pattern in _others:
        for path in _root.glob(pattern):
            name = path.relative_to(_root).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    for file in [file for file in files if _tutorial.match(file.src_uri)]:
        files.remove(file)
        name = file.src_uri.replace(".py", ".md")
        files.append(File.generated(config, name, content=_executed(file.abs_src_path)))
    return files


def _executed(path):
    """A tutorial as Markdown, with its output. Kept until the script changes."""
    script = Path(path).read_text()
    kept = _root / ".cache" / f"{hashlib.sha256(script.encode()).hexdigest()}.md"
    if not kept.exists():
        notebook = jupytext.reads(script, fmt="py:percent")
        _execute(notebook)
        markdown, resources = MarkdownExporter().from_notebook_node(notebook)
        for name, picture in resources["outputs"].items():
            data = base64.b64encode(picture).decode()
            markdown = markdown.replace(f"({name})", f"(data:image/png;base64,{data})")
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(markdown)
    return kept.read_text()


def _execute(notebook):
    # Elsewhere, as it may write files.
    with tempfile.TemporaryDirectory() as directory:
        resources = {"metadata": {"path": directory}}
        client = nbclient.NotebookClient(notebook, timeout=600, resources=resources)
        manager = client.create_kernel_manager()
        # Sockets in this directory; no ports are opened.
        manager.transport, manager.ip = "ipc", f"{directory}/kernel"
        client.execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "Warning: " in output.get("text", ""):
                raise ValueError(f"A tutorial warns: {output['text']}")


def on_page_markdown(markdown, page, **_):
    """Links between files of the repository become links between pages."""
    script = r"(\]\([\w./]*(?:tutorials|explanation)/\w+)\.py\)"
    markdown = re.sub(script, r"\1.md)", markdown)
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
