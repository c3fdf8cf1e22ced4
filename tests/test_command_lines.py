"""Every command line of the README and the tutorials, in an empty project.

Each line that the pages show is in one of four sorts, and a new line has to be put into one:
- TYPED: quick ones, which are typed here as they stand, and have to work;
- ours and long (minutes, downloads, clusters): their options are parsed, the experiment, notebook, parameters and
  overrides that they name are looked up and checked, and nothing runs;
- `make …`: the target is in the Makefile;
- of other programs (OTHERS): not typed.
"""
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import papermill
import pytest
from PIL import Image
from typer.main import get_command

from dmp_wb import cli
from dmp_wb.batch.plan import find_notebook, parameters_of, plan
from dmp_wb.batch.projects import new_project
from dmp_wb.config import load_experiment
from dmp_wb.core.paths import named_files

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "nbs/index.ipynb", ROOT / "nbs/start.ipynb", *sorted(ROOT.glob("nbs/tutorials/*.ipynb"))]
TYPED = ["dmp-wb --version", "dmp-wb new my-work", "cd my-work", "dmp-wb list",
         'dmp-wb list method=dmp "optim.lr>=2e-3" --sort loss', "dmp-wb new --data slanted",
         "dmp-wb train digits-quick name=my-pretrain train.steps=120",
         'papermill nbs/runs/patch.ipynb runs/mine/run.ipynb -p overrides "optim.lr=2e-3"']
OTHERS = ("python -m venv", "pip install", "python", "jupyter lab", "mkdir", "dmp-wb run", "dmp-wb sample",
          "dmp-wb evaluate", "dmp-wb list", "accelerate launch", "python tools/")
# names that stand for the reader's own, and runs and experiments that earlier lines of a page have made
READERS = {"RUN", "DIR", "my-experiment", "my-experiment.yaml", "mine.yaml", "sweep.yaml", "slanted-pretrain",
           "slanted-dmp", "…"}


def shown(page: Path) -> list[str]:
    "The lines of a page's blocks without a language, and its inline commands; comments are left out."
    lines = []
    for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] != "markdown": continue
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M):
            if not language: lines += re.sub(r"\\\n\s*", "", block).splitlines()
        lines += re.findall(r"`((?:dmp-wb|papermill|accelerate|make|python -m) [^`]+)`", re.sub(r"```.*?```", "", text,
                                                                                              flags=re.S))
    return [line.split(" # ")[0].strip() for line in lines]


COMMAND = re.compile(r"(dmp-wb|papermill|accelerate|make|python|pip|jupyter|cd|mkdir)\b(?!/)")
LINES = sorted({line for page in PAGES for line in shown(page) if COMMAND.match(line)})


def is_ours(line: str) -> bool:
    return re.match(r"dmp-wb \S|papermill |accelerate launch -m dmp_wb|python -m dmp_wb", line) is not None


def check_experiment(words: list[str]):
    if not {words[0], *words[0].split("/")} & READERS:
        load_experiment(words[0] if words[0] in named_files("experiments") else ROOT / words[0],
                        [w for w in words[1:] if w not in READERS])


def check_parameters(notebook: str, words: list[str]):
    "Every -p KEY VALUE… of a run notebook: known, and of the type that it is."
    fixed: dict = {}
    for key, values in re.findall(r"-p (\S+) ((?:(?!-p |--)\S+ ?)+)", shlex.join(words) + " "):
        fixed[key] = shlex.split(values)[0]
    if fixed.get("experiment") in READERS: del fixed["experiment"]
    if "overrides" in fixed:
        known = parameters_of(find_notebook(notebook))
        load_experiment(fixed.get("experiment", known["experiment"]), fixed["overrides"])
    plan(notebook, {k: int(v) if v.isdecimal() else float(v) if re.fullmatch(r"[\d.]+(e-?\d+)?", v) else v
                    for k, v in fixed.items()})


def dry(line: str):
    "Parse one of our long lines, and look up all that it names."
    words = shlex.split(line)
    if words[0] == "papermill":
        assert Path(words[1]).is_file() or words[1] in READERS
        return check_parameters(Path(words[1]).stem, words[3:])
    if words[:1] != ["dmp-wb"]:   # a module, started by accelerate or python
        return check_experiment(words[words.index("dmp_wb.training") + 1:])
    command = get_command(cli.app)
    name, sub, rest = command.resolve_command(command.make_context("dmp-wb", words[1:]), words[1:])
    if not rest and name != "list": return   # a mention, as in a sentence
    sub.make_context(name, [w for w in rest if w != "…"])
    if name == "train": check_experiment(rest)
    if name == "run" and not rest[0].startswith("-"): check_parameters(rest[0], rest[1:])


def test_every_line_is_of_a_sort():
    assert set(TYPED) <= set(LINES), "typed here, and no longer on a page"
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for line in LINES:
        if line.startswith("make "): assert line.split()[1].rstrip(";,") in targets, line
        else: assert line in TYPED or is_ours(line) or line.startswith(OTHERS), line
        if script := re.match(r"python (tools/\S+)", line): assert (ROOT / script[1]).is_file()


@pytest.mark.parametrize("line", [line for line in LINES if is_ours(line) and line not in TYPED])
def test_a_long_line_parses_and_names_what_is_there(line, tmp_path, monkeypatch):
    new_project(tmp_path / "my-work")
    monkeypatch.chdir(tmp_path / "my-work")
    for name in ("images", "with", "without"): (tmp_path / "my-work" / name).mkdir()
    dry(line)


@pytest.fixture
def type_(monkeypatch, capsys):
    "Types a command line: what it printed. It has to succeed."
    def run(line):
        assert line in TYPED
        words = shlex.split(line)
        if words[0] == "cd": return monkeypatch.chdir(words[1])
        monkeypatch.setattr(sys, "argv", words)
        if words[0] == "papermill":
            from papermill.__main__ import papermill as command
            command(words[1:], standalone_mode=False)
        else:
            with pytest.raises(SystemExit) as e: cli.main()
            assert e.value.code in (0, None), capsys.readouterr().err
        return capsys.readouterr().out
    return run


def test_quick_lines_work_as_they_are_typed(type_, tmp_path, monkeypatch):
    monkeypatch.delenv("DMP_WB_RUNS", raising=False)
    monkeypatch.chdir(tmp_path)
    assert type_("dmp-wb --version").strip()
    type_("dmp-wb new my-work")
    type_("cd my-work")
    for i in range(8):
        (Path("slanted") / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16), 30 * i, np.uint8)).save(f"slanted/{i % 2}/{i}.png")
    assert "dmp-wb train slanted-dmp" in type_("dmp-wb new --data slanted")
    type_("dmp-wb train digits-quick name=my-pretrain train.steps=120")
    assert "my-pretrain" in type_("dmp-wb list")
    type_('dmp-wb list method=dmp "optim.lr>=2e-3" --sort loss')


def test_the_papermill_line_of_the_readme_works_as_it_is_typed(type_, tmp_path, monkeypatch):
    monkeypatch.delenv("DMP_WB_RUNS", raising=False)
    new_project(tmp_path / "my-work")
    monkeypatch.chdir(tmp_path / "my-work")
    assert papermill and parameters_of(find_notebook("patch"))["overrides"] == ""
    type_('papermill nbs/runs/patch.ipynb runs/mine/run.ipynb -p overrides "optim.lr=2e-3"')
    made = json.loads(Path("runs/mine/summary.json").read_text())
    assert made["status"] == "finished" and made["steps"] == 200 and Path("runs/mine/run.html").is_file()
