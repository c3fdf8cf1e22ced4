import errno
import json
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import nbformat
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.interactiveshell import InteractiveShell

import dmp_wb as wb
from dmp_wb.core.errors import (
    BadInput, MissingFile, one_line_errors, printable, system_error, system_errors, unknown,
)
from dmp_wb.core.files import atomic_folder, read_json, write_atomic, write_json
from dmp_wb.core.paths import expanded, passive_waiting, project_root, runs_root, shipped_folder, short
from dmp_wb.core.processes import process_alive, process_identity
from dmp_wb.core.bars import LogBar, mirror, progress, progress_line, read_progress
from dmp_wb.core.seeds import seed_of
from dmp_wb.store.listing import RunFacts, runs_table
from dmp_wb.batch.notebook import figures_table
from dmp_wb.batch.state import RunState
from dmp_wb.batch.view import Sweep, View


def test_import_is_light_and_public_names_exist():
    code = ("import sys, dmp_wb, dmp_wb.runs; print('torch' in sys.modules, 'diffusers' in sys.modules, 'nbdev' in "
            "sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=True).stdout.split() == ["False"] * 3
    for name in wb.__all__: assert getattr(wb, name) is not None
    assert {"DiT", "patch", "train"} <= set(dir(wb))
    with pytest.raises(AttributeError, match="no attribute 'pacth'"): wb.pacth  # noqa: B018


@pytest.mark.slow
def test_run_time_needs_no_nbdev():
    code = ("import sys, dmp_wb as wb; [getattr(wb, n) for n in dir(wb)]; print(sorted(m for m in sys.modules if "
            "m.split('.')[0] in ('nbdev', 'fastcore', 'execnb')))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=True).stdout.strip() == "[]"


def test_of_many_known_names_those_beside_the_suggested_one_are_listed():
    known = [f"{group}.{i}" for group in ("data", "model") for i in range(30)] + ["train.step_size", "train.steps"]
    said = str(unknown("key", "train.step", known))
    assert said.endswith("did you mean 'train.steps'? known: train.step_size, train.steps, … (62 in all)")
    assert "data.0, data.1" in str(unknown("key", "zzzzzz", known))   # nothing near


def test_unknown_suggests_whole_and_last_part():
    assert "did you mean 'optim.lr'" in str(unknown("key", "lr", ["optim.lr", "train.steps"]))
    assert "did you mean" not in str(unknown("key", "zzzzzz", ["optim.lr"]))


def test_write_atomic_keeps_the_old_file(tmp_path, monkeypatch):
    file = write_atomic(tmp_path / "a" / "x.txt", "old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"): write_atomic(file, "new")
    assert file.read_text() == "old" and os.listdir(file.parent) == ["x.txt"]


def test_files_get_the_usual_mode(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    with atomic_folder(tmp_path / "folder") as tmp:
        (tmp / "private").write_text("")
        os.chmod(tmp / "private", 0o600)
    (tmp_path / "plain").write_text("")
    usual = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "x.json", tmp_path / "folder" / "private")} == {usual}


def test_atomic_folder_replaces_or_leaves(tmp_path):
    target = tmp_path / "t"
    with atomic_folder(target) as tmp: (tmp / "a").write_text("1")
    with pytest.raises(RuntimeError), atomic_folder(target) as tmp:
        (tmp / "a").write_text("2")
        raise RuntimeError
    assert (target / "a").read_text() == "1"
    with atomic_folder(target) as tmp: (tmp / "b").write_text("3")
    assert [p.name for p in target.iterdir()] == ["b"] and [p.name for p in tmp_path.iterdir()] == ["t"]


def test_read_json(tmp_path):
    with pytest.raises(MissingFile, match="no file"): read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{,}")
    with pytest.raises(BadInput, match="x.json is not valid JSON"): read_json(tmp_path / "x.json")


def test_missing_file_is_both_kinds_of_error():
    assert issubclass(MissingFile, FileNotFoundError) and issubclass(MissingFile, ValueError)


@given(st.integers(0, 2**40), st.integers(0, 2**40), st.text(max_size=5), st.text(max_size=5))
def test_seeds_differ_by_every_part(a, b, n, m):
    assert 0 <= seed_of(a, n) < 2**63
    assert (seed_of(a, n) == seed_of(b, m)) == ((a, n) == (b, m))
    assert seed_of(a, n, 1) != seed_of(a, n)


def test_one_line_errors(capsys):
    with pytest.raises(SystemExit) as e, one_line_errors(): raise BadInput("x is 1: expected 2")
    assert e.value.code == 2 and capsys.readouterr().err == "error: x is 1: expected 2\n"
    with pytest.raises(ZeroDivisionError), one_line_errors(): raise ZeroDivisionError   # a bug keeps its traceback


def test_places(tmp_path, monkeypatch):
    (tmp_path / "nbs" / "experiments").mkdir(parents=True)
    (tmp_path / "nbs" / "runs").mkdir()
    monkeypatch.chdir(tmp_path / "nbs" / "runs")
    assert project_root() == tmp_path
    monkeypatch.delenv("DMP_WB_RUNS")
    assert runs_root() == tmp_path / "runs"


def test_progress_in_a_log_is_whole_lines(capsys):
    bar = progress(range(50), desc="work", unit="step")
    assert isinstance(bar, LogBar)
    for _ in bar: bar.set_postfix_str("loss 0.5", refresh=False)
    out = capsys.readouterr().err
    assert (out.startswith("work  50/50 100%") and "step/s" in out and "loss 0.5" in out and out.count("\n") == 1
            and "\r" not in out)


def test_progress_of_a_process_that_is_watched(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DMP_WB_PROGRESS", str(tmp_path / "gone" / "progress.json"))
    for _ in progress(range(3)): pass                                              # nobody is there to read it
    monkeypatch.setenv("DMP_WB_PROGRESS", str(tmp_path / "progress.json"))
    bar = progress(total=50, initial=10, desc="work", unit="step")
    bar.set_postfix_str("loss 0.5", refresh=False)
    bar.update(5)
    bar.close()
    told = read_progress(tmp_path / "progress.json")
    assert (told["n"], told["total"], told["desc"], told["postfix"]) == (15, 50, "work", "loss 0.5")
    assert capsys.readouterr().err.splitlines()[-1].startswith("work  15/50")
    assert read_progress(tmp_path / "none.json") is None and [p.name for p in tmp_path.iterdir()] == ["progress.json"]


def test_progress_line_has_rate_and_eta():
    line = progress_line({"desc": "train", "n": 25, "total": 100, "elapsed": 5.0, "rate": 5.0, "unit": "step",
                          "postfix": ""})
    assert line == "train  25/100  25%  5.0 step/s  ETA 00:15"
    assert progress_line({"desc": "", "n": 0, "total": None, "elapsed": 0.0, "rate": 0.0, "unit": "it", "postfix": ""})


HOSTILE = "\x1b]0;owned\x07\x1b[2J\rname\nerror: forged\u202egnp.exe\udc80"


def test_what_comes_from_files_reaches_a_terminal_with_its_control_characters_escaped(capsys):
    shown = printable(HOSTILE)
    assert shown.isprintable() and "\\x1b]0;owned\\x07" in shown and "\\nerror: forged\\u202egnp.exe\\udc80" in shown
    assert (printable("Größe 3×3 → „ok“ 图 e\u0301") == "Größe 3×3 → „ok“ 图 e\u0301"
            and printable("a\tb\n", keep="\n") == "a\\tb\n")
    assert str(BadInput(f"no file {HOSTILE}")) == f"no file {shown}" and str(MissingFile(HOSTILE)) == shown
    with pytest.raises(SystemExit), one_line_errors(): raise BadInput(HOSTILE)
    assert capsys.readouterr().err == f"error: {shown}\n"
    numbers = {"desc": HOSTILE, "n": 1, "total": 2, "initial": 0, "elapsed": 1.0, "rate": 1.0, "unit": HOSTILE,
               "postfix": HOSTILE}
    assert progress_line(numbers).isprintable()
    bar = mirror(mirror(None, numbers), numbers)
    bar.close()
    assert capsys.readouterr().err.removesuffix("\n").isprintable()


def test_tables_of_runs_and_sweeps_show_hostile_names_and_errors_escaped(tmp_path):
    fact = RunFacts(HOSTILE, tmp_path, "dmp", "failed", error=HOSTILE, config={"k": HOSTILE},
                    metrics={HOSTILE.replace(" ", ""): 1.0})
    table = runs_table([fact], ["k"])
    assert printable(table, keep="\n") == table and table.count("\n") == 2
    states = {HOSTILE: RunState("n.ipynb", status="failed", error=HOSTILE)}
    assert all(text.isprintable()
               for _, text in View(Sweep(tmp_path / HOSTILE.replace("\udc80", ""), [HOSTILE])).lines(states))
    figures = {"a": {"frechet": 1.0, "interval": [0, 1]}, HOSTILE: {"frechet": 1.0, "interval": [0, 1]}}
    shown = figures_table({"figures": figures, "num_images": 8, "guidance_scale": 1.5, "sampler": HOSTILE,
                           "num_inference_steps": 2})
    assert printable(shown, keep="\n") == shown and shown.count("\n") == 3


@pytest.mark.parametrize("number,expected", [
    ("ENOSPC", "room on the disk"), ("EDQUOT", "room in the quota"), ("EROFS", "a disk that can be written"),
    ("EACCES", "one that you may"), ("ENAMETOOLONG", "a shorter name"),
    ("ENOTDIR", "a folder, not a file"), ("EISDIR", "a file, not a folder"), ("ENOENT", "one that exists")])
def test_an_error_of_the_system_is_one_line_that_names_the_file(number, expected, capsys):
    number = getattr(errno, number)
    with pytest.raises(SystemExit) as e, one_line_errors():
        raise OSError(number, os.strerror(number), "/here/is\x1b[2J")
    said = capsys.readouterr().err
    assert (e.value.code == 2 and said.startswith("error: /here/is\\x1b[2J cannot be used: ")
            and f": expected {expected}" in said and said.count("\n") == 1)


def test_errors_of_the_system_without_a_number_or_a_file_are_one_line_and_ours_stay():
    assert str(system_error(ConnectionError("no\n  route"))) == "ConnectionError: no route"
    assert (str(system_error(OSError(errno.ENOSPC, "No space left on device")))
            == "a file cannot be used: no space left on device: expected room on the disk")
    with pytest.raises(MissingFile, match="^no file x$"), system_errors(): raise MissingFile("no file x")
    with pytest.raises(BadInput, match="shorter name"), system_errors(): Path("x" * 5000).read_text()


def test_a_working_folder_that_is_gone_and_a_runs_folder_that_is_a_file_are_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("DMP_WB_RUNS", str(tmp_path / "runs"))
    (tmp_path / "runs").write_text("")
    with pytest.raises(BadInput, match="DMP_WB_RUNS is .*runs, which is a file: expected a folder"): runs_root()
    monkeypatch.setenv("DMP_WB_RUNS", "~/some/runs")
    assert (runs_root() == Path.home() / "some" / "runs" and expanded("~/x") == Path.home() / "x"
            and expanded("a~b") == Path("a~b"))
    monkeypatch.delenv("DMP_WB_RUNS")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for look in (project_root, runs_root, lambda: short("x")):
        with pytest.raises(BadInput, match="the working folder is gone: expected one that exists"), system_errors():
            look()


@pytest.mark.parametrize("kind", [BadInput, MissingFile])
def test_a_mistake_in_a_notebook_is_one_line_without_a_traceback(kind):
    shell = InteractiveShell()
    shown = []
    shell._showtraceback = lambda etype, value, lines: shown.append("\n".join(lines))
    shell.user_ns["kind"] = kind
    shell.run_cell("def deep():\n    try: 1 / 0\n    except ZeroDivisionError as e: raise kind('x is 1: expected "
                   "2\\x1b[2J') from e\ndeep()")
    assert shown == [f"\x1b[31m{kind.__name__}\x1b[0m: x is 1: expected 2\\x1b[2J"]


def test_a_process_is_known_by_what_no_clock_changes(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = process_identity(child.pid)
    assert (process_alive(identity) and process_alive(process_identity())
            and json.loads(json.dumps(identity)) == identity and "\n" not in identity)
    with (mock.patch("psutil.Process.create_time", lambda self: 0.0), mock.patch("psutil.boot_time", lambda: 0.0),
          mock.patch("time.time", lambda: 0.0)):
        assert process_alive(identity) and process_identity(child.pid) == identity       # whatever the clock says
    for other in ("", "process", "process x ticks 1 boot 2", f"process {child.pid} ticks 1 boot 2", identity + "0",
                  identity.replace("boot ", "boot 0"), None, 7, {"pid": child.pid}):
        assert not process_alive(other)
    child.stdin.close()
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE: time.sleep(0.01)
    # dead, though its parent has not looked
    assert not process_alive(identity)
    child.wait()
    assert not process_alive(identity)
    with pytest.raises(ProcessLookupError, match=f"no process {child.pid}"): process_identity(child.pid)


def test_an_error_that_quotes_a_whole_book_is_cut_in_the_middle():
    said = str(BadInput(f"name is {'x' * 10**6!r}: expected a folder name"))
    assert (len(said) <= 2000 and said.startswith("name is 'xxx") and said.endswith("xx': expected a folder name")
            and " … " in said)


def test_a_command_in_a_folder_that_is_gone_is_one_line_before_it_begins(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit), one_line_errors(): raise AssertionError("it began")
    assert capsys.readouterr().err == "error: the working folder is gone: expected one that exists, change to another\n"


def test_threads_wait_passively_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert passive_waiting() == {"OMP_WAIT_POLICY": "PASSIVE"}
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert passive_waiting() == {"OMP_WAIT_POLICY": "ACTIVE"}


@pytest.mark.parametrize("way",
                         ["import dmp_wb", "from dmp_wb.core.paths import short", "from dmp_wb.cli import main; main()",
                          "from dmp_wb.training.__main__ import main; main(['digits-pretran'])"])
def test_the_way_of_waiting_is_set_before_torch_is_there(way):
    "torch reads it when it is imported: by the package, by the command of a training, by the command line."
    code = (f"import contextlib, os, sys\nwith contextlib.suppress(SystemExit): {way}\n"
            "print(os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules)")
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert said.split()[-2] == "PASSIVE"
    said = subprocess.run([sys.executable, "-c", code], env={**env, "OMP_WAIT_POLICY": "ACTIVE"}, capture_output=True,
                          text=True, check=True).stdout
    assert said.split()[-2] == "ACTIVE"


@pytest.mark.parametrize("name", sorted(shipped_folder("runs").glob("*.ipynb")), ids=lambda p: p.stem)
def test_a_run_notebook_imports_the_package_before_torch(name):
    "Also where it is opened by hand: the package says how torch's threads wait."
    code = "\n".join(c.source for c in nbformat.read(name, 4).cells if c.cell_type == "code")
    first = re.search(r"^(import|from) (torch|diffusers|accelerate|dmp_wb)\b", code, re.M)
    assert first and first[2] == "dmp_wb"
