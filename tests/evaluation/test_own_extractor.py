"""An extractor from a file of one's own, the one that fits if none is named, and samples that are drawn already."""
import json
import shutil

import pytest
import torch

import dmp_wb as wb
from dmp_wb import cli
from dmp_wb.core.errors import BadInput, MissingFile
from dmp_wb.core.settings import SamplingConfig
from dmp_wb.evaluation.evaluate import evaluate, evaluate_run, evaluate_samples, samples_of
from dmp_wb.evaluation.extractors import load_extractor, usual_extractor
from dmp_wb.evaluation.sample_files import sample_run
from dmp_wb.store.listing import list_runs

MINE = """
import torch
ran = torch.nn.Identity()
def make_net(): return torch.nn.Flatten()
def broken(): raise RuntimeError("no weights")
def other(): return 3
number = 7
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.delenv("DMP_WB_PLUGINS", raising=False)
    monkeypatch.setenv("DMP_WB_PLUGINS", "")
    (tmp_path / "nets.py").write_text(MINE)
    return tmp_path / "nets.py"


def test_a_network_of_ones_own_comes_from_a_file(mine):
    network = load_extractor(f"{mine}:make_net", "cpu")
    assert network.name == "nets.py:make_net" and network.features(torch.zeros(2, 1, 8, 8)).shape == (2, 64)
    for words, why in ((f"{mine}", "expected .*nets.py:NAME"), (f"{mine}:make_nets", "make_net"),
                       (f"{mine}:broken", "cannot be made: RuntimeError: no weights"),
                       (f"{mine}:other", "gives 3: expected a torch.nn.Module"),
                       (f"{mine}:number", "is 7: expected a function or a network"),
                       (f"{mine.parent / 'no.py'}:x", "no plug-in .*no.py")):
        with pytest.raises(BadInput, match=why): load_extractor(words, "cpu")


def test_the_command_takes_it_and_says_what_is_wrong(mine, monkeypatch, capsys, tmp_path):
    def run(*words):
        monkeypatch.setattr("sys.argv", ["dmp-wb", *words])
        with pytest.raises(SystemExit) as e: cli.main()
        return e.value.code, capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    status, said = run("evaluate", "digits-base", "--extractor", "nets.py:make_net", "--num-images", "6", "--metrics",
                       "kid", "--num-inference-steps", "2")
    assert status == 0 and json.loads(said.out)["extractor"] == "nets.py:make_net"
    for extractor in ("no.py:make_net", "no.py"):
        status, said = run("evaluate", "digits-base", "--extractor", extractor)
        assert status == 2 and "there is no file no.py" in said.err and said.err.count("\n") == 1
    from dmp_wb.cli.looking import _absolute
    assert _absolute("nets.py:make_net") == f"{mine}:make_net" and _absolute("digits") == "digits"


def test_a_received_run_cannot_have_a_file_of_its_own_run(mine, runs_folder, tmp_path):
    shutil.copytree(wb.open_run("digits-base").folder, runs_folder / "received")
    evil = runs_folder / "received" / "evil.py"
    evil.write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\ndef make(): pass\n")
    summary = json.loads((runs_folder / "received" / "summary.json").read_text())
    summary["evaluations"] = [{"fid": 1.0, "guidance_scale": 1.5, "extractor": f"{evil}:make", "num_images": 8}]
    (runs_folder / "received" / "summary.json").write_text(json.dumps(summary))
    list_runs()
    evaluate_run("received", 8, metrics="kid", num_inference_steps=1, quiet=True)
    from dmp_wb.look.tables import evaluations, open_compared
    assert evaluations(open_compared(["received"]))
    assert not (tmp_path / "was-run").exists()


def test_the_extractor_that_fits_is_taken_if_none_is_named(monkeypatch):
    row = evaluate_run("digits-base", 8, metrics="kid", num_inference_steps=1, quiet=True)
    assert row["extractor"] == "digits"
    images = torch.rand(8, 1, 28, 28) * 2 - 1
    assert usual_extractor((1, 8, 8)) == "digits"
    from dmp_wb.evaluation import extractors
    def gone(): raise MissingFile("extractor inception needs its weights")
    monkeypatch.setattr(extractors, "inception_weights", gone)
    why = "expected --extractor, one of .* clip.*FILE.py:NAME.*; extractor inception needs its weights"
    with pytest.raises(MissingFile, match=f"of those that ship, fashion takes 1×28×28 images, .*{why}"):
        evaluate(images, images)
    with pytest.raises(MissingFile, match=f"none of those that ship takes 3×28×28 images: {why}"):
        usual_extractor((3, 28, 28))


def test_samples_that_are_drawn_are_measured_as_they_are(runs_folder):
    shutil.copytree(wb.open_run("digits-base").folder, runs_folder / "mine")
    with pytest.raises(MissingFile, match="dmp-wb sample mine 1000 draws some"): samples_of("mine")
    how = {"num_inference_steps": 2, "npz": False, "quiet": True, "sampler": "ddim"}
    sample_run("mine", 8, **how)
    folder = sample_run("mine", 9, guidance_scale=3.0, **how)
    assert samples_of("mine") == folder and samples_of("mine", folder.name) == samples_of("mine", folder)
    row = evaluate_samples("mine", metrics="fid,kid", quiet=True)
    assert (row["guidance_scale"], row["num_inference_steps"]) == (3.0, 2)
    assert (row["num_images"], row["extractor"]) == (9, "digits")
    assert wb.open_run("mine").summary["evaluations"][-1] == row
    same = evaluate_run("mine", 9, metrics="fid,kid", guidance_scale=3.0, num_inference_steps=2, quiet=True)
    assert abs(same["fid"] - row["fid"]) < 0.2   # the files have 8 bits
    with pytest.raises(MissingFile, match="samples is 'nosuch': expected latest or one of .*g3-9"):
        samples_of("mine", "nosuch")
    (folder / "000000.png").unlink()
    with pytest.raises(BadInput, match="holds 8 images of 9: expected all"): evaluate_samples("mine")


def test_samples_go_with_a_run_and_nothing_that_draws(monkeypatch, capsys, tmp_path):
    for words in (["evaluate", "digits-base", "--samples", "latest", "--sampler", "ddim"],
                  ["evaluate", str(tmp_path), "--reference", "digits", "--samples", "latest"]):
        monkeypatch.setattr("sys.argv", ["dmp-wb", *words])
        with pytest.raises(SystemExit): cli.main()
        assert "expected a run, whose images are drawn already" in capsys.readouterr().err


def test_options_of_drawing_have_one_name():
    import inspect
    names = [f for f in SamplingConfig.__dataclass_fields__]
    for command in (cli.sample, cli.evaluate, cli.guidance, cli.compare):
        given = set(inspect.signature(command).parameters)
        assert {"sampler", "num_inference_steps", "seed", "dtype", "tf32"} <= given, command
        assert not given & {"steps", "num_steps", "guidance", "scale"} and {"sampler", "seed"} <= set(names)
