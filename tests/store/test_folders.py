"What run folders tell about themselves: states, torn and foreign files, conditions."
import errno
import json
import os
import socket
import subprocess
import sys
import time

import pytest
import yaml

from dmp_wb.store.checkpoints import run_lock
from dmp_wb.core.errors import BadInput
from dmp_wb.core.files import write_json
from dmp_wb.core.processes import locked, writer_of
from dmp_wb.store.listing import list_runs, read_run, runs_table


@pytest.fixture
def made(runs_folder):
    "make(name, …): a run folder with these files."
    def make(name, rows=(), summary=None, nb_error=None, plan=None, **config):
        folder = runs_folder / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump({"method": "dmp", "data": {"name": "digits"}, "train": {
            "steps": 100, "compile": False}, "optim": {"lr": 1e-4}} | config))
        if rows: (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        if summary: write_json(folder / "summary.json", summary)
        if plan: write_json(folder / "run.json", {"notebook": "nbs/runs/patch.ipynb", **plan})
        if nb_error:
            cells = [{"cell_type": "code", "outputs": [{"output_type": "error", "ename": "RuntimeError",
                                                        "evalue": nb_error, "traceback": []}]}]
            write_json(folder / "patch.ipynb", {"cells": cells, "metadata": {
                "dmp_wb": {"page": True}, "papermill": {"input_path": "nbs/runs/patch.ipynb", "end_time": "x"}}})
        return folder
    return make


def states(): return {r.name: r.state for r in list_runs(sort="name")[0]}


def test_states(made):
    done = {"status": "finished", "steps": 100, "loss": 0.5}
    made("a/done", [{"step": 100, "loss": 0.4}], done)
    made("a/killed", [{"step": 60, "loss": 0.7}])
    made("a/raised", [{"step": 60, "loss": 0.7}], nb_error="out of memory")
    made("b/raised-after", [{"step": 100, "loss": 0.4}], done, nb_error="no disk")
    made("b/not-finite",
         [{"step": 60, "loss": 0.7}]).joinpath("nonfinite-step-0000061-process-0.safetensors").write_bytes(b"")
    made("b/planned", plan={"status": "waiting"})
    made("b/stopped", [{"step": 60, "loss": 0.7}], plan={"status": "stopped"})
    made("b/left-running", [{"step": 60, "loss": 0.7}], plan={"status": "running"})   # the sweep was killed
    made("b/failed", plan={"status": "failed", "error": "BadInput: no such file"})
    assert states() == {"a/done": "finished", "a/killed": "cut off", "a/raised": "failed", "b/raised-after": "failed",
                        "b/not-finite": "failed",
                        "b/planned": "waiting", "b/stopped": "cut off", "b/left-running": "cut off",
                        "b/failed": "failed"}
    runs = {r.name: r for r in list_runs()[0]}
    assert (runs["a/done"].loss == 0.5 and runs["a/killed"].progress == "60/100"
            and runs["b/failed"].error == "BadInput: no such file")
    assert ("out of memory" in runs["a/raised"].error and "step 61" in runs["b/not-finite"].error
            and "no disk" in runs_table(list(runs.values())))


def test_a_run_is_running_while_its_process_lives(made):
    folder = made("x", [{"step": 60}])
    code = (f"import time, sys; from dmp_wb.checkpoints import run_lock\nwith run_lock({str(folder)!r}): print('held', "
            "flush=True); sys.stdin.read()")
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    assert states() == {"x": "running"} and str(child.pid) in writer_of(folder)
    child.kill(), child.wait()
    assert states() == {"x": "cut off"}
    (folder / ".lock").write_text(f"process {os.getpid()} on {os.uname().nodename}")
    os.utime(folder / ".lock", (1, 1))   # this process is younger than the lock: it has the number of a dead one
    assert states() == {"x": "cut off"}
    (folder / ".lock").write_text("process 7 on another-machine")
    assert states() == {"x": "running"}
    for file in folder.iterdir(): os.utime(file, (1, 1))
    assert states() == {"x": "cut off"}


@pytest.mark.parametrize("hold", [run_lock, lambda folder: locked(folder / ".run.lock", "run")])
def test_who_let_go_of_a_run_writes_it_no_more(made, hold):
    folder = made("x", [{"step": 60}])
    with hold(folder): assert str(os.getpid()) in writer_of(folder)
    assert writer_of(folder) is None and states() == {"x": "cut off"}


def test_torn_and_foreign_files(made, runs_folder):
    made("good", [{"step": 60, "loss": 0.7}])
    with open(runs_folder / "good" / "metrics.jsonl", "a") as f: f.write('{"step": 80, "lo')
    made("torn-summary").joinpath("summary.json").write_text('{"status": "fin')
    made("list-summary").joinpath("summary.json").write_text("[1]")
    made("torn-config").joinpath("config.yaml").write_text("method: [dmp\n")
    made("hydra").joinpath("config.yaml").write_text("hydra: {}\n")
    made("binary").joinpath("config.yaml").write_bytes(b"\xff\xfe\x00\x01")
    made("odd").joinpath("config.yaml").write_text("{method: 3, train: [1], data: x, routing: {sharing_ratio: many}}")
    (runs_folder / "empty").mkdir()
    (runs_folder / "a file").write_text("x")
    write_json(runs_folder / "theirs" / "notebook.ipynb", {"cells": [], "metadata": {}})
    runs, faults = list_runs()
    assert [r.name for r in runs] == ["good"] and runs[0].step == 60
    assert (set(faults) == {"torn-summary", "list-summary", "torn-config", "hydra", "binary", "odd"}
            and all(faults.values()))
    with pytest.raises(BadInput, match="is no run"): read_run(runs_folder / "theirs")


@pytest.mark.parametrize("where,names", [
    (["optim.lr=1e-4"], "a b"), (["optim.lr!=0.0001"], "c"), (["optim.lr>1e-4"], "c"),
    (["train.steps>=100", "name!=a"], "b c"), (["train.compile=false"], "a b c"),
    (["name=[ab]"], "a b"), (["state=finished"], "a"), (["fid<2"], "a"), (["method=pretrain*"], "c"),
    (["loss<=0.5"], "a"), (["base=null"], "a b c")])
def test_conditions(made, where, names):
    made("a", [{"step": 100, "loss": 0.5}],
         {"status": "finished", "steps": 100, "loss": 0.5, "evaluations": [{"fid": 9}, {"fid": 1.5}]}, base=None)
    made("b", base=None)
    made("c", optim={"lr": 2e-4}, method="pretrain", routing={"sharing_ratio": 0.8}, base=None)
    assert [r.name for r in list_runs(where=where, sort="name")[0]] == names.split()


def test_conditions_that_cannot_be_read(made, tmp_path):
    made("a")
    for where, message in ((["optim.lr"], "expected key=value"), (["optim.lr>x"], "expected a number"),
                           (["optim.rl=1"], "did you mean 'optim.lr'")):
        with pytest.raises(BadInput, match=message): list_runs(where=where)
    with pytest.raises(BadInput, match="did you mean"): list_runs(sort="loos")
    with pytest.raises(BadInput, match="no folder"): list_runs(tmp_path / "none")
    assert [r.name for r in list_runs(sort="-optim.lr")[0]] == ["a"]


def test_list_on_the_command_line(made):
    made("a", [{"step": 100, "loss": float("nan")}])
    made("b").joinpath("config.yaml").write_text("x: 1\n")
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "dmp_wb", "list", "--json", "method=dmp"],
                          capture_output=True, text=True)
    assert json.loads(done.stdout)[0] | {"when": 0, "folder": 0} == {
        "name": "a", "folder": 0, "method": "dmp", "state": "cut off", "step": 100, "steps": 100, "loss": None,
        "metrics": {}, "when": 0, "error": None,
        "config": {"method": "dmp", "data.name": "digits", "train.steps": 100, "train.compile": False,
                   "optim.lr": 1e-4}}
    assert "left out b: config.yaml is of something else" in done.stderr and not any(
        line.split("|")[-1].strip() in ("torch", "diffusers") for line in done.stderr.splitlines())
    done = subprocess.run([sys.executable, "-m", "dmp_wb", "list", "optim.rl=1"], capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean 'optim.lr'" in done.stderr and "Traceback" not in done.stderr


def test_every_room_names_the_same_metrics():
    from dmp_wb.store import listing
    from dmp_wb.evaluation import evaluate
    from dmp_wb.look import curves, tables
    assert evaluate.METRICS is listing.METRICS is curves.METRICS is tables.METRICS


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}' if i else '*a'] * 9)}]\n"
                                                       for i in range(9))
PLAIN = "method: dmp\ndata: {name: digits}\ntrain: {steps: 100}\n"
BROKEN = {   # what stands in which file of a run that is left out, and what is said of it
    "aliases": ("config.yaml", PLAIN + BOMB, "more than 20,000 values"),
    "itself": ("config.yaml", PLAIN + "a: &a [*a]\n", "the alias *a has no anchor before it"),
    "brackets": ("config.yaml", "[" * 100_000, "nested more than 50 levels deep"),
    "dashes": ("config.yaml", "- " * 100_000, "nested more than 50 levels deep"),
    "large": ("config.yaml", "#" * 300_000, "300,000 bytes: expected at most 262,144"),
    "digits": ("config.yaml", PLAIN + f"seed: {'9' * 300}\n", "seed is a number of 997 bits"),
    "latin": ("config.yaml", PLAIN.encode() + b"name: \xe9\n", "is not text in UTF-8"),
    "tag": ("config.yaml", PLAIN + "x: !!python/object/apply:os.system ['true']\n",
            "it has the tag tag:yaml.org,2002:python/object/apply:os.system: expected plain values"),
    "method": ("config.yaml", "{method: 3, data: x, train: {}}", "method is 3: expected text"),
    "ratio": ("config.yaml", PLAIN + "routing: {sharing_ratio: many}\n",
              "routing.sharing_ratio is 'many': expected a number"),
    "steps": ("config.yaml", "method: dmp\ndata: {}\ntrain: {steps: [1]}\n", "train.steps is [1]"),
    "done": ("summary.json", '{"steps": "x"}', "summary.json: steps is 'x'"),
    "rows": ("summary.json", '{"evaluations": 3}', "evaluations is 3"),
    "deep": ("summary.json", "[" * 100_000, "nested too deep"),
    "huge": ("summary.json", f'{{"steps": {10**300}}}', "expected at most 64"),
    "plan": ("run.json", '{"notebook": []}', "notebook is []: expected text"),
    "status": ("run.json", '{"notebook": "x", "status": {}}', "status is {}"),
    "torn": ("run.json", '{"notebook": "x', "not valid JSON"),
    "step": ("metrics.jsonl", '{"step": "x"}\n', "metrics.jsonl: step is 'x'"),
}


def test_one_bad_folder_is_one_row_whatever_is_wrong_with_it(made, runs_folder, capsys):
    made("good", [{"step": 60, "loss": 0.7}])
    for name, (file, content, _) in BROKEN.items():
        made(name)
        (runs_folder / name / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    begun = time.process_time()
    runs, faults = list_runs()
    assert [r.name for r in runs] == ["good"] and faults.keys() == BROKEN.keys() and time.process_time() - begun < 20
    for name, (_, _, said) in BROKEN.items():
        assert said in faults[name] and "\n" not in faults[name] and len(faults[name]) < 600, (name, faults[name])


def test_odd_values_that_do_no_harm_are_listed(made, runs_folder):
    made("nan", ['x', {"step": 5, "loss": float("nan")}],
         {"evaluations": [1, {"fid": float("inf"), "precision": "x"}], "figures": {"a": 3, "b": {"frechet": []}},
          "loss": 10**400}, base="x" * 5000)
    made("rows").joinpath("metrics.jsonl").write_text('{"step": 3}\n' + "[" * 9_000 + "\n" + "9" * 5000 + "\n[1]\n")
    made("marks").joinpath("nonfinite-step-many").write_text("")
    theirs = made("notebooks")
    for i, text in enumerate(("[]", '{"metadata": [], "cells": 3}', '{"metadata": {"dmp_wb": {"page": 1}, "papermill": '
                              '[]}, "cells": [3, {"outputs": [4]}, {"outputs": {"a": 1}}]}', "[" * 9_000)):
        (theirs / f"{i}.ipynb").write_text(text)
    (theirs / "gone.ipynb").symlink_to(theirs / "nowhere")
    # what YAML 1.1 would make a date, or a number of a million digits, is text
    for name, line in (("date", "base: 2026-02-30"), ("digits", f"seed: {'9' * 6000}"),
                       ("sixties", f"seed: {'1:' * 5000}1"), ("hex", f"seed: 0x{'f' * 400}")):
        made(name).joinpath("config.yaml").write_text(PLAIN + line + "\n")
    (runs_folder / "early" / "late").mkdir(parents=True)
    for folder, when in (("early", -1e11), ("early/late", 4e11)):
        (runs_folder / folder / "config.yaml").write_text(PLAIN)
        os.utime(runs_folder / folder / "config.yaml", (when, when))
    runs, faults = list_runs()
    assert not faults and {r.name for r in runs} == {
        "nan", "rows", "marks", "notebooks", "early", "early/late", "date", "digits", "sixties", "hex"}
    assert max(map(len, runs_table(runs, ["base"]).splitlines())) < 200
    json.dumps([r.plain() for r in runs], allow_nan=False)
    for r in runs: assert r.step in (None, 3, 5) and r.state != "running"


def test_only_regular_files_are_opened(made, runs_folder):
    "A pipe that nobody writes would hold a reader forever, and a device may give no end of bytes."
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "run.json"):
        folder = made(f"pipe-{name}")
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    (made("zero") / "metrics.jsonl").symlink_to("/dev/zero")
    folder = made("socket")
    (folder / "config.yaml").unlink()
    here = os.getcwd()
    os.chdir(folder)
    try: socket.socket(socket.AF_UNIX).bind("config.yaml")
    finally: os.chdir(here)
    (made("folder") / "summary.json").mkdir()
    fine = made("fine", [{"step": 1}])
    for name in (".lock", ".run.lock", "x.ipynb"): os.mkfifo(fine / name)
    runs, faults = list_runs()
    assert [(r.name, r.state) for r in runs] == [("fine", "cut off")]
    assert {n: why.split(" is a ")[1].split(":")[0] for n, why in faults.items()} == {
        **{f"pipe-{n}": "pipe" for n in ("config.yaml", "metrics.jsonl", "summary.json", "run.json")}, "zero": "device",
        "socket": "socket", "folder": "folder"}
    with pytest.raises(BadInput, match="lock is a pipe"), locked(fine / ".lock", "x"): pass


def test_a_clock_that_is_set_changes_no_state(made, monkeypatch):
    folder = made("x", [{"step": 60}])
    with run_lock(folder):
        # where a clock that was set forward moves it
        monkeypatch.setattr("psutil.Process.create_time", lambda self: time.time() + 86400)
        os.utime(folder / ".lock", (1, 1))
        assert states() == {"x": "running"} and writer_of(folder) == f"process {os.getpid()} on {os.uname().nodename}"
        other = (folder / ".lock").read_text().replace(" ticks ", " ticks 1")
    (folder / ".lock").write_text(other)
    assert states() == {"x": "cut off"}   # another process had this number
    (folder / ".lock").write_text("process 7 on another-machine")
    for file in folder.iterdir(): os.utime(file, (time.time() + 1e6,) * 2)
    assert states() == {"x": "cut off"}   # dates in the future keep nobody running
    (folder / "metrics.jsonl").write_text('{"step": 61}\n')
    assert states() == {"x": "running"}


def test_deep_folders_and_folders_that_cannot_be_read(made, runs_folder, monkeypatch, request):
    made("good")
    deep = runs_folder
    # pytest's own way of removing gives up at such depths
    request.addfinalizer(lambda: subprocess.run(["rm", "-rf", str(runs_folder / "d")], check=True))
    for _ in range(1200):
        deep = deep / "d"
        if len(str(deep)) > 3500: break
        deep.mkdir()
    (runs_folder / "shut").mkdir()
    scandir = os.scandir
    def scan(path):
        if str(path).endswith("shut"): raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)
    with monkeypatch.context() as m:
        m.setattr(os, "scandir", scan)
        runs, faults = list_runs()
    assert [r.name for r in runs] == ["good"] and faults == {"shut": "Permission denied"}


def test_of_large_notebooks_only_the_end_is_read(made):
    folder = made("x", [{"step": 60}])
    picture = {"cell_type": "code", "outputs": [{"output_type": "display_data", "data": {"image/png": "A" * 300_000}}]}
    raised = {"cell_type": "code", "outputs": [{"output_type": "error", "ename": "E", "evalue": "why"}]}
    for exception, state in ((False, "cut off"), (True, "failed")):
        meta = {"dmp_wb": {"page": True},
                "papermill": {"input_path": "a/pretrain.ipynb", "end_time": "x", "exception": exception}}
        (folder / "run.ipynb").write_text(json.dumps({"cells": [picture, raised] if exception else [picture],
                                                      "metadata": meta, "nbformat": 4}, indent=1))
        assert states() == {"x": state}
