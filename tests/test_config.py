import pytest

from dmp_wb.config import Experiment, load_experiment, to_yaml
from dmp_wb.core.errors import BadInput, MissingFile
from dmp_wb.core.paths import project_root
from dmp_wb.core.settings import ModelConfig


@pytest.mark.parametrize("file", sorted((project_root() / "nbs" / "experiments").glob("*.yaml")), ids=lambda f: f.stem)
def test_shipped_experiments_load(file):
    exp = load_experiment(file)
    assert exp.name == file.stem and load_experiment(file.stem) == exp


def test_round_trip(tmp_path):
    exp = load_experiment("digits-dmp",
                          ["optim.lr=3e-4", "optim.betas=[0.8,0.9]", "train.steps=7", "optim.max_grad_norm=null"])
    assert (exp.optim.lr == 3e-4 and exp.optim.betas == (0.8, 0.9) and exp.train.steps == 7
            and exp.optim.max_grad_norm is None)
    (tmp_path / "x.yaml").write_text(to_yaml(exp))
    assert load_experiment(tmp_path / "x.yaml") == exp
    assert load_experiment(exp, ["seed=3"]).seed == 3 and exp.seed == 0


def test_prompt_tuning_has_no_gate():
    assert load_experiment("digits-prompt-tuning").patch.gate_input == "none"


MISTAKES = {
    "optim.learning_rate=1": "unknown key 'optim.learning_rate'",
    "optm.lr=1": "did you mean 'optim.lr'",
    "lr=1": "did you mean 'optim.lr'",
    "train.step=1": "did you mean 'train.steps'",
    "optim.lr.x=1": "optim.lr is {'x': 1}: expected float",
    "train.steps=many": "train.steps is 'many': expected int",
    "train.steps=1.5": "train.steps is 1.5: expected int",
    "train.steps=null": "train.steps is None: expected int",
    "optim.lr=fast": "optim.lr is 'fast': expected float",
    "train.cpu=perhaps": "train.cpu is 'perhaps': expected bool",
    "optim=3": "optim is 3: expected a group of keys (optim.name, …)",
    "data=digits": "data is 'digits': expected a group of keys (data.name, …)",
    "train.steps=0": "train.steps is 0: expected at least 1",
    "optim.lr=-1": "optim.lr is -1.0: expected a number > 0",
    "optim.lr=nan": "optim.lr is nan",
    "train.label_dropout=1": "train.label_dropout is 1.0",
    "train.ema_decay=2": "train.ema_decay is 2.0",
    "optim.betas=[1,2]": "optim.betas is (1.0, 2.0): expected two numbers in [0, 1)",
    "optim.betas=[0.9]": "optim.betas is [0.9]: expected tuple[float, float]",
    "optim.lr=inf": "optim.lr is inf",
    "model.num_layers=0": "model.num_layers is 0: expected at least 1",
    "model.name=DiT-M/2": "unknown model.name 'DiT-M/2'",
    "optim.lr_scheduler=cosin": "did you mean 'cosine'",
    "train.mixed_precision=bf61": "did you mean 'bf16'",
    "method=dpm": "did you mean 'dmp'",
    "method=finetune": "base is None: expected the model that finetune starts from",
    "method=dmp": "base is None: expected the model that dmp starts from",
    "objective.weighting=minsnr": "did you mean 'min-snr'",
    "patch.gate_input=time": "unknown gate_input 'time'",
    "train.gradient_accumulation_steps=3": "multiple of train.gradient_accumulation_steps 3",
    "name=../../etc": "name is '../../etc': expected a folder name below runs/",
    "name=/etc": "name is '/etc'",
    "optim.lr": "has no '='",
    "optim.betas=[1": "cannot be read",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_mistakes_are_one_clear_line(override):
    with pytest.raises(BadInput) as e: load_experiment(Experiment(model=ModelConfig(name="DiT-S/2")), [override])
    assert MISTAKES[override] in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("text,match", [
    ("optim: {lr: [", "not valid YAML"), ("- a\n- b", "not a mapping"), ("optm: {lr: 1}", "did you mean 'optim.lr'"),
    ("train: {steps: x}", "x.yaml: train.steps is 'x': expected int"),
])
def test_mistakes_in_a_file_name_it(tmp_path, text, match):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(BadInput, match=match) as e: load_experiment(tmp_path / "x.yaml")
    assert "x.yaml" in str(e.value) and "\n" not in str(e.value)


def test_unknown_experiment():
    with pytest.raises(BadInput, match="did you mean 'digits-pretrain'"): load_experiment("digits-pretran")
    with pytest.raises(MissingFile, match="no folder nowhere"): load_experiment("nowhere/x.yaml")


def test_a_path_is_suggested_by_its_name():
    with pytest.raises(BadInput, match="did you mean 'digits-dmp'"): load_experiment("nbs/experiments/digits-dpm.yaml")


def test_sizes_are_needed():
    with pytest.raises(BadInput, match="model.patch_size is missing"): load_experiment(Experiment())
