"""The command tells a wrong value at once:
before PyTorch is imported, in one line, and with its control characters escaped."""
import os
import subprocess
import sys

import pytest

from dmp_wb import cli
from dmp_wb.cli import base
from dmp_wb.evaluation import evaluate
from dmp_wb.evaluation import extractors
from dmp_wb.core import settings
from dmp_wb.core.errors import BadInput
from dmp_wb.data.cache_facts import CACHE_DTYPES
from dmp_wb.core.registries import EXTRACTORS, METRICS

WRONG = ["train digits-dmp optim.lr=x", "train digits-dmp train.epochs=3", "train nosuch",
         "train digits-dmp base=nosuch", "train digits-dmp schedule.name=x", "train digits-dmp multitask.method=x",
         "run patch -p nosuch 1", "run nosuch", "run patch -p train.step 1", "run patch -p seed x", "sample nosuch 1",
         "sample digits-dmp 0", "sample digits-dmp 1 --sampler x", "sample digits-dmp 1 --guidance-scale -1",
         "sample digits-dmp 1 --batch-size 0", "sample digits-dmp 1 --num-processes 0", "evaluate nosuch",
         "evaluate digits-dmp --extractor x", "evaluate digits-dmp --metrics fid,fidd",
         "evaluate digits-dmp --bootstrap -1", "evaluate digits-dmp --reference /nowhere",
         "needs digits-dmp --reference ./nowhere", "needs digits-dmp --axis snr",
         "compare digits-dmp --reference ../no/where",
         "evaluate x.npz", "guidance nosuch", "guidance digits-dmp -- -1", "guidance digits-dmp --sampler x",
         "compare nosuch", "compare digits-dmp --extractor x", "compare digits-dmp label:nosuch",
         "compare digits-dmp --output x", "compare digits-dmp --dtype float8",
         "latents d e --vae v --size 0", "latents d e --vae v --size 8 --channels 2",
         "latents d e --vae v --size 8 --dtype x", "list x", "list --folder nosuch"]
SCRIPT = """
import shlex, sys
sys.argv[0] = "dmp-wb"
from dmp_wb.cli import main
words = sys.argv[1:]
for line in words:
    sys.argv[1:] = shlex.split(line)
    try: main()
    except SystemExit as e: status = e.code
    print(line, status, *(m for m in ("torch", "diffusers", "accelerate", "papermill") if m in sys.modules), sep="|")
    print("--", file=sys.stderr)
"""


def test_every_command_refuses_a_wrong_value_in_one_line_without_torch(tmp_path):
    done = subprocess.run([sys.executable, "-c", SCRIPT, *WRONG], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "DMP_WB_RUNS": str(tmp_path / "runs")})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{line}|2" for line in WRONG]
    for line, said in zip(WRONG, done.stderr.split("--\n"), strict=False):
        assert said.startswith("error: ") and said.count("\n") == 1, (line, said)
    assert os.listdir(tmp_path) == []


@pytest.fixture
def command(monkeypatch, capsys):
    "Runs the command in this process: its status, and what it printed on stderr."
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["dmp-wb", *words])
        with pytest.raises(SystemExit) as e: cli.main()
        return e.value.code, capsys.readouterr().err
    return run


def test_errors_of_the_system_are_one_line_in_every_command(command, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    for words in (["new", "file/x"], ["new", "x" * 300],
                  ["train", "digits-quick", "train.steps=1", "--folder", "file/x"],
                  ["train", "digits-quick", "train.steps=1", "name=" + "x" * 300],
                  ["run", "patch", "--folder", "file/x"], ["run", "patch", "--name", "x" * 300],
                  ["list", "--folder", "file/x"],
                  ["compare", "digits-dmp", "--output", "file/x.html", "--num-images", "-1"]):
        status, said = command(*words)
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert status in (1, 2) and len(lines) == 1 and "Traceback" not in said, (words, said)
    monkeypatch.setenv("DMP_WB_RUNS", str(tmp_path / "file"))
    for words in (["list"], ["train", "digits-quick"], ["run", "patch"], ["sample", "nosuch", "1"],
                  ["evaluate", "nosuch"], ["compare", "nosuch"]):
        status, said = command(*words)
        assert status == 2 and "which is a file: expected a folder" in said and said.count("error: ") == 1, (words,
                                                                                                             said)


def test_the_first_line_comes_before_the_work(monkeypatch, capsys):
    monkeypatch.setattr("dmp_wb.training.loop.train", lambda *_: print("work", file=sys.stderr))
    cli.train("digits-quick", ["name=01"])
    assert capsys.readouterr().err.splitlines()[0].startswith("01: ")
    monkeypatch.setenv("RANK", "1")
    cli.train("digits-quick")
    assert capsys.readouterr().err == "work\n"   # one of several processes says nothing


def test_the_names_that_the_command_knows_are_those_of_the_modules():
    assert (tuple(CACHE_DTYPES) == settings.DTYPE_NAMES and extractors.EXTRACTORS is EXTRACTORS
            and evaluate.METRICS is METRICS)


def test_numbers_below_the_least_are_named():
    with pytest.raises(BadInput, match="num_images is 0: expected at least 1"): base._at_least(1, num_images=0)
    with pytest.raises(BadInput, match="guidance_scale is nan: expected a number ≥ 0"):
        base._at_least(0, guidance_scale=float("nan"))
    base._at_least(1, batch_size=None)
