"What a page of the site promises, read from its notebook: pictures with words, lines that fit, a notebook to download."
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
pytest.importorskip("nbdev")
pytest.importorskip("pygments")
check = pytest.importorskip("check")
notebooks = pytest.importorskip("notebooks")

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
WIDTH = 96   # columns of code that a page shows without scrolling


def code_cells(path: Path):
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


def test_every_picture_says_in_words_what_it_shows():
    faults = []
    for path in NOTEBOOKS:
        for cell in code_cells(path):
            shown = any({"image/png", "image/svg+xml"} & o.get("data", {}).keys() for o in cell["outputs"])
            text = notebooks.picture_text("".join(cell["source"]))
            if (shown or text) and not check.says_something(text, "x.png"):
                faults.append(f"{path.relative_to(ROOT)}, cell {cell['id']}: give it a line #| fig-alt: …")
    assert not faults, "\n".join(faults)


def test_what_says_nothing_is_found():
    assert not check.says_something("", "a.png") and not check.says_something("gates", "a.png")
    assert not check.says_something("../_images/a.png of b", "../_images/a.png")
    assert not check.says_something("see 9fcdbc4015071781e0687fa69aaead56", "a.png")
    assert check.says_something("Gates of four blocks", "a.png")
    assert notebooks.picture_text("#| fig-alt: Ten digits\nplot()") == "Ten digits"


def test_code_of_pages_is_read_without_scrolling():
    long = [f"{path.relative_to(ROOT)}, cell {cell['id']}: {line[:60]}…" for path in NOTEBOOKS
            if "source" not in path.relative_to(ROOT).parts for cell in code_cells(path)
            for line in "".join(cell["source"]).splitlines() if len(line) > WIDTH and not line.startswith("#|")]
    assert not long, "\n".join(long)


def test_a_notebook_to_download_has_no_outputs_and_runs_from_its_own_folder():
    page = ROOT / "nbs" / "tutorials" / "pictures.ipynb"
    nb = json.loads(notebooks.to_download(page))
    assert not any(c.get("outputs") for c in nb["cells"]) and len(nb["cells"]) == len(
        json.loads(page.read_text(encoding="utf-8"))["cells"])
    assert not any("fig-alt" in "".join(c["source"]) for c in nb["cells"])
    page = notebooks.with_download("<h1>A</h1>\n<blockquote>\n<p>b</p></blockquote><p>c</p><h1>d</h1>", "a.ipynb")
    assert page.count('href="a.ipynb"') == 1
    assert page.index("</blockquote>") < page.index("a.ipynb") < page.index("<p>c")
