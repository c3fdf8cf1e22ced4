"Models of others: configs and weights that are odd, damaged or hostile, and calls with wrong labels."
import io
import json
import os
import struct
import tarfile
import time
import warnings
from functools import partial

import diffusers
import pytest
import torch
from conftest import randomise, tiny_diffusers_dit, tiny_dit
from safetensors.torch import load_file, save_file

import dmp_wb as wb
from dmp_wb.core.errors import BadInput
from dmp_wb.models.dit import DiT
from dmp_wb.models.weights import read_state_dict


def one_line(call, match="", seconds=5.0):
    started = time.process_time()
    with pytest.raises(BadInput, match=match) as e: call()
    assert "\n" not in str(e.value) and len(str(e.value)) < 1200 and time.process_time() - started < seconds
    return str(e.value)


# --- calls

@pytest.mark.parametrize("labels,match",
                         [([15], "class_labels holds 15: expected 0 to 10, the last being the null class"),
                          ([-1], "class_labels holds -1: expected 0 to 10"), ([1.5], "expected integers"),
                          ([[1]], "one label for each of the 2 samples"), ([1, 2, 3], "one label for each"),
                          ("cat", "class_labels is cat: expected whole numbers"), ([True, False], "expected integers")])
def test_labels_that_cannot_be_are_one_line(labels, match):
    model = tiny_dit()
    given = torch.tensor(labels) if not isinstance(labels, str) else labels
    one_line(lambda: model(torch.zeros(2, 1, 8, 8), timestep=torch.tensor([1, 2]), class_labels=given), match)


def test_labels_that_can_be_go_on_as_they_were():
    model = tiny_dit()
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    with torch.no_grad():
        want = model(x, t, torch.tensor([3, 10])).sample
        for labels in ([3, 10], torch.tensor([3, 1000]), torch.tensor([3, 10], dtype=torch.int16), (3, 10)):
            assert torch.equal(model(x, t, labels).sample, want)
        assert torch.equal(model(x, t, 3).sample, model(x, t, torch.tensor([3, 3])).sample)
    one_line(lambda: model(x[0], t), "hidden_states has shape")
    one_line(lambda: model(x, torch.tensor([1, 2, 3])), "timestep has shape")


def test_a_label_check_waits_for_no_device():
    "Shapes and dtypes alone are looked at: a tensor without numbers passes."
    model = tiny_dit().to("meta")
    assert model(torch.zeros(2, 1, 8, 8, device="meta"), torch.ones(2, device="meta"),
                 torch.ones(2, dtype=torch.long, device="meta")).sample.shape == (2, 1, 8, 8)


def test_more_classes_than_the_pipelines_null_class_is_a_warning_that_names_it():
    sizes = dict(sample_size=8, in_channels=1, hidden_size=16, num_layers=1, num_attention_heads=2)
    with pytest.warns(UserWarning,
                      match="has 1001 classes: diffusers' DiTPipeline takes class 1000 for the null class"):
        DiT(num_classes=1001, **sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in (None, 0, 10, 1000): DiT(num_classes=n, **sizes)


@pytest.mark.parametrize("model_dtype,compute", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16),
                                                 (torch.bfloat16, torch.bfloat16)])
@pytest.mark.parametrize("patched", ["no", "before", "after"])
def test_layerwise_casting(model_dtype, compute, patched):
    "Weights stored in eight bits: the outputs are those of the same weights without it, but for rounding."
    def make():
        model = tiny_dit().to(model_dtype)
        return model
    model, plain = make(), make()
    if patched == "before": randomise(wb.patch(model), 0.3)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute)
    if patched == "after": randomise(wb.patch(model), 0.3)
    if patched != "no": randomise(wb.patch(plain), 0.3)
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([1, 500]), torch.tensor([1, 2])
    with torch.no_grad():
        got, want = model(x.to(compute), t, y).sample.float(), plain(x.to(model_dtype), t, y).sample.float()
    assert got.isfinite().all() and (got - want).abs().mean() < 0.1 * want.abs().mean()
    assert model.blocks[0].mlp.fc1.weight.dtype == torch.float8_e4m3fn
    if patched != "no": assert wb.get_patch(model).prompts.dtype == torch.float32


# --- configs

HUGE = [dict(num_layers=10**7), dict(num_layers=10**30), dict(hidden_size=10**9), dict(sample_size=10**6),
        dict(sample_size=[10**5, 10**5]), dict(num_attention_heads=10**8), dict(num_classes=10**12),
        dict(in_channels=10**9), dict(patch_size=0), dict(patch_size=2.0), dict(hidden_size="32"),
        dict(hidden_size=None), dict(num_layers=[3]), dict(num_layers=True), dict(sample_size="8"),
        dict(sample_size=[8]),
        dict(sample_size={"a": 1}), dict(mlp_ratio=1e400), dict(mlp_ratio=-1), dict(mlp_ratio="4"),
        dict(num_classes=-5), dict(num_classes="10"), dict(out_channels=10**9), dict(hidden_size=48),
        dict(num_layers=2),
        dict(num_layers=5), dict(num_attention_heads=0), dict(num_classes=1.5), dict(mlp_ratio=float("nan"))]


@pytest.mark.parametrize("change", HUGE, ids=str)
def test_configs_of_no_model_are_refused_before_one_is_made(change, tmp_path):
    tiny_dit().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    one_line(lambda: wb.load_model(tmp_path, device="cpu"))


@pytest.mark.parametrize("change", [dict(num_layers=10**7), dict(num_attention_heads=10**9), dict(sample_size=10**8),
                                    dict(num_layers="x"), dict(num_embeds_ada_norm=10**12),
                                    dict(attention_head_dim=None), dict(norm_type=5)], ids=str)
def test_configs_of_diffusers_classes_too(change, tmp_path):
    tiny_diffusers_dit().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    one_line(lambda: wb.load_model(tmp_path, device="cpu"))


@pytest.mark.parametrize("name", ["ModelMixin", "DiTPipeline", "AutoModel", "nosuch", "__init__", "schedulers", "", 5,
                                  None, ["DiT"], "x" * 10_000])
def test_classes_that_are_no_models_are_one_line(name, tmp_path):
    tiny_dit().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
    one_line(lambda: wb.load_model(tmp_path, device="cpu"))


@pytest.mark.parametrize("text", ["[" * 50_000, "{" * 50_000, "null", "", "\x00",
                                  '{"_class_name": "DiT", "num_layers": ' + "9" * 5000 + "}"], ids=lambda t: t[:12])
def test_model_configs_that_are_no_json_are_one_line(text, tmp_path):
    tiny_dit().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    one_line(lambda: wb.load_model(tmp_path, device="cpu"))


HEADERS = [b"", b"\0" * 8, struct.pack("<Q", 1 << 62), struct.pack("<Q", 10) + b"x",
           struct.pack("<Q", 50_000) + b"[" * 50_000, struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 9) + b'{"a": 55}',
           b"\x80\x04." + b"\0" * 50]


@pytest.mark.parametrize("content", HEADERS)
def test_damaged_safetensors_are_one_line(content, tmp_path):
    tiny_dit().save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(content)
    one_line(lambda: wb.load_model(tmp_path, device="cpu"))
    (tmp_path / "x.safetensors").write_bytes(content)
    one_line(lambda: wb.load_model(tmp_path / "x.safetensors", device="cpu"))


def test_a_good_model_with_shards_still_loads_beside_a_pipe(tmp_path):
    model = tiny_dit()
    os.mkfifo(tmp_path / "x.safetensors")
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("diffusion*.safetensors"))) > 1
    back = wb.load_model(tmp_path, device="cpu").state_dict()
    assert all(torch.equal(v, back[k]) for k, v in model.state_dict().items())


def test_a_run_that_is_its_own_base_is_one_line(runs_folder):
    for name, base in (("a", "b"), ("b", "a")):
        (runs_folder / name / "patch").mkdir(parents=True)
        (runs_folder / name / "patch" / "adapter_config.json").write_text("{}")
        (runs_folder / name / "config.yaml").write_text(
            f"name: {name}\nmethod: dmp\nbase: {base}\ndata: {{name: digits}}\n")
    one_line(lambda: wb.load_model("a", device="cpu"), "is the base of its own base")


# --- official checkpoints

def odd(change):
    state = dict(tiny_dit().state_dict())
    change(state)
    return state


@pytest.mark.parametrize("change", [
    lambda s: s.update({"blocks.99999999.x": torch.zeros(1)}), lambda s: s.update({"blocks.x.y": torch.zeros(1)}),
    lambda s: s.update({"blocks." + "9" * 5000 + ".y": torch.zeros(1)}),
    lambda s: s.update({"x_embedder.proj.weight": torch.zeros(())}),
    lambda s: s.update({"x_embedder.proj.weight": torch.zeros(0, 1, 2, 2)}),
    lambda s: s.update({"x_embedder.proj.weight": torch.zeros(32, 1, 0, 0)}),
    lambda s: s.update(pos_embed=torch.zeros(16)), lambda s: s.update(pos_embed=torch.zeros(1, 0, 32)),
    lambda s: s.update({"final_layer.linear.weight": torch.zeros(4)}),
    lambda s: s.update({"blocks.0.mlp.fc1.weight": torch.zeros(0, 32)}),
    lambda s: s.update({"y_embedder.embedding_table.weight": torch.zeros(5)}),
    lambda s: s.update({"blocks.0.mlp.fc1.bias": torch.zeros(128, dtype=torch.complex64)}),
    lambda s: s.update({"blocks.0.mlp.fc1.bias": torch.zeros(128).to_sparse()}),
    lambda s: s.update({"blocks.0.mlp.fc1.bias": torch.zeros(128, dtype=torch.int64)}),
    lambda s: s.update({"blocks.0.routing._unit_mapping": torch.zeros(3)}),
    lambda s: [s.pop(k) for k in list(s) if k.startswith("blocks.1")],
    lambda s: s.clear() or s.update({5: torch.zeros(1)})])
def test_odd_official_checkpoints_are_one_line(change):
    one_line(lambda: DiT.from_official(odd(change), 4))


def test_a_tar_or_an_empty_pickle_is_one_line(tmp_path):
    with tarfile.open(tmp_path / "a.pt", "w") as tar:
        for name in ("storages", "tensors", "pickle"): tar.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    (tmp_path / "b.pt").write_bytes(b"\x80\x04.")
    (tmp_path / "c.pt").write_bytes(b"")
    (tmp_path / "d.pt").write_bytes(b"PK\x03\x04" + b"\0" * 60)
    for name in "abcd":
        for allowed in (False, True):
            one_line(partial(read_state_dict, tmp_path / f"{name}.pt", allowed), "cannot be read as a checkpoint")


def test_the_state_dict_of_a_patched_model_is_an_official_checkpoint_with_a_patch(tmp_path):
    model = tiny_dit()
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    randomise(wb.patch(model), 0.5)
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    assert "dmp.default.prompts" in load_file(tmp_path / "m.safetensors")
    with pytest.warns(UserWarning, match="holds the patch default as well, which is left aside"):
        back = wb.load_model(tmp_path / "m.safetensors", num_attention_heads=4, device="cpu")
    assert (all(torch.equal(v, plain[k]) for k, v in back.state_dict().items())
            and back.state_dict().keys() == plain.keys())


# --- the hub

def test_a_model_of_the_hub_comes_from_safetensors_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(diffusers.AutoModel, "from_pretrained", lambda *args, **kw: asked.append(kw) or tiny_dit())
    wb.load_model("someone/model", device="cpu")
    assert asked == [{"subfolder": "transformer", "use_safetensors": True}]
