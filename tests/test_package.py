"""The built package in an environment of its own, away from this checkout:
commands, files that ship, projects, completion."""
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from dmp_wb.core.errors import BadInput
from dmp_wb.core.paths import named_files, project_root, shipped_folder
from dmp_wb.batch.projects import new_project, opening, project_files

ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCE = shutil.ignore_patterns(".venv", ".git", "__pycache__", "*.egg-info", ".ipynb_checkpoints", ".*_cache",
                                    ".hypothesis", "_proc", "_docs", "jupyter_execute", "build", "dist")


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    "The sdist of this tree, and the wheel that is built from that sdist."
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "tree",
                    ignore=lambda at, names: {*NOT_SOURCE(at, names), *({"runs"} if Path(at) == ROOT else ())})
    done = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder),
                           str(folder / "tree")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(built, tmp_path_factory):
    """The folder of the commands of a new environment that holds the
    wheel, and sees the packages of this one but not the checkout."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    done = subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps",
                           "--no-index", "--disable-pip-version-check", str(built[1])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    site = Path(subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
                               capture_output=True, text=True, check=True).stdout.strip())
    # a line with a path is put on sys.path, but the .pth files in it, an editable install's among them, are not read
    (site / "outer.pth").write_text(
        "\n".join({sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]}) + "\n")
    return python.parent


@pytest.fixture
def shell(installed, tmp_path):
    "Runs a command of the new environment in an empty folder."
    # nbconvert's templates lie beside the packages
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DMP_WB_RUNS", "VIRTUAL_ENV")} | {
        "PATH": f"{installed}{os.pathsep}{os.environ['PATH']}", "JUPYTER_PATH": f"{sys.prefix}/share/jupyter"}
    (tmp_path / "empty").mkdir()

    def run(*words, cwd=tmp_path / "empty", status=0, **variables):
        done = subprocess.run([installed / words[0], *map(str, words[1:])], capture_output=True, text=True, cwd=cwd,
                              env=env | variables)
        assert done.returncode == status, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout if status == 0 else done.stderr
    run.folder = tmp_path / "empty"
    return run


def test_sdist_and_wheel_are_complete(built):
    with tarfile.open(built[0]) as t: held = {name.split("/", 1)[1] for name in t.getnames() if "/" in name}
    # none in a tree without git
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True,
                            text=True).stdout.splitlines()
    assert not [f for f in listed if f not in held and f != ".gitignore" and (ROOT / f).exists()]
    assert {"settings.ini", "constraints.txt", "nbs/index.ipynb", "tests/test_package.py", "dmp_wb/cli/base.py"} <= held
    with zipfile.ZipFile(built[1]) as z: names = z.namelist()
    expected = [f"dmp_wb/nbs/{kind}/{file.name}" for kind in ("runs", "experiments")
                for file in named_files(kind).values()]
    expected += [p.relative_to(ROOT).as_posix()
                 for p in (ROOT / "dmp_wb").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert set(expected) == {n for n in names if n.startswith("dmp_wb/")} and all(
        n.startswith(("dmp_wb/", "dmp_wb-")) for n in names)


def test_commands_in_an_empty_folder(shell):
    version = shell("dmp-wb", "--version")
    assert (version == shell("python", "-m", "dmp_wb", "--version")
            and f"version = {version.strip()}" in (ROOT / "settings.ini").read_text())
    listing = shell("dmp-wb", "--help")
    from dmp_wb.cli import app
    assert all((c.name or c.callback.__name__) in listing for c in app.registered_commands)
    code = ("import sys, dmp_wb, dmp_wb.core as c; assert 'site-packages' in dmp_wb.__file__; "
            "print(sorted(c.named_files('runs')), sorted(c.named_files('experiments')), 'torch' in sys.modules)")
    assert shell("python", "-c",
                 code).strip() == f"{sorted(named_files('runs'))} {sorted(named_files('experiments'))} False"
    # an experiment and a model that ship
    shell("dmp-wb", "train", "digits-dmp", "name=mine", "train.steps=1", "train.batch_size=8", "train.log_with=null")
    assert (shell.folder / "runs/mine/summary.json").is_file() and os.listdir(shell.folder) == ["runs"]


def test_a_project_is_looked_up_first(shell):
    said = shell("dmp-wb", "new", "study")
    study = shell.folder / "study"
    assert (
        "cd study" in said and "dmp-wb run patch" in said
        and {p.relative_to(study).as_posix() for p in study.rglob("*") if p.is_file()} == set(project_files("study")))
    assert "study is not empty" in shell("dmp-wb", "new", "study", status=2)
    (study / "nbs/experiments/digits-dmp-quick.yaml").write_text("# Mine.\nmethod: dmp\n")
    nb = json.loads((study / "nbs/runs/patch.ipynb").read_text())
    opening, parameters, code = nb["cells"][:3]
    code["source"] = [
        "from dmp_wb.core import named_files, short\n", "from dmp_wb.runs import here\n",
        "print(overrides, short(here(run, '')), named_files('experiments')[experiment].read_text().splitlines()[0])"]
    nb["cells"] = [opening, parameters, code]
    (study / "nbs/runs/patch.ipynb").write_text(json.dumps(nb))
    (study / "deep/er").mkdir(parents=True)
    shell("dmp-wb", "run", "patch", "-p", "overrides", "a=1", cwd=study / "deep/er")
    shell("python", "-m", "papermill", "nbs/runs/patch.ipynb", "runs/second/patch.ipynb", "-p", "overrides", "a=1",
          cwd=study)
    for file, name in ((study / "runs/patch/run.ipynb", "runs/patch"),
                       (study / "runs/second/patch.ipynb", "runs/second")):
        said = [o["text"] for cell in json.loads(file.read_text())["cells"]
                for o in cell.get("outputs", []) if o["output_type"] == "stream"]
        assert "".join(said[0]) == f"a=1 {name} # Mine.\n" and file.with_suffix(".html").is_file()


@pytest.mark.parametrize("sh", ["bash", "zsh", "fish"])
def test_completion(shell, sh):
    assert "_DMP_WB_COMPLETE" in shell("dmp-wb", _DMP_WB_COMPLETE=f"source_{sh}")

    def offered(line):
        words = line.split(" ")
        given = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)} if sh == "bash" else {
            "_TYPER_COMPLETE_ARGS": line, **({"_TYPER_COMPLETE_FISH_ACTION": "get-args"} if sh == "fish" else {})}
        return shell("dmp-wb", _DMP_WB_COMPLETE=f"complete_{sh}", **given)
    assert all(name in offered("dmp-wb ") for name in ("train", "sample", "new", "run"))
    if sh != "bash": return
    assert offered("dmp-wb train digits-p").split() == ["digits-pretrain", "digits-prompt-tuning"]
    assert offered("dmp-wb run pa").split() == ["patch"]
    assert offered("dmp-wb sample digits-").split() == ["digits-base", "digits-dmp", "digits-slanted"]


def test_completion_and_help_import_no_torch():
    for variables, words in (({}, ["--help"]), ({}, ["--version"]),
                             ({"_DMP_WB_COMPLETE": "complete_bash", "COMP_WORDS": "dmp-wb sample d", "COMP_CWORD": "2"},
                              [])):
        code = (
            "import atexit, sys; atexit.register(lambda: print('heavy:', sorted({'torch', 'diffusers', 'matplotlib', "
            "'papermill'} & sys.modules.keys()))); sys.argv[0] = 'dmp-wb'; from dmp_wb.cli import main; main()")
        assert subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True,
                              env=os.environ | variables).stdout.splitlines()[-1] == "heavy: []"


def test_new_project_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    written, kept = new_project("empty")
    assert (set(written) == set(project_files("empty")) and kept == []
            and project_root(tmp_path / "empty" / "nbs" / "runs") == tmp_path / "empty")
    readme = (tmp_path / "empty/README.md").read_text()
    assert readme.startswith("# empty\n") and all(f"(nbs/{kind}/{file.name})" in readme
                                                  for kind in ("runs", "experiments")
                                                  for file in shipped_folder(kind).glob("*.[iy]*"))
    for kind in ("runs", "experiments"):
        for file in named_files(kind).values(): assert opening(file).endswith(".") and "\n" not in opening(file)

    mine = tmp_path / "mine"
    (mine / "nbs/runs").mkdir(parents=True)
    (mine / "README.md").write_text("my words")
    (mine / "nbs/runs/patch.ipynb").symlink_to("nowhere")
    with pytest.raises(BadInput, match="mine is not empty: .* --add"): new_project("mine")
    assert sorted(p.name for p in mine.rglob("*")) == ["README.md", "nbs", "patch.ipynb", "runs"]
    written, kept = new_project("mine", add=True)
    assert (kept == ["README.md", "nbs/runs/patch.ipynb"] and (mine / "README.md").read_text() == "my words"
            and len(written) == len(project_files("mine")) - 2)
    assert new_project("mine", add=True) == ([], kept)

    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="file is a file"): new_project("file")
    with pytest.raises(BadInput, match="cannot be written"): new_project("file/below")

    calls = iter(range(100))
    def full(path, content):
        if next(calls) == 3: raise OSError(28, "No space left on device")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    monkeypatch.setattr("dmp_wb.batch.projects.write_atomic", full)
    with pytest.raises(BadInput, match="half cannot be written: No space left"): new_project("half")
    assert not (tmp_path / "half").exists() and sorted(os.listdir(tmp_path)) == ["empty", "file", "mine"]
