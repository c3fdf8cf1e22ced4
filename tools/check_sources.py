"""Fail when the notebooks, the modules and README.md do not agree, or a notebook is not clean.

    python tools/check_sources.py                 # check
    python tools/check_sources.py --write-readme  # write README.md from nbs/index.ipynb

Every check works on a copy, so that nothing in the working folder changes.
"""
import filecmp
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
WIDTH = 120   # columns of a line, as ruff has it in pyproject.toml


def readme() -> str:
    "README.md as nbs/index.ipynb has it: links and pictures relative to nbs/ become relative to the root."
    nb = nbformat.read(ROOT / "nbs" / "index.ipynb", 4)
    for cell in nb.cells:
        if cell.cell_type == "code" and cell.source.startswith("#| hide"): cell.source, cell.outputs = "", []
    nb.cells = [c for c in nb.cells if c.source]
    nb.metadata["language_info"] = {"name": "python"}   # nbdev_clean takes it out; the code fences need it
    text, resources = MarkdownExporter().from_notebook_node(nb)
    if resources.get("outputs"):
        raise SystemExit(
            f"nbs/index.ipynb has picture outputs {list(resources['outputs'])}: link a file in nbs/images instead")

    def from_root(match):
        target = match.group(2)
        return f"{match.group(1)}({target if re.match(r'[a-z]+:|#', target) else (Path('nbs') / target).as_posix()})"
    text = re.sub(r"(\[[^\]]*\])\(([^)\s]+)\)", from_root, text)
    text = re.sub(r"\bnbs/\.\./", "", text)
    return ("<!-- Written from nbs/index.ipynb by `make readme`. -->\n\n" + re.sub(r"\n{3,}", "\n\n", text).strip()
            + "\n")


def copy_of_tree(folder: Path) -> Path:
    shutil.copytree(ROOT, folder / "copy", ignore=shutil.ignore_patterns(
        ".venv", ".git", "_docs", "_proc", "runs", "__pycache__", "*.egg-info", ".ipynb_checkpoints"))
    # `runs` above would also drop nbs/runs
    shutil.copytree(ROOT / "nbs" / "runs", folder / "copy" / "nbs" / "runs", dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    return folder / "copy"


def differing(left: Path, right: Path, pattern: str) -> list[str]:
    names = {p.relative_to(root).as_posix() for root in (left, right) for p in root.rglob(pattern)}
    return sorted(n for n in names if not ((left / n).is_file() and (right / n).is_file()
                                           and filecmp.cmp(left / n, right / n, shallow=False)))


def long_lines() -> list[str]:
    "What has a line that is too wide: code cells of notebooks, and modules apart from what nbdev writes into them."
    found = []
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        for cell in nbformat.read(path, 4).cells if ".ipynb_checkpoints" not in path.parts else []:
            if cell.cell_type == "code" and any(len(line) > WIDTH for line in cell.source.splitlines()):
                found.append(f"{path.relative_to(ROOT)}: cell {cell.get('id')} has a line of more than {WIDTH} columns")
    for path in sorted((ROOT / "dmp_wb").rglob("*.py")):
        cells = re.split(r"^# %% auto .*$", path.read_text(encoding="utf-8"), maxsplit=1, flags=re.M)
        text = cells[0] + "".join(cells[1:]).partition("# %%")[2]   # between them: `__all__`, as nbdev wraps it
        if path.name != "_modidx.py" and any(len(line) > WIDTH for line in text.splitlines()):
            found.append(f"{path.relative_to(ROOT)} has a line of more than {WIDTH} columns")
    return found


def main():
    faults = long_lines()
    with tempfile.TemporaryDirectory() as tmp:
        copy = copy_of_tree(Path(tmp))
        subprocess.run([BIN / "nbdev_export"], cwd=copy, check=True)
        faults += [f"dmp_wb/{n} and its notebook disagree: run nbdev_export (or nbdev_update, if you edited the module)"
                   for n in differing(ROOT / "dmp_wb", copy / "dmp_wb", "*.py")]
        subprocess.run([BIN / "nbdev_clean"], cwd=copy, check=True)
        faults += [f"nbs/{n} is not clean: run nbdev_clean"
                   for n in differing(ROOT / "nbs", copy / "nbs", "*.ipynb") if ".ipynb_checkpoints" not in n]
    if not (ROOT / "README.md").exists() or (ROOT / "README.md").read_text(encoding="utf-8") != readme():
        faults.append("README.md and nbs/index.ipynb disagree: run make readme")
    if subprocess.run([BIN / "ruff", "check", "--quiet", "dmp_wb", "docs", "tests", "tools"], cwd=ROOT).returncode:
        faults.append("ruff has complaints, above")
    if subprocess.run([sys.executable, "-m", "mypy", "--no-error-summary"], cwd=ROOT).returncode:
        faults.append("mypy has complaints, above")
    for fault in faults: print(f"error: {fault}", file=sys.stderr)
    print("notebooks, modules and README agree; notebooks are clean" if not faults else f"{len(faults)} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    if "--write-readme" in sys.argv: (ROOT / "README.md").write_text(readme(), encoding="utf-8")
    else: main()
