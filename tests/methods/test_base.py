"""The protocol of a method, by one of 35 lines that a user might write:
a scale of each block's output for groups of timesteps."""
import copy
import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import dmp_wb as wb
from dmp_wb.methods import registry
from dmp_wb.methods.base import apply_methods, Method, methods_of, ModuleMethod, Panel
from dmp_wb.methods.registry import method_entry
from dmp_wb.methods.settings import GATES, KINDS


@dataclass
class ScaleConfig:
    groups: int = 8                     # of timesteps that share a scale
    num_train_timesteps: int = 1000

    def check(self):
        if self.groups < 1: raise wb.BadInput(f"groups is {self.groups}: expected at least 1")


class Scale(ModuleMethod):
    Config, freezes, label = ScaleConfig, True, "scaled"

    def __init__(self, model, config):
        super().__init__(model, config)
        self.logs = nn.Parameter(torch.zeros(config.groups, len(self.acts_on(model))))

    def scales(self, timesteps):
        group = (timesteps * self.config.groups / self.config.num_train_timesteps).long()
        return self.logs[group.clamp(0, self.config.groups - 1)].exp()

    def start(self, call): call.state[self.key] = self.scales(call.timestep.to(call.device))

    def after(self, index, x, call): return x * call.state[self.key][:, index, None, None].to(x)

    def losses(self): return {"scale_size": (self.logs.square().mean(), 0.01)}

    def statistics(self): return {"largest_scale": self.logs.detach().exp().max()}

    def learning_rates(self): return [([self.logs], 10.0)]

    def panels(self, timesteps, class_label=0):
        t = torch.as_tensor(timesteps)
        return [Panel("lines", "scales", self.scales(t).detach().cpu(), t,
                      names=[f"block {i}" for i in range(self.logs.shape[1])])]


class SoftMask(nn.Module):
    "A mask that learns: a slope over the timesteps for each channel."
    def __init__(self, config, widths):
        super().__init__()
        self.T, self.slopes = config.num_train_timesteps, nn.ParameterDict({str(w): torch.zeros(w) for w in widths})

    def forward(self, timesteps, channels):
        return torch.sigmoid(4 + self.slopes[str(channels)] * (timesteps[:, None] / self.T - 0.5))


@pytest.fixture(autouse=True)
def registered():
    "For these tests alone."
    tables = (registry._ENTRIES, GATES, KINDS)
    before = [dict(table) for table in tables]
    wb.register_method("scale", Scale)
    wb.register_mask("soft", SoftMask)
    yield
    for table, held in zip(tables, before):
        table.clear()
        table.update(held)


def tiny():
    torch.manual_seed(0)
    model = wb.DiT(sample_size=8, in_channels=1, hidden_size=32, num_layers=2, num_attention_heads=2, num_classes=10)
    for w in model.parameters(): nn.init.normal_(w, std=0.05)
    return model.eval()


def inputs():
    return (torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 400, 999]),
            torch.tensor([1, 2, 10]))


def answer(model):
    with torch.no_grad(): return model(*inputs()).sample


QUICK = ["train.batch_size=16", "train.cpu=true", "train.log_every=1", "train.checkpoint_every=2", "optim.lr=1e-3"]


def quick(name, *more, steps=4):
    return wb.train("digits-finetune", [f"name={name}", *QUICK, f"train.steps={steps}", *more])


def test_a_method_of_ones_own_is_trained_resumed_saved_loaded_sampled_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setenv("DMP_WB_RUNS", str(tmp_path))
    run = quick("unbroken", "methods.scale={groups: 4}")
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert {"scale_size", "largest_scale"} <= rows[-1].keys() and rows[-1]["largest_scale"] > 1
    model = wb.load_model(run.folder)
    scale = methods_of(model)["scale"]
    assert scale.config == ScaleConfig(groups=4) and scale.logs.abs().max() > 0
    # as if it had been stopped, then gone on with
    quick("broken", "methods.scale={groups: 4}", steps=2)
    again = quick("broken", "methods.scale={groups: 4}")
    assert torch.equal(methods_of(wb.load_model(again.folder))["scale"].logs, scale.logs)
    samples = wb.sample_run(run.folder, 2, num_inference_steps=2)
    facts = json.loads((samples / "sampling.json").read_text())
    assert facts["methods"]["scale"]["groups"] == 4 and len(facts["methods"]["scale"]["weights"]) == 16
    from dmp_wb.look.viz import panel_figure
    assert panel_figure(scale.panels(torch.arange(0, 1000, 50))[0]).axes
    assert wb.open_run(run.folder).experiment.method == "scale"


def test_what_a_method_changes_is_there_again_after_save_and_load_and_gone_after_remove(tmp_path):
    model = tiny()
    before, names = answer(model), list(model.state_dict())
    scale = apply_methods(model, {"scale": ScaleConfig()})["scale"]
    assert torch.equal(answer(model), before) and [p for p in model.parameters() if p.requires_grad] == [scale.logs]
    nn.init.normal_(scale.logs)
    changed = answer(model)
    assert not torch.equal(changed, before)
    scale.save(tmp_path / "scale")
    model.save_pretrained(tmp_path / "plain")
    assert torch.equal(answer(wb.DiT.from_pretrained(tmp_path / "plain").eval()), before)
    assert torch.equal(answer(copy.deepcopy(model)), changed)
    scale.remove()
    assert torch.equal(answer(model), before) and list(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters()) and methods_of(model) == {}
    Scale.load(model, tmp_path / "scale")
    assert torch.equal(answer(model), changed)


def test_save_pretrained_leaves_out_what_every_method_holds(tmp_path):
    model = tiny()
    before = answer(model)
    scale = apply_methods(model, {"scale": ScaleConfig()})["scale"]
    wb.patch(model)
    model.save_pretrained(tmp_path / "both")
    wb.unpatch(model)
    model.save_pretrained(tmp_path / "one")
    scale.remove()
    assert "save_pretrained" not in vars(model)
    for name in ("both", "one"): assert torch.equal(answer(wb.DiT.from_pretrained(tmp_path / name).eval()), before)


def test_a_file_of_other_tensors_leaves_the_model_alone(tmp_path):
    model = tiny()
    apply_methods(model, {"scale": ScaleConfig(groups=3)})["scale"].save(tmp_path / "scale")
    facts = json.loads((tmp_path / "scale" / "config.json").read_text())
    (tmp_path / "scale" / "config.json").write_text(json.dumps({**facts, "groups": 5}))
    other = tiny()
    with pytest.raises(wb.BadInput, match="holds other tensors"): Scale.load(other, tmp_path / "scale")
    assert methods_of(other) == {} and torch.equal(answer(other), answer(tiny()))


def test_a_method_that_does_not_fit_takes_those_before_it_off_again():
    model = tiny()
    with pytest.raises(wb.BadInput):
        apply_methods(model, {"scale": ScaleConfig(), "dtr": wb.DTRConfig(sharing_ratio=0.001)})
    assert methods_of(model) == {} and all(p.requires_grad for p in model.parameters())


def test_registration_names_what_is_missing_or_taken():
    class Half:
        Config = ScaleConfig
    with pytest.raises(wb.BadInput, match="has no .*losses"): wb.register_method("half", Half)
    with pytest.raises(wb.BadInput, match="'dmp' is registered already"): wb.register_method("dmp", Scale)
    with pytest.raises(wb.BadInput, match="expected a dataclass"):
        wb.register_method("loose", type("Loose", (Method,), {"Config": dict}))
    with pytest.raises(wb.BadInput, match="the gate 'mlp' is registered already"): wb.register_gate("mlp", nn.Linear)
    with pytest.raises(wb.BadInput, match="the gate 'mine', class dict, has no forward"): wb.register_gate("mine", dict)
    with pytest.raises(wb.BadInput, match="the mask 'mine', class dict, has no forward"): wb.register_mask("mine", dict)
    assert wb.register_method("scale", Scale) == method_entry("scale")            # a cell that is run again


# --- gates and masks by name

def test_a_gate_with_a_hidden_layer_learns_and_comes_back_from_its_files(tmp_path):
    model = tiny()
    before = answer(model)
    p = wb.patch(model, wb.DMPConfig(gate="mlp", gate_hidden=7, gate_input="timestep+condition"))
    assert torch.equal(answer(model), before) and p.gate.hidden_weight.shape == (7, 64)
    assert torch.allclose(p.gates([0, 999], class_labels=[1, 2]), torch.full((2, 2, 16), 1 / 16))
    for w in p.parameters(): nn.init.normal_(w, std=0.5)
    by_hand = torch.cat([_embedding(model, 400),
                         model.condition(torch.tensor([400]), torch.tensor([2]))], 1)
    h = torch.nn.functional.silu(by_hand @ p.gate.hidden_weight.T + p.gate.hidden_bias)
    logits = torch.cat([h, torch.ones(1, 1)], 1) @ p.gate.weight.T + p.gate.bias
    assert torch.allclose(p.gates(400, class_labels=2)[:, 1], logits.softmax(-1), atol=1e-5)
    changed = answer(model)
    model(*inputs()).sample.square().mean().backward()
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in p.parameters())
    wb.save_patch(model, tmp_path / "p")
    wb.unpatch(model)
    assert torch.equal(answer(model), before)
    wb.load_patch(model, tmp_path / "p")
    assert torch.equal(answer(model), changed)


def _embedding(model, t):
    from dmp_wb.models.backbones import anatomy_of
    return anatomy_of(model).embed_timestep(model, torch.tensor([t]))


def test_files_and_facts_of_a_linear_gate_are_those_of_version_0_1(tmp_path):
    model = tiny()
    p = wb.patch(model)
    wb.save_patch(model, tmp_path / "p")
    assert not {"gate", "gate_hidden"} & json.loads((tmp_path / "p" / "adapter_config.json").read_text()).keys()
    assert not {"gate", "gate_hidden"} & p.facts()["default"].keys()


@pytest.mark.parametrize("settings", [{}, {"alpha": 1.0, "sharing_ratio": 0.5},
                                      {"kind": "random", "seed": 5, "sharing_ratio": 0.5}])
def test_the_mask_that_is_drawn_is_the_mask_that_acts(settings):
    model = tiny()
    router = wb.route(model, wb.DTRConfig(**settings))
    seen = []
    handle = model.blocks[0].register_forward_pre_hook(lambda m, a, k: seen.append((a or (k["hidden_states"],))[0]),
                                                       with_kwargs=True)
    answer(model)
    handle.remove()
    drawn = router.panels(inputs()[1])[0].values
    assert torch.equal((seen[0] != 0).all(1).float(), drawn)


def test_a_mask_that_learns_is_trained_and_loaded_with_its_run(tmp_path, monkeypatch):
    monkeypatch.setenv("DMP_WB_RUNS", str(tmp_path))
    run = quick("soft", "methods.dtr={kind: soft}")
    model = wb.load_model(run.folder)
    router = wb.get_router(model)
    width = int(next(iter(router.mask.slopes)))
    assert router.mask.slopes[str(width)].abs().max() > 0
    assert torch.allclose(router.masks([500], width), torch.full((1, width), torch.sigmoid(torch.tensor(4.0)).item()))
    names = list(model.state_dict())
    wb.unroute(model)
    assert not any("mask" in n for n in model.state_dict()) and any("mask" in n for n in names)
    with pytest.raises(wb.BadInput, match="the mask 'soft' is learned"): wb.routing_mask(0, 8, kind="soft")
