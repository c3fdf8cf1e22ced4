"What people write is what is held: YAML, key=value words, references, words in quotes."
import dataclasses
import json
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dmp_wb as wb
from dmp_wb.look.tables import open_compared
from dmp_wb.config import Experiment, keys, load_experiment, to_yaml
from dmp_wb.core.errors import BadInput, MissingFile
from dmp_wb.core.paths import assets_folder
from dmp_wb.store.listing import run_folder
from dmp_wb.batch.projects import new_project
from dmp_wb.batch.notebook import listed
from dmp_wb.core.settings import ModelConfig
from dmp_wb.methods.settings import DMPConfig, DTRConfig
from dmp_wb.batch.plan import plan, read_sweep
from dmp_wb.training.setup import new_run
from dmp_wb.core.values import convert, parse_yaml, plain, read_yaml, split_words, unquoted

TEXTS = ["01", "1.10", "1e3", "12:30", "no", "v2 #3", "0123", "2024_05", "photos #1", "0x1f", "true", "null", "1_000",
         ".5", "a: b", "[a]", "{a", "- x", "*x", "&x", "2026-02-30", "=", " x ", "it's", "ünï", "+1"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_key_of_type_str_holds_what_was_written_in_an_override(text):
    exp = load_experiment("digits-dmp", [f"name={text}", f"data.name={text}", f"data.split={text}"])
    assert (exp.name, exp.data.name, exp.data.split) == (text, text, text)


@pytest.mark.parametrize("text", ["01", "0012", "1.10", "1e3", "12:30", "no", "0123", "2024_05", "0x1f", "true",
                                  "1_000", "null", "2026-02-30", "+1", "v2", "{x: 1}", "[1, 2]"])
def test_a_key_of_type_str_holds_what_was_written_in_a_file(tmp_path, text):
    (tmp_path / "x.yaml").write_text(
        f"method: finetune\nbase: digits-base\nname: '{text}'\ndata: {{split: \"{text}\"}}\n")
    exp = load_experiment(tmp_path / "x.yaml")
    assert (exp.name, exp.data.split) == (text, text)
    if text[0] not in "{[":
        (tmp_path / "x.yaml").write_text(
            f"method: finetune\nbase: digits-base\nname: {text}\ndata:\n  split: {text}   # said so\n")
        assert (load_experiment(tmp_path / "x.yaml").name, exp.data.split) == (text, text)


@given(st.text(st.characters(exclude_categories=("Cc", "Zl", "Zp", "Cs")), min_size=1))
def test_any_text_survives_an_override_and_a_file(text):
    if text[0] == text[-1] and text[0] in "'\"" or "${" in text or text.startswith("~"): return
    exp = load_experiment(Experiment(model=ModelConfig(name="DiT-S/2")), [f"data.split={text}"])
    assert exp.data.split == text and plain(parse_yaml(to_yaml(exp), "it"))["data"]["split"] == text


def test_text_may_be_null_where_the_key_may_and_quotes_make_it_text():
    load = lambda text: load_experiment("digits-pretrain", [f"data.vae={text}"]).data.vae
    assert [load(t) for t in ("null", "Null", "~", "", "'null'", '"Null"', "none", "01")] == [None] * 4 + [
        "null", "Null", "none", "01"]
    assert (unquoted("'01'") == "01" and unquoted("it's") == "it's" and unquoted("'a' b'") == "'a' b'"
            and unquoted("'") == "'")


def test_numbers_truth_values_and_lists_are_read_by_the_type_of_their_key():
    exp = load_experiment("digits-dmp",
                          ["seed=010", "train.steps=1_000", "optim.lr=1e-3", "optim.weight_decay=1", "train.cpu=yes",
                           "data.flip=FALSE", "optim.betas=[.8,0.99]", "patch.depth=[0, 1]", "patch.input_size=[4,4]",
                           "optim.max_grad_norm=null", "train.keep_every=~", "optim={gate_lr_scale: 3, name: adamw}"])
    assert (exp.seed, exp.train.steps, exp.optim.lr, exp.optim.weight_decay, exp.train.cpu, exp.data.flip,
            exp.optim.betas) == (10, 1000, 1e-3, 1.0, True, False, (0.8, 0.99))
    assert (exp.patch.depth, exp.patch.input_size, exp.optim.max_grad_norm, exp.train.keep_every,
            exp.patch.gate_lr_scale) == ([0, 1], [4, 4], None, None, 3.0)
    assert [load_experiment("digits-dmp", [f"patch.depth={t}"]).patch.depth for t in ("3", "null", "all")] == [3, None,
                                                                                                               "all"]
    for text in ("12:30", "1e3", "0b1", "१२", "9" * 5000, "", "1 2"):
        with pytest.raises(BadInput, match="expected int"): load_experiment("digits-dmp", [f"train.steps={text}"])
    for text in ("inf", "-inf", "nan", ".nan", ".inf", "1e999", "Infinity"):
        for key in (k for k, t in keys().items() if t in (float, float | None)):
            with pytest.raises(BadInput, match=f"{key} is -?(inf|nan): expected a finite number"):
                load_experiment("digits-dmp", [f"{key}={text}"])


def test_what_has_no_type_is_read_as_json_would():
    read = lambda text: plain(parse_yaml(text, "it"))
    assert [read(t) for t in ("1", "-1.5e3", "true", "False", "null", "[1, {a: 2}]", ".5", "+1", "1.")] == [
        1, -1500.0, True, False, None, [1, {"a": 2}], 0.5, 1, 1.0]
    for text in ("0123", "1_0", "12:30", "no", "nan", ".inf", "0x1", "2026-02-30", "00", "1e999", "none"):
        assert read(text) == text
    assert (read("'1'") == "1" and convert(parse_yaml("0123", "it"), typing.Any) == "0123"
            and convert(parse_yaml("{a: 1}", "it"), dict[str, int]) == {"a": 1})
    assert (convert(parse_yaml("[01, no]", "it"), list[str]) == ["01", "no"]
            and convert(parse_yaml("[01, null]", "it"), list[int | None]) == [1, None])


def test_numbers_of_numpy_and_tensors_are_numbers():
    exp = load_experiment(Experiment(model=ModelConfig(name="DiT-S/2"), seed=np.int64(3)), ())
    assert type(exp.seed) is int and exp.seed == 3
    exp.optim.lr, exp.train.steps, exp.train.cpu, exp.optim.betas = (np.float32(0.5), torch.tensor(7), np.bool_(True),
                                                                     np.array([0.5, 0.75]))
    exp = load_experiment(exp)
    assert ((exp.optim.lr, exp.train.steps, exp.train.cpu, exp.optim.betas) == (0.5, 7, True, (0.5, 0.75))
            and "steps: 7" in to_yaml(exp))


def test_a_value_may_name_another_key_of_the_same_file_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    file = tmp_path / "x.yaml"
    load = lambda text, *overrides: (file.write_text(f"method: finetune\nbase: digits-base\n{text}\n"),
                                     load_experiment(file, overrides))[1]
    exp = load("seed: 007\nname: run-${seed}-${optim.lr}\noptim: {lr: 2e-4, weight_decay: '${optim.lr}'}",
               "optim.lr=3e-4")
    assert (exp.name, exp.optim.weight_decay) == ("run-007-3e-4", 3e-4)
    assert load("name: a\\${seed}").name == "a${seed}"
    file.write_text(to_yaml(load("name: a\\${seed}")))
    assert load_experiment(file).name == "a${seed}" and load_experiment(load_experiment(file)).name == "a${seed}"
    for text in ("${oc.env:HF_TOKEN}", "${oc.env:HF_TOKEN,x}", "${env:HF_TOKEN}", "${HF_TOKEN}", "${HOME}/photos",
                 "${oc.decode:1}", "${oc.create:x}", "${oc.dict.keys:data}", "${a:${seed}}", "${", "${}", "${seed",
                 "${data}", "${.seed}", "${seed[0]}", "x${oc.env:HF_TOKEN}"):
        for attempt in (lambda t=text: load(f"name: '{t}'"), lambda t=text: load("", f"data.name=someone/{t}"),
                        lambda t=text: load(f"patch: {{depth: ['{t}']}}"), lambda t=text: load("", f"data.vae={t}")):
            with pytest.raises(BadInput) as e: attempt()
            assert "secret" not in str(e.value) and "\n" not in str(e.value) and "${" in str(e.value), str(e.value)
    for text in ("name: ${name}", "name: ${data.name}\ndata: {name: '${data.split}', split: '${name}'}"):
        with pytest.raises(BadInput, match="leads back to itself"): load(text)
    names = [k for k, t in keys().items() if t is str and not k.startswith("methods.")]
    with pytest.raises(BadInput, match="expected at most 10,000"):
        load("", *(f"{a}={'${' + b + '}' * 1}{'${' + b + '}'}" for a, b in zip(names, names[1:], strict=False)),
             f"{names[-1]}={'x' * 9999}")


@pytest.mark.parametrize("text,why", [
    ("a: " + "[" * 100_000, "levels deep"), ("[" * 40 + "]" * 40 + "\n", "not a mapping"),
    ("- " * 100_000, "levels deep"), ("{a: " * 100_000, "levels deep"), ("? " * 100_000, "levels deep"),
    ("a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [{', '.join(['*b' + str(i - 1) if i else '*a'] * 10)}]\n"
                                for i in range(12)), "more than 100,000 values"),
    ("a: &a {x: *a}", "more than|no anchor"), ("name: !!python/object/apply:os.system [x]", "tag"),
    ("name: !!python/name:os.system x", "tag"), ("name: !!binary x", "tag"), ("name: &x 1\nname: 2", "given twice"),
    ("? [a]\n: 1", "key"), ("a: 1\n---\nb: 2", "several documents"), ("name: *x", "no anchor"), ("<<: 3", "mapping"),
    ("", "is empty"), ("# nothing\n", "is empty"), ("name: \x01", "YAML"),
    ("x" * 2**20 + "x", "1,048,577 bytes: expected at most 1,048,576"),
    ("- a", "not a mapping"), ("just text", "not a mapping"), ("data: 3", "data is 3: expected a group"),
    ("data: {3: 4}", "unknown key 'data.3'"), ("name: [a]", r"name is \['a'\]: expected str"),
    ("format: 3", "config format 3"), ("seed: '${seed'", "expected the name"),
])
def test_a_file_that_is_no_experiment_is_refused_in_one_line_and_at_once(tmp_path, text, why):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(BadInput, match=why) as e: load_experiment(tmp_path / "x.yaml")
    assert "x.yaml" in str(e.value) and len(str(e.value)) < 2000


def test_what_is_no_file_or_no_text_is_not_read(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(BadInput, match="not text in UTF-8"): load_experiment(tmp_path / "x.yaml")
    with pytest.raises(MissingFile, match="no file .*: expected a sweep in YAML"): read_yaml(tmp_path, "a sweep")


def test_anchors_aliases_and_merged_mappings_are_read():
    tree = plain(parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]\nd: {<<: [*a, {z: 4}]}", "it"))
    assert tree == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": [{"x": 1, "y": 2}] * 2,
                    "d": {"x": 1, "y": 2, "z": 4}}


@pytest.mark.parametrize("key,ours", [
    ("optim.learning_rate", "optim.lr"), ("learning_rate", "optim.lr"), ("train.epochs", "train.steps"),
    ("train.max_steps", "train.steps"), ("num_train_epochs", "train.steps"), ("batch", "train.batch_size"),
    ("per_device_train_batch_size", "train.batch_size"), ("weight_decay", "optim.weight_decay"),
    ("warmup", "optim.lr_warmup_steps"), ("train.num_workers", "data.num_workers"), ("resolution", "data.size"),
    ("train.fp16", "train.mixed_precision"), ("--learning-rate".strip("-"), "optim.lr"), ("output_dir", "name"),
    ("lr", "optim.lr"), ("steps", "train.steps"), ("train.lr", "optim.lr"), ("batch_size", "train.batch_size")])
def test_names_of_other_trainers_lead_to_ours(key, ours):
    with pytest.raises(BadInput, match=f"unknown key '{key}': did you mean '{ours}'"):
        load_experiment("digits-quick", [f"{key}=1"])


def test_every_name_in_the_table_of_others_leads_to_a_key_that_exists():
    from dmp_wb.config import leaves, OTHER_NAMES
    words = [w for names in OTHER_NAMES.values() for w in names.split()]
    assert set(OTHER_NAMES) <= set(leaves()) and len(words) == len(set(words))


@pytest.mark.parametrize("key", [k for k, t in keys().items() if t in (str, str | None)])
def test_control_characters_are_refused_in_every_text(key):
    for bad in ("a\nb", "a\x1b[2J", "a\x00", "a\u2028b", "a\x7f", "\udc80"):
        with pytest.raises(BadInput, match="expected no control characters"):
            load_experiment("digits-dmp", [f"{key}={bad}"])


def test_a_tilde_in_a_path_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.yaml").write_text("method: finetune\nbase: ~/base\ndata: {name: ~/photos, vae: ~/vae}\n")
    exp = load_experiment("~/x.yaml", ["data.text_encoder=~/text"])
    assert (exp.base, exp.data.name, exp.data.vae, exp.data.text_encoder) == tuple(
        f"{tmp_path}/{n}" for n in ("base", "photos", "vae", "text"))


def test_words_are_split_as_a_shell_splits_them():
    assert split_words("""a=1  b='my photos' c="x y"z name=v2\\ #3 d=it's\\ 'e f' # g""".replace("it's", "its")) == [
        "a=1", "b=my photos", "c=x yz", "name=v2 #3", "d=its e f", "#", "g"]
    with pytest.raises(BadInput, match="expected a quote at both ends"): split_words("a='b")


WITHOUT_TORCH = '''
import sys
from dmp_wb.core import BadInput
def fails(f, *args):
    try: f(*args)
    except (BadInput, SystemExit): return
    raise AssertionError(f"{f} {args} is accepted")
import dmp_wb as wb
from dmp_wb.config import load_experiment, to_yaml
to_yaml(load_experiment("digits-dmp", ["optim.lr=2e-4"]))
for wrong in ("optim.lr=x", "objective.weighting=x", "multitask.method=Nope", "schedule.name=x", "patch.mode=x",
              "routing.kind=x", "model.name=x", "data.channels=2", "train.steps=0"):
    fails(load_experiment, "digits-pretrain", [wrong])
load_experiment("digits-dmp", ["multitask.method=PCGrad"])
wb.DMPConfig(num_prompts=4).check(), wb.DTRConfig().check(), wb.ModelConfig(name="DiT-S/2").check(), wb.Experiment
found = sorted(m for m in ("torch", "diffusers", "transformers", "accelerate", "torchjd", "numpy") if m in sys.modules)
assert not found, found
'''


def test_an_experiment_is_read_and_a_wrong_value_refused_without_torch():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_names_that_settings_know_are_those_that_there_are():
    import torchjd.aggregation as A

    from dmp_wb.core import settings
    from dmp_wb.diffusion import objectives   # noqa: F401   fills the table
    assert settings.aggregators() == sorted(
        n for n, c in vars(A).items()
        if isinstance(c, type) and issubclass(c, A.Aggregator) and not n.endswith(("Aggregator", "Weighting")))
    assert all(map(callable, settings.WEIGHTINGS.values())) and settings.WEIGHTINGS is settings.WEIGHTINGS


def test_settings_take_numbers_of_numpy_and_hold_those_of_python():
    patch = DMPConfig(num_prompts=np.int64(4), top_k=torch.tensor(2), depth=[np.int32(0), 1],
                      importance_weight=np.float32(0.5), noisy_gating=np.bool_(True))
    patch.check()
    assert (json.dumps(dataclasses.asdict(patch)) and patch.patched_blocks(3) == [0, 1]
            and type(patch.num_prompts) is int and patch.noisy_gating is True)
    route = DTRConfig(sharing_ratio=np.float64(0.5), seed=np.int64(3), num_train_timesteps=np.int16(100))
    route.check()
    assert json.dumps(dataclasses.asdict(route))
    with pytest.raises(BadInput, match="num_prompts is 2.5"): DMPConfig(num_prompts=np.float64(2.5)).check()


@pytest.fixture
def notebook(tmp_path):
    "A run notebook with parameters of each kind."
    def cell(source, **metadata):
        return {"cell_type": "code", "id": f"c{len(source)}", "metadata": metadata, "outputs": [],
                "execution_count": None, "source": source}
    parameters = cell("experiment = 'digits-dmp'\noverrides = ''\nlabel = ''\nsteps = 10\nrate = 0.5\nflag = "
                      "False\nanything = None\nwords = []", tags=["parameters"])
    file = tmp_path / "n.ipynb"
    file.write_text(json.dumps({"cells": [parameters], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return file


def test_parameters_of_a_sweep_have_the_types_of_the_notebook_and_of_the_experiment(notebook, tmp_path):
    def planned(**texts):
        return plan(notebook, {k.replace("__", "."): unquoted(v) for k, v in texts.items()})[0].parameters
    for text in ("01", "1e3", "no", "none", "1_0", "a b", "true"): assert planned(label=text)["label"] == text
    assert planned(steps="20", rate="1e-3", flag="yes", anything="none") == {"steps": 20, "rate": 1e-3, "flag": True,
                                                                             "anything": None}
    assert [planned(anything=t)["anything"] for t in ("5", "05", "1e3", "true", "null", "'5'", "x y")] == [
        5, "05", 1000.0, True, None, "5", "x y"]
    words = planned(name="01", optim__lr="1e-4", data__vae="none", data__name="my photos", train__cpu="yes",
                    seed="7")["overrides"]
    assert words == ["name=01", "optim.lr=0.0001", "data.vae=null", "data.name=my photos", "train.cpu=true", "seed=7"]
    exp = load_experiment("digits-dmp", words)
    assert (exp.name, exp.data.name, exp.data.vae, exp.train.cpu) == ("01", "my photos", None, True)
    two = plan(notebook, grid={"name": [unquoted("01"), unquoted("1")]})
    assert [p.name for p in two] == ["name=01",
                                     "name=1"] and [p.parameters["overrides"] for p in two] == [["name=01"], ["name=1"]]
    for text in ("'x'", '"', "null", "~", "", "it's", "a${seed}".replace("$", "\\$")):
        words = plan(notebook, {"data.split": text})[0].parameters["overrides"]
        assert load_experiment("digits-dmp", words).data.split == text.replace("\\$", "$")
    assert plan(notebook, {"steps": np.int64(3), "rate": np.float32(0.5)})[0].parameters == {"steps": 3, "rate": 0.5}
    (tmp_path / "s.yaml").write_text(
        f"name: 0012\nnotebook: {notebook}\nparameters: {{label: 0012, steps: 5, overrides: \"data.name='my photos' "
        f"seed=1\", data.split: '${{name}}'}}\ngrid: {{name: [01, 1e3], optim.lr: [1e-4, 2e-4]}}\n")
    given = read_sweep(tmp_path / "s.yaml")
    runs = plan(given["notebook"], given["parameters"], given["grid"])
    assert (given["name"] == "0012" and [p.name for p in runs][:2] == ["name=01,lr=0.0001", "name=01,lr=0.0002"]
            and runs[-1].name == "name=1e3,lr=0.0002")
    assert runs[0].parameters == {"label": "0012", "steps": 5, "overrides": [
        "data.name=my photos", "seed=1", "data.split=0012", "name=01", "optim.lr=0.0001"]}


@pytest.mark.parametrize("text,why",
                         [("a: " + "[" * 100_000, "levels deep"), ("name: ${oc.env:HOME}", "expected the name"),
                          ("parameters: {x: '${HOME}'}", "no key of this file"), ("", "is empty"),
                          ("name: [1]", "expected text"), ("name: ${name}", "itself"), ("grid: 3", "grid is 3")])
def test_a_file_that_is_no_sweep_is_refused_in_one_line(tmp_path, text, why):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(BadInput, match=why) as e: read_sweep(tmp_path / "s.yaml")
    assert "s.yaml" in str(e.value)


def test_words_with_blanks_reach_an_experiment_from_a_parameter_of_a_notebook():
    given = "train.steps=2 data.name='my photos' name=\"a b\""
    assert listed(given) == ["train.steps=2", "data.name=my photos",
                             "name=a b"] and listed(["a b", 3]) == ["a b", "3"] and listed(None) == []
    exp = load_experiment("digits-quick", given)
    assert (exp.train.steps, exp.data.name, exp.name) == (2, "my photos", "a b")


def test_a_tilde_is_the_home_folder_wherever_a_path_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(assets_folder() / "digits-dmp", tmp_path / "mine")
    assert (run_folder("~/mine") == tmp_path / "mine" and wb.open_run("~/mine").folder == tmp_path / "mine"
            and new_run(Experiment(), "~/runs/x").folder == tmp_path / "runs" / "x")
    model = wb.load_model("~/mine")
    wb.save_patch(model, "~/patch")
    assert (tmp_path / "patch").is_dir() and not Path("~").exists()
    wb.unpatch(model)
    wb.load_patch(model, "~/patch")
    assert (list(open_compared(["~/mine"]).runs) == ["mine"] and new_project("~/project")[0]
            and (tmp_path / "project" / "nbs").is_dir())
    (tmp_path / "labels.txt").write_text("1 2")
    assert wb.sample_run("~/mine", 2, "~/samples", "~/labels.txt", num_inference_steps=2, npz=False,
                         quiet=True) == tmp_path / "samples"
    assert wb.evaluate("~/samples", None, metrics="is", splits=1, quiet=True)["num_images"] == 2
