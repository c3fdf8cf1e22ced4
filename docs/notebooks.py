"nbdev processors that make a notebook a page to read: they stand in for those that write for Quarto."
import ast
import json
import re
from pathlib import Path, PurePosixPath

from nbdev.process import Processor
from nbdev.processors import FilterDefaults, filter_stream_, hide_, hide_line, rm_header_dash, strip_ansi
from execnb.nbio import mk_cell

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
# files of the repository that are pages under another name
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "data/README.md": "data.md",
         "README.md": "index.md", "nbs/index.ipynb": "index.md"}
WINGS = ["core", "models", "methods", "diffusion", "tasks", "data", "config", "store", "training", "evaluation",
         "batch", "look", "cli"]
LONG = 30   # lines of exported code above which a cell starts folded
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")


def wings() -> list[str]:
    "The folders of nbs/source in the order in which they build on each other."
    there = {path.name for path in (NBS / "source").iterdir() if path.is_dir() and any(path.glob("*.ipynb"))}
    return [w for w in WINGS if w in there] + sorted(there - set(WINGS))


def rooms_of(wing: str) -> dict[str, Path]:
    "The modules of a wing, without `dmp_wb.`, and the notebook of each, in reading order."
    found = {}
    for path in sorted((NBS / "source" / wing).glob("[0-9][0-9]_*.ipynb")):
        exported = re.search(r"#\| ?default_exp ([\w.]+)", path.read_text(encoding="utf-8"))
        if exported: found[exported[1]] = path
    return found


def on_site(target: str, page: Path) -> str:
    "A link of a notebook or Markdown file as it is between pages. `page`: the file, from the root of the repository."
    if re.match(r"[a-z]+:|#", target): return target
    path, _, anchor = target.partition("#")
    there = Path(*_normal(page.parent / path))
    name = PAGES.get(there.as_posix())
    if name is None and there.parts[:1] == ("nbs",): name = there.relative_to("nbs").as_posix()
    if name is None:
        raise ValueError(
            f"{page} links {target}: no page of the site; give it one in docs/notebooks.py, or name it without a link")
    here = PAGES.get(page.as_posix()) or page.relative_to("nbs").as_posix()
    return "../" * (len(PurePosixPath(here).parts) - 1) + name + ("#" + anchor if anchor else "")


def _normal(path: Path) -> list[str]:
    parts: list[str] = []
    for part in path.parts: parts = parts[:-1] if part == ".." else [*parts, part]
    return parts


def relinked(text: str, page: Path) -> str:
    "Markdown with its links as they are between pages; code is left as it is."
    pieces = re.split(r"(```.*?```|`[^`\n]*`)", text, flags=re.S)
    return "".join(p if i % 2 else _LINK.sub(lambda m: m[1] + on_site(m[2], page) + m[3], p)
                   for i, p in enumerate(pieces))


def coloured(text: str) -> str:
    "A fence that names no language holds commands: bash, where Sphinx would take it for Python."
    lines, inside = text.split("\n"), False
    for i, line in enumerate(lines):
        if not line.lstrip().startswith("```"): continue
        if not inside and line.strip() == "```": lines[i] = line + "bash"
        inside = not inside
    return "\n".join(lines)


class for_reading(Processor):
    "Hidden cells go; exported ones stay, with an anchor for each name and a line that leads to its reference."
    module: str | None = None

    def cell(self, cell):
        directives = cell.directives_
        if cell.cell_type == "markdown": cell.source = coloured(relinked(cell.source, self.nb.path_))
        if cell.cell_type == "raw" or directives.keys() & {"hide", "default_exp"}:
            if "default_exp" in directives: self.module = directives["default_exp"][0]
            del cell["source"]
            return
        if cell.cell_type != "code": return
        shows = picture_text(cell.source)
        source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|")).strip("\n")
        if re.search(r"\b(nbdev_export|show_doc)\(", source) or not source: del cell["source"]; return
        cell.source = source
        cell.metadata = {"tags": list(cell.metadata.get("tags", [])),
                         **({"mystnb": {"image": {"alt": shows}}} if shows else {})}
        tags = cell.metadata["tags"]
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            for mime in ("application/vnd.jupyter.widget-view+json", "application/vnd.papermill.record+json",
                         "application/vnd.dmp-wb.progress+json"):
                data.pop(mime, None)
            if "text/markdown" in data:
                data["text/markdown"] = relinked("".join(data["text/markdown"]), self.nb.path_)
                data.pop("text/plain", None)
            if data.keys() & {"image/png", "image/svg+xml"}: data.pop("text/plain", None); data.pop("text/html", None)
        if directives.keys() & {"export", "exports", "exporti"}:
            tags.append("exported")
            if source.count("\n") >= LONG: tags.append("hide-input")
            cell.exports_ = [n for n in defined(source) if not n.startswith("_")]

    def end(self):
        self.nb.metadata.pop("widgets", None)
        self.nb.metadata.pop("dmp_wb", None)
        cells = []
        for cell in self.nb.cells:
            names = getattr(cell, "exports_", None)
            if names and self.module and "__" not in self.module:   # a command has no page in the reference
                anchors = "\n".join(f"({anchor(self.module, n)})=" for n in names)
                links = " ".join(f"{{py:obj}}`{n} <dmp_wb.{self.module}.{n}>`" for n in names)
                cells.append(mk_cell(f"{anchors}\n:::{{div}} reference-line\n{links}\n:::", "markdown"))
            cells.append(cell)
        self.nb.cells = cells


def to_download(path: Path) -> str:
    "A notebook as a reader takes it away: without outputs, and without the lines that are for the site."
    nb = json.loads(path.read_text(encoding="utf-8"))
    for cell in nb["cells"]:
        if cell["cell_type"] != "code": continue
        cell["outputs"], cell["execution_count"] = [], None
        cell["source"] = [line for line in cell["source"] if not line.startswith("#| fig-alt")]
    return json.dumps(nb, ensure_ascii=False) + "\n"


def with_download(page: str, name: str) -> str:
    "The HTML of a notebook's page with a link below its title to the notebook, which lies beside it."
    link = f'<p class="take"><a href="{name}" download="{name}">Download this notebook</a></p>'
    title = re.compile(r"</h1>\s*(?:<blockquote>.*?</blockquote>)?", re.S)
    return title.sub(lambda m: f"{m[0]}\n{link}\n", page, count=1)


def picture_text(source: str) -> str:
    "What a cell's pictures show, for those who do not see them: its line `#| fig-alt: …`."
    found = re.search(r"^#\| *fig-alt: *(.+?) *$", source, re.M)
    return found[1].strip("\"'") if found else ""


def defined(source: str) -> list[str]:
    "The names that a cell gives its module."
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef): names.append(node.name)
        for target in (node.targets if isinstance(node, ast.Assign)
                       else [node.target] if isinstance(node, ast.AnnAssign) else []):
            names += [n.id for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    return names


def anchor(module: str, name: str) -> str:
    "Of the cell that defines a name, in its notebook's page. Anchors know no case, and Sweep is not sweep."
    kind = "" if name.islower() else "-value" if name.isupper() else "-class"
    return f"source-{module}-{name}{kind}".lower().replace("_", "-").replace(".", "-")


class ForSite(FilterDefaults):
    "nbdev's filter with these processors, for the notebook at a path."
    def __init__(self, path: Path): self.path = path

    def __call__(self, nb):
        nb.path_ = self.path
        super().__call__(nb)
        nb.pop("path_", None)

    def base_procs(self): return [strip_ansi, hide_line, filter_stream_, rm_header_dash, hide_, for_reading]
