"What others may put into a folder that is received, shared or stood in: each attack ends in one line, or does nothing."
import dataclasses
import json
import os
import pickle
import stat
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import dmp_wb as wb
from dmp_wb.look import tables
from dmp_wb.core import paths
from dmp_wb.batch import jobs as batch_jobs
from dmp_wb.batch import plan
from dmp_wb.batch import sweep
from dmp_wb.store.checkpoints import drop_checkpoints_after, list_checkpoints, run_lock, save_checkpoint
from dmp_wb.core.errors import BadInput
from dmp_wb.core.files import append_text, atomic_folder, open_to_append, write_atomic, write_json
from dmp_wb.core.paths import foreign, named_files, project_root
from dmp_wb.core.bars import write_progress
from dmp_wb.core.seeds import git_commit
from dmp_wb.core.processes import locked
from dmp_wb.store.listing import RunFacts
from dmp_wb.training.setup import versions
from dmp_wb.batch.engine import LOG_FILE
from dmp_wb.batch.execute import checksum
from dmp_wb.batch.notebook import as_text, save_figure, saved_figure
from dmp_wb.batch.page import _each, harmless, write_page
from dmp_wb.batch.state import NOTEBOOK_FILE
from dmp_wb.batch.slurm import slurm_executor

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="links and owners are those of Unix")


@pytest.fixture
def precious(tmp_path):
    "A file of the user's, elsewhere, that nothing may change."
    file = tmp_path / "elsewhere" / "precious.txt"
    file.parent.mkdir()
    file.write_text("mine\n")
    yield file
    assert file.read_text() == "mine\n" and os.listdir(file.parent) == ["precious.txt"]


# --- standing in a folder

def repository(folder, **config):
    "A repository of one file, with what its configuration says besides."
    run = lambda *words: subprocess.run(["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *words],
                                        check=True, capture_output=True, text=True).stdout.strip()
    folder.mkdir(exist_ok=True)
    run("init", "-q", "-b", "main")
    (folder / "a.txt").write_text("one")
    run("add", "a.txt")
    run("commit", "-q", "-m", "one")
    return run


def test_the_commit_is_told_and_nothing_of_the_repositorys_configuration_runs(tmp_path, monkeypatch):
    folder, hit = tmp_path / "received", tmp_path / "hit"
    git = repository(folder)
    commit = git("rev-parse", "HEAD")
    with open(folder / ".git" / "config", "a") as f:
        f.write(f'[core]\n\tfsmonitor = touch {hit}\n\thooksPath = {tmp_path}\n\tsshCommand = touch {hit}\n[filter '
                f'"x"]\n\tclean = touch {hit}\n\tprocess = touch {hit}\n')
    (folder / ".git" / "info" / "attributes").write_text("* filter=x\n")
    (tmp_path / "post-index-change").write_text(f"#!/bin/sh\ntouch {hit}\n")
    os.chmod(tmp_path / "post-index-change", 0o755)
    monkeypatch.chdir(folder)
    assert git_commit() == commit
    (folder / "a.txt").write_text("two")
    os.utime(folder / "a.txt", (1, 1))
    assert (git_commit() == f"{commit}-dirty" and versions()["git_commit"] == f"{commit}-dirty"
            and not hit.exists())


def test_the_commit_of_packed_refs_worktrees_and_places_without_one(tmp_path):
    git = repository(tmp_path / "r")
    commit = git("rev-parse", "HEAD")
    git("worktree", "add", "-q", str(tmp_path / "w"))
    git("pack-refs", "--all")
    assert git_commit(tmp_path / "r") == git_commit(tmp_path / "w") == commit and git_commit(tmp_path) == ""
    (tmp_path / "r" / ".git" / "HEAD").write_text("ref: refs/heads/../../../../secret\n")
    (tmp_path / "secret").write_text("a" * 40)
    assert git_commit(tmp_path / "r") == ""


def project(folder, mode=0o755):
    for kind in ("experiments", "runs"): (folder / "nbs" / kind).mkdir(parents=True)
    (folder / "nbs" / "experiments" / "digits-dmp.yaml").write_text("method: pretrain\n")
    nbformat.write(new_notebook(cells=[new_code_cell(f"open({str(folder / 'hit')!r}, 'w')")]),
                   folder / "nbs" / "runs" / "compare.ipynb")
    folder.chmod(mode)
    return folder


def test_a_project_that_all_users_can_write_is_not_used_and_that_is_said_once(tmp_path, monkeypatch, capsys):
    shared = project(tmp_path / "shared", 0o1777)
    (shared / "mine").mkdir()
    monkeypatch.chdir(shared / "mine")
    assert (project_root() == shared / "mine"
            and named_files("runs")["compare"] == paths.shipped_folder("runs") / "compare.ipynb")
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.chdir(shared)                                                      # to stand in it is no reason either
    assert named_files("experiments")["digits-dmp"] == paths.shipped_folder("experiments") / "digits-dmp.yaml"
    monkeypatch.setenv("DMP_WB_PROJECT", str(shared))
    monkeypatch.chdir(tmp_path)
    assert (project_root() == shared
            and named_files("experiments")["digits-dmp"] == shared / "nbs" / "experiments" / "digits-dmp.yaml")


def test_a_project_and_files_of_another_user_are_not_used(tmp_path, monkeypatch, capsys):
    folder = project(tmp_path / "p")
    monkeypatch.chdir(folder)
    assert named_files("runs")["compare"] == folder / "nbs" / "runs" / "compare.ipynb"
    (folder / "nbs" / "runs" / "compare.ipynb").chmod(0o666)
    assert (named_files("runs")["compare"] == paths.shipped_folder("runs") / "compare.ipynb"
            and "can be written by all users" in capsys.readouterr().err)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    assert (foreign(folder) == "belongs to another user"
            and named_files("experiments")["digits-dmp"] == paths.shipped_folder("experiments") / "digits-dmp.yaml")


def test_to_compare_executes_the_notebook_that_ships_in_a_folder_without_modules(tmp_path, monkeypatch):
    import papermill

    from dmp_wb import cli
    folder, asked = project(tmp_path / "p"), []
    monkeypatch.chdir(folder)
    (folder / "torch.py").write_text(f"open({str(folder / 'hit')!r}, 'w')")
    def execute(notebook, output, given, cwd=None, **_):
        asked.append((Path(notebook), cwd))
        Path(output).with_suffix(".html").write_text("page")
    monkeypatch.setattr(papermill, "execute_notebook", execute)
    cli.compare(["digits-base"], output=Path("a.html"))
    cli.compare(["digits-base"], output=Path("b.html"), notebook="compare")       # unless asked
    assert asked[0][0] == paths.shipped_folder("runs") / "compare.ipynb" and asked[0][1] not in (None, str(folder))
    assert asked[1] == (folder / "nbs" / "runs" / "compare.ipynb", None) and (folder / "a.html").read_text() == "page"


def test_processes_of_this_package_take_no_modules_from_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert paths.safe_path() == {"PYTHONSAFEPATH": "1"}
    if not hasattr(sys.flags, "safe_path"): return   # Python 3.10
    (tmp_path / "typer.py").write_text("print('hit')")
    done = subprocess.run([sys.executable, "-m", "dmp_wb", "--version"],
                          env={**os.environ, **paths.safe_path(), "PYTHONPATH": str(Path(wb.__file__).parent.parent)},
                          capture_output=True, text=True)
    assert done.stdout.strip() == wb.__version__


# --- links, pipes and names of other files

def test_what_is_written_in_place_goes_through_no_link_and_no_pipe(tmp_path, precious):
    for name in ("metrics.jsonl", ".lock", LOG_FILE): (tmp_path / name).symlink_to(precious)
    os.mkfifo(tmp_path / "pipe")
    for write in (lambda: append_text(tmp_path / "metrics.jsonl", "x"), lambda: run_lock(tmp_path).__enter__(),
                  lambda: open_to_append(tmp_path / LOG_FILE), lambda: append_text(tmp_path / "pipe", "x"),
                  lambda: locked(tmp_path / "pipe", "it").__enter__()):
        with pytest.raises(BadInput, match="is a (link|pipe).*: expected a regular file"): write()


def test_what_is_no_lock_is_not_emptied(tmp_path, precious):
    os.link(precious, tmp_path / ".lock")
    with pytest.raises(BadInput, match="is no lock of dmp_wb"), run_lock(tmp_path): pass
    (tmp_path / ".lock").unlink()
    for before in ("", "process 1 on elsewhere"):
        (tmp_path / ".lock").write_text(before)
        with run_lock(tmp_path): assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
        assert (tmp_path / ".lock").read_text() == ""


def test_lines_are_not_added_to_another_name_of_the_file(tmp_path, precious):
    os.link(precious, tmp_path / "metrics.jsonl")
    append_text(tmp_path / "metrics.jsonl", "a\n")
    assert (tmp_path / "metrics.jsonl").read_text() == "mine\na\n"


def test_files_written_as_a_whole_replace_a_link_and_prepared_names_are_not_used(tmp_path, precious, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask of other threads"))
    for name in ("summary.json", ".progress.json"): (tmp_path / name).symlink_to(precious)
    for pid in (os.getpid(), ""): (tmp_path / f"..progress.json.{pid}.tmp").symlink_to(precious)
    (tmp_path / ".progress.json.tmp").symlink_to(precious)
    write_json(tmp_path / "summary.json", {})
    write_progress(tmp_path / ".progress.json", {"n": 1})
    assert (json.loads((tmp_path / ".progress.json").read_text()) == {"n": 1}
            and not (tmp_path / "summary.json").is_symlink())
    (tmp_path / "model").symlink_to(precious.parent)
    with atomic_folder(tmp_path / "model") as tmp: (tmp / "a").write_text("x")
    assert os.listdir(tmp_path / "model") == ["a"] and not list(tmp_path.glob(".model*"))


def test_files_have_the_usual_mode_in_many_threads(tmp_path):
    def write(i):
        with atomic_folder(tmp_path / f"f{i}") as tmp: write_atomic(tmp / "x", "x")
    threads = [threading.Thread(target=write, args=(i,)) for i in range(20)]
    for t in threads: t.start()
    for t in threads: t.join()
    (tmp_path / "usual").mkdir()
    (tmp_path / "usual" / "x").write_text("x")
    modes = lambda folder: (stat.S_IMODE(folder.stat().st_mode), stat.S_IMODE((folder / "x").stat().st_mode))
    assert {modes(tmp_path / f"f{i}") for i in range(20)} == {modes(tmp_path / "usual")}


TREE = {"model": {"w": torch.ones(2)}}


def test_only_checkpoints_are_removed_and_only_real_ones(tmp_path, precious):
    run = tmp_path / "run"
    (run / "checkpoints" / "step-0000001").mkdir(parents=True)
    (run / "checkpoints" / "step-0000001" / "notes.txt").write_text("mine")
    (run / "checkpoints" / "step-0000002").symlink_to(precious.parent)
    (run / "checkpoints" / ".step-0000002.x.tmp").symlink_to(precious.parent)
    (run / "checkpoints" / "step-two").mkdir()
    for step in (3, 4, 5): save_checkpoint(run, step, TREE, keep_last=1)
    drop_checkpoints_after(run, 0)
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"step-0000001", "step-0000002", ".step-0000002.x.tmp",
                                                                 "step-two"}
    with pytest.raises(BadInput, match="step-0000001 is there, and is no checkpoint that this run has written"):
        save_checkpoint(run, 1, TREE)


def test_a_link_named_checkpoints_removes_nothing_elsewhere(tmp_path):
    other, archive, run = tmp_path / "other", tmp_path / "archive", tmp_path / "received"
    for step in (1, 2): save_checkpoint(other, step, TREE)
    (other / "config.yaml").write_text("")
    run.mkdir()
    (run / "checkpoints").symlink_to(other / "checkpoints")
    with pytest.raises(BadInput, match="leads to the checkpoints of another run"):
        save_checkpoint(run, 3, TREE, keep_last=1)
    drop_checkpoints_after(run, 0)
    assert [p.name for p in list_checkpoints(other)] == ["step-0000001", "step-0000002"]
    for step in (1, 2): save_checkpoint(archive, step, TREE)                       # such as were put aside
    (run / "checkpoints").unlink()
    (run / "checkpoints").symlink_to(archive / "checkpoints")
    with pytest.warns(UserWarning, match="held 2 checkpoints before"): save_checkpoint(run, 3, TREE, keep_last=1)
    save_checkpoint(run, 4, TREE, keep_last=1)
    assert [p.name for p in list_checkpoints(archive)] == ["step-0000001", "step-0000002", "step-0000004"]


def test_checkpoints_on_another_disk_are_written_pruned_and_resumed(tmp_path):
    disk, run = tmp_path / "disk", tmp_path / "run"
    disk.mkdir(), run.mkdir()
    (run / "checkpoints").symlink_to(disk)
    exp = wb.load_experiment("digits-quick",
                             ["train.steps=6", "train.checkpoint_every=2", "train.batch_size=8", "train.log_every=2",
                              "train.cpu=true", "train.log_with=null", "model.hidden_size=32", "model.num_layers=1",
                              "model.num_attention_heads=2"])
    done = wb.train(exp, folder=run)
    assert (done.finished and [p.name for p in list_checkpoints(run)] == ["step-0000004", "step-0000006"]
            == sorted(p.name for p in disk.glob("step-*")) and (run / "checkpoints").is_symlink())
    drop_checkpoints_after(run, 4)
    assert [p.name for p in list_checkpoints(run)] == ["step-0000004"]


# --- sweeps

def notebook(folder, code="x = 1"):
    cell = new_code_cell(code)
    cell.metadata.tags = ["parameters"]
    return write_atomic(folder / "tiny.ipynb", nbformat.writes(new_notebook(cells=[cell])))


@pytest.mark.parametrize("name", [LOG_FILE, NOTEBOOK_FILE, ".progress.json", ".run.lock", ".sweep/lock",
                                  ".sweep/jobs/1_0_log.out"])
def test_a_sweep_goes_through_no_link(tmp_path, precious, name):
    link = tmp_path / "t" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(precious)
    with pytest.raises(BadInput, match="is a link: expected a regular file"):
        sweep.sweep(notebook(tmp_path), folder=tmp_path / "t")


@pytest.mark.parametrize("name", [".sweep", ".sweep/jobs", "x=1"])
def test_a_sweep_has_its_folders_in_itself(tmp_path, precious, name):
    link = tmp_path / "t" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(precious.parent)
    with pytest.raises(BadInput, match="is a link: expected a folder of the sweep itself"):
        sweep.sweep(notebook(tmp_path), grid={"x": [1, 2]}, folder=tmp_path / "t")


def test_pickles_and_notebooks_that_wait_in_a_sweeps_folder_are_not_used(tmp_path):
    jobs, own = tmp_path / "t" / ".sweep" / "jobs", notebook(tmp_path)
    jobs.mkdir(parents=True)
    for number in (1, 99999): (jobs / f"{number}_submitted.pkl").write_bytes(pickle.dumps("code"))
    (jobs / "99999_0_result.pkl").write_bytes(pickle.dumps("code"))
    (jobs / "5_0_log.err").write_text("what an earlier job said")
    batch_jobs.clear_jobs(jobs, "local")
    assert [p.name for p in jobs.iterdir()] == ["5_0_log.err"]
    planted = jobs.parent / f"tiny-{checksum(own.read_text())}.ipynb"
    planted.write_text("code of others")
    assert sweep.keep_copy(own, jobs.parent) == planted and planted.read_text() == own.read_text()


def test_jobs_on_a_cluster_that_are_under_way_keep_their_pickles(tmp_path, monkeypatch):
    for job in ("17_0", "18"): (tmp_path / f"{job}_submitted.pkl").write_bytes(b"")
    monkeypatch.setattr(batch_jobs.shutil, "which", lambda name: name)
    monkeypatch.setattr(batch_jobs, "job_states", lambda jobs: {"17_0": "PENDING", "18": "GONE"})
    batch_jobs.clear_jobs(tmp_path, "slurm")
    assert [p.name for p in tmp_path.iterdir()] == ["17_0_submitted.pkl"]
    monkeypatch.setattr(batch_jobs, "job_states", lambda jobs: dict.fromkeys(jobs, "UNKNOWN"))
    with pytest.raises(BadInput, match="squeue does not say"): batch_jobs.clear_jobs(tmp_path, "slurm")


@pytest.mark.parametrize("name", ["../out", "/abs", "a/../../b", "~root", ".hidden", "a\nb", "a\x1b[2J", "a\u2028b",
                                  "a\\b", ""])
def test_names_stay_inside_and_hold_no_control_characters(name):
    with pytest.raises(BadInput, match="expected a folder name that stays inside"):
        plan.check_name(name, "the name of the sweep")


@pytest.mark.parametrize("options,folder,name", [
    ({"partition": "gpu\ntouch hit"}, "t", "t"), ({"comment": "a\rb"}, "t", "t"),
    ({"srun_args": ["--x", "a\nb"]}, "t", "t"), ({"additional_parameters": {"mail-type": "END\nhit"}}, "t", "t"),
    ({"additional_parameters": {"x\nhit": 1}}, "t", "t"), ({"additional_parameters": {"x --wrap": 1}}, "t", "t"),
    ({}, "t", "a\nhit"), ({}, "a\nhit", "t"), ({}, "a%j", "t"),
])
def test_nothing_becomes_a_line_of_a_jobs_script(tmp_path, monkeypatch, options, folder, name):
    monkeypatch.setattr("shutil.which", lambda name, **_: name)
    with pytest.raises(BadInput, match="expected (no control characters|no %|options of sbatch)"):
        slurm_executor(tmp_path / folder, name, 1, options)


def test_lines_of_set_up_and_tear_down_are_shell_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name, **_: name)
    text = slurm_executor(tmp_path, "a 'b'", 1, {"setup": ["if true\nthen module load cuda\nfi"], "teardown": "a\nb",
                                                 "constraint": "a&b"})._executor._make_submission_file_text("x", "1")
    assert "then module load cuda\n" in text and "\na\nb" in text


# --- pages

HOSTILE = (
    '<meta http-equiv="refresh" content="0; url=//evil"><form action="//evil"><input name=q></form>'
    '<base href="//evil"><iframe src="//evil"></iframe><object data="//evil"></object>\n'
    '<embed src="//evil">'
    '<script>evil()</script><img src=x onerror="evil()"><a href="javascript:evil()">x</a>'
    '<a href=" java&#10;script:evil()">x</a><a href="data:text/html,evil">x</a><svg onload="evil()"><script>'
    'evil()</script></svg>\n'
    '<div style="position:fixed; background:url(//evil)" onclick="evil()">x</div>'
    '<link rel=stylesheet href="//evil"><math><mtext><table><mglyph><style><img src=x onerror=evil()></style>'
    '</table></mtext></math>')


def assert_harmless(html):
    import html.parser as parsing

    class Look(parsing.HTMLParser):
        def handle_starttag(self, tag, attrs):
            assert tag not in ("meta", "form", "input", "base", "iframe", "object", "embed", "script", "style", "link",
                               "svg", "math", "button"), tag
            for name, value in attrs:
                assert not name.startswith("on") and "evil" not in (value or ""), (tag, name, value)
    Look().feed(html)


def test_nothing_on_a_page_runs_loads_or_leads_away(tmp_path):
    outputs = [new_output("display_data", {"text/html": HOSTILE}), new_output("display_data", {
        "text/markdown": HOSTILE + "\n\n[x](javascript:evil()) ![x](/etc/passwd) ![x](http://evil/x.png)"}),
               new_output("display_data", {"application/javascript": "evil()"}),
               new_output("error", ename="E", evalue=HOSTILE, traceback=[HOSTILE]), new_output("stream", text=HOSTILE)]
    nb = new_notebook(cells=[new_markdown_cell("# Title\n\n" + HOSTILE), new_code_cell("1", outputs=outputs)])
    nb.metadata["papermill"] = {"parameters": {"x": HOSTILE}}
    page = write_page(nb, tmp_path / "x.html").read_text()
    head, body = page.split("<body>")
    assert_harmless(body)
    for part in ("default-src 'none'", "img-src data:", "form-action 'none'", "base-uri 'none'"): assert part in head
    assert "root:" not in page and "script-src" not in head


def test_a_page_keeps_its_tables_colours_pictures_and_links(tmp_path):
    (tmp_path / "a.png").write_bytes(b"png")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "link.png").symlink_to("/etc/passwd")
    html = (
        '<table><tr><td colspan="2"><b>1</b><br><small>x</small></td></tr></table><span style="color:#fff">■</span><a '
        'href="https://example.org/?a=1">x</a><a href="#part">y</a><details open><summary>s</summary></details>')
    out = harmless(html + '<img alt="a" src="data:image/png;base64,AAAA"><img src="a.png"><img src="secret.txt"><img '
                   'src="link.png"><img src="../../etc/passwd">', (tmp_path,))
    for part in ('<td colspan="2"><b>1</b><br><small>x</small></td>', 'color:#fff', 'href="https://example.org/?a=1"',
                 'href="#part"', "<details open", 'src="data:image/png;base64,AAAA"', "data:image/png;base64,cG5n"):
        assert part in out, part
    assert out.count("src=") == 2
    drawing = new_notebook(cells=[new_code_cell(
        "1", outputs=[new_output("display_data", {"image/svg+xml": "<svg><script>evil()</script></svg>"})])])
    assert 'src="data:image/svg+xml;base64,' in write_page(drawing, tmp_path / "y.html").read_text()


def test_elements_are_found_in_one_pass_whatever_is_left_open():
    assert _each("İ<SVG>a</svg >b<svg>c", "svg", lambda found: f"[{found}]") == "İ[<SVG>a</svg >]b<svg>c"
    assert _each("</svg>" + "<svg " * 200_000, "svg", lambda _: "") == "</svg>" + "<svg " * 200_000


def test_what_a_received_run_says_is_text_in_a_notebook():
    assert ("<script" not in as_text("<script>").data
            and as_text("<a>", "b").data == "<ul><li>&lt;a&gt;</li><li>b</li></ul>")
    facts = RunFacts(HOSTILE, Path("x"), HOSTILE, "failed", 1, 2, 0.5, {}, 0.0, HOSTILE,
                     {"method": "pretrain", "optim.lr": HOSTILE})
    compared = tables.Compared({HOSTILE: facts, "b": dataclasses.replace(facts, config={"method": "pretrain"})})
    for html in (tables.glance_table(compared), tables.differences_table(compared), as_text(*compared.notes).data,
                 tables.metrics_table({HOSTILE: {"fid": 1.0}}, [HOSTILE])):
        assert_harmless(html)
    assert compared.notes


@pytest.mark.parametrize("file", sorted(paths.shipped_folder("runs").glob("*.ipynb")), ids=lambda f: f.stem)
def test_run_notebooks_put_no_words_of_files_into_markup(file):
    for cell in nbformat.read(file, 4).cells:
        if cell.cell_type != "code": continue
        for line in cell.source.splitlines():
            # its words are its own parameters
            if "Markdown(" in line and "{" in line.split("Markdown(", 1)[1].split(", HTML(")[0].split(", as_text(")[0]:
                assert file.stem == "evaluate", line
        assert "Image(filename" not in cell.source and "np.savez" not in cell.source


def test_the_explorer_of_runs_shows_words_of_files_as_text(runs_folder):
    from dmp_wb.look.explore import RunExplorer
    run = runs_folder / "a"
    (run / "figures").mkdir(parents=True)
    (run / "config.yaml").write_text("method: pretrain\ndata: {}\ntrain: {}\n")
    write_json(run / "summary.json",
               {"status": "finished", "figures": {"<img src=x onerror=evil()>": {"frechet": 1.0}}})
    append_text(run / "metrics.jsonl", json.dumps({"step": 1, "<b>loss": 1.0}) + "\n")
    assert "<img" not in (table := RunExplorer([run]).table.value) and "<b>" not in table


def test_figures_are_no_links_and_have_plain_names(tmp_path, precious):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "a.png").symlink_to(precious)
    with pytest.raises(BadInput, match="is a link"): saved_figure(tmp_path, "a")
    assert saved_figure(tmp_path, "b") is None
    save_figure(SimpleNamespace(savefig=lambda buffer, **_: buffer.write(b"x")), tmp_path, "../../out:\n<b>")
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"a.png", "-..-out---b-.png"}


# --- what is loaded

def test_nothing_is_loaded_in_a_way_that_runs_code():
    package = Path(wb.__file__).parent
    text = {f.name: f.read_text() for f in package.glob("*.py")}
    for name, code in text.items():
        for bad in ("allow_pickle=True", "trust_remote_code=True", "TRUST_REMOTE_CODE = True", "yaml.unsafe_load",
                    "yaml.Loader", "FullLoader", "pickle.load", "joblib", "os.umask", "extractall"):
            assert bad not in code, (name, bad)
        for line in code.splitlines():
            if "torch.load(" in line: assert "weights_only=True" in line or "allow_pickled_code" in line, (name, line)
            if "np.load(" in line: assert "allow_pickle=False" in line, (name, line)
            if ".from_pretrained(" in line:
                assert "use_safetensors=True" in line or "trust_remote_code=False" in line, (name, line)
