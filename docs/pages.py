"What pages there are, in which order, and the pages that list others."
import ast
import re
from pathlib import Path

import nbformat
from notebooks import NBS, PAGES, ROOT, relinked, rooms_of, wings

# folder of nbs/ → title, summary, and the pages that come first; others follow by name
SECTIONS = {
    "tutorials": ("Tutorials", "Do it once, from the first line to a result",
                  ["needs", "explore", "pictures", "digits", "your_pipeline", "image_folder", "route", "paper_figure",
                   "three_pipelines", "latent_pipeline", "batch_runs", "cluster", "digits_base"]),
    "concepts": ("Concepts", "What the methods do, with the equations and drawings of what really happens",
                 ["words", "timesteps_as_tasks", "dmp", "dtr", "learned_mask", "switch", "tlora", "losses", "sampling",
                  "measuring"]),
    "howto": ("How-to", "One task a page, for when you know what you want",
              ["troubleshooting", "patches", "sizes", "method", "gate", "backbone", "objective", "metrics", "text",
               "training_loop", "latents", "run_folder", "resume", "trust", "several_gpus", "completion", "cite"]),
    "runs": ("Run notebooks", "Parameterized notebooks for papermill: from a command line, in batches, on a cluster",
             ["pretrain", "patch", "route", "sample", "evaluate", "gates", "needs", "routing", "affinity", "compare",
              "report"]),
}
SINGLE = ["results", "coming_from_papers"]   # notebooks of nbs/ that are pages of their own


def notebooks() -> list[Path]:
    found = [p for p in NBS.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(NBS).parts)]
    return sorted(p for p in found if p != NBS / "index.ipynb")


def head(path: Path) -> tuple[str, str]:
    "Title and summary of a processed notebook: its H1, and the quotation or first sentence after it."
    text = next(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown")
    title = re.search(r"^# (.+)$", text, re.M)
    if not title: raise SystemExit(f"error: {path} does not begin with a title, # …")
    quoted = re.search(r"^> (.+)$", text, re.M)
    rest = text[title.end():].strip()
    return (title[1].strip(),
            quoted[1].strip() if quoted else re.split(r"(?<=[.:])\s", rest, maxsplit=1)[0].rstrip(":") if rest else "")


def listing(proc: Path, docs: list[str], below: str) -> list[str]:
    "A table of pages with what each is about, and the toctree of them."
    out = [":::{div} pages", ""]
    for doc in docs:
        title, summary = head(proc / below / f"{doc}.ipynb")
        out += [f"[{doc if below == '.' else title}]({doc}.ipynb)", f": {summary}", ""]
    return [*out, ":::", "", "```{toctree}", ":hidden:", "", *(f"{d} <{d}>" if below == "." else d for d in docs),
            "```", ""]


def source_page(proc: Path) -> list[str]:
    "The wings of the package, each with its notebooks in reading order."
    out = ["# Source notebooks", "", "> The package is written as notebooks: each explains, exports and shows one "
           "module. A wing imports only from the wings above it", ""]
    pages = []
    for wing in wings():
        init = ROOT / "dmp_wb" / wing / "__init__.py"
        about = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) if init.exists() else None
        out += [f"## {wing}", "", *([about, ""] if about else []), ":::{div} pages", ""]
        for path in rooms_of(wing).values():
            page = path.relative_to(NBS)
            title, summary = head(proc / page)
            out += [f"[{title}]({page.as_posix()})", f": {summary}", ""]
            pages.append(page.with_suffix("").as_posix())
        out += [":::", ""]
    return [*out, "```{toctree}", ":hidden:", "", *pages, "```", ""]


def write(proc: Path):
    "Index pages, the changelog, the page of data sets, and the landing page."
    top = []
    for folder, (title, summary, first) in SECTIONS.items():
        there = sorted(p.stem for p in (proc / folder).glob("*.ipynb"))
        if not there: continue
        ordered = [d for d in first if d in there] + [d for d in there if d not in first]
        (proc / folder / "index.md").write_text(
            "\n".join([f"# {title}", "", f"> {summary}", "", *listing(proc, ordered, folder)]), encoding="utf-8")
        if folder != "runs": top.append(f"{folder}/index")
    (proc / "source.md").write_text("\n".join(source_page(proc)), encoding="utf-8")
    (proc / "reference").mkdir(exist_ok=True)
    (proc / "reference" / "index.md").write_text("\n".join(
        ["# Reference", "", "> Every name, command and key", "", ":::{div} pages", "",
         "[Python](python.md)", ": What `import dmp_wb as wb` gives: signatures, parameters, returns, errors", "",
         "[Command line](commands.md)", ": The commands of `dmp-wb` with their options", "",
         "[Experiment keys](keys.md)", ": Every key of an experiment file and its default", "",
         "[Run notebooks](../runs/index.md)", ": What papermill executes: parameters, and what each run leaves", "",
         "[Data sets](../data.md)", ": How to get each, size, licence, the line that uses it", "",
         "[Source notebooks](../source.md)", ": The package itself, to read", "", ":::", "",
         "```{toctree}", ":hidden:", "", "python", "commands", "keys", "../runs/index", "../data", "../source", "```",
         ""]), encoding="utf-8")
    for name in ("CHANGELOG.md", "CONTRIBUTING.md", "data/README.md"):
        (proc / PAGES[name]).write_text(relinked((ROOT / name).read_text(encoding="utf-8"), Path(name)),
                                        encoding="utf-8")
    single = [s for s in SINGLE if (proc / f"{s}.ipynb").exists()]
    tree = [*[s for s in ("start",) if (proc / f"{s}.ipynb").exists()], *top, "reference/index", *single,
            "contributing", "changelog"]
    landing = (Path(__file__).parent / "index.md").read_text(encoding="utf-8")
    (proc / "index.md").write_text(landing + "\n" + "\n".join(["```{toctree}", ":hidden:", "", *tree, "```", ""]),
                                   encoding="utf-8")
