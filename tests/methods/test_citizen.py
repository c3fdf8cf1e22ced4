"A patch among other libraries: state dicts, accelerate, peft, wrappers, half precision, full disks."
import copy
import errno
import json
import pickle
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate import Accelerator
from backbones import BACKBONES, inputs_for
from conftest import randomise, tiny_diffusers_dit, tiny_dit
from diffusers.training_utils import EMAModel
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_model, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import dmp_wb as wb
from dmp_wb.models.anatomy import unwrap_model
from dmp_wb.core.errors import BadInput
from dmp_wb.models.dit import DiT
from dmp_wb.methods.patches import PATCH_NAME, patches_of
from dmp_wb.methods.weights import adapter_parameters, fingerprint


@torch.no_grad()
def run(model, inputs): return model(inputs[0], timestep=inputs[1], class_labels=inputs[2]).sample


def trained(model, seed=2, config=None, **kw): return randomise(wb.patch(model, config, **kw), 0.5, seed)


def weights_of(model): return {k: v.clone() for k, v in wb.get_patch(model).state_dict().items()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# --- state dicts

@pytest.mark.parametrize("safe", [True, False])
def test_accelerates_save_state_keeps_the_patch(safe, inputs, tmp_path):
    def start():
        model = tiny_dit().train()
        p, accelerator = wb.patch(model), Accelerator(cpu=True)
        return accelerator, *accelerator.prepare(model, torch.optim.AdamW(p.parameters(), 1e-2))
    accelerator, model, optimizer = start()
    for _ in range(3):
        accelerator.backward(model(*inputs).sample.square().mean())
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(tmp_path, safe_serialization=safe)
    want = weights_of(model)
    again, other, _ = start()
    again.load_state(tmp_path)
    assert same(weights_of(other), want) and want["prompts"].abs().sum() > 0


def test_a_state_dict_holds_the_patch_and_loads_it(backbone, inputs, tmp_path):
    trained(backbone)
    want = run(backbone, inputs)
    torch.save(backbone.state_dict(), tmp_path / "m.pt")
    other = randomise(type(backbone).from_config(backbone.config).eval(), seed=7)
    wb.patch(other)
    other.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))
    assert torch.equal(run(other, inputs), want)


def test_a_state_dict_without_the_patch_is_refused_by_name(backbone, inputs, tmp_path):
    plain = {k: v.clone() for k, v in backbone.state_dict().items()}
    trained(backbone)
    want, told = (run(backbone, inputs),
                  "no patch 'default' of this .*, which stays as it is: .*strict=False.* for a plain model's")
    with pytest.warns(UserWarning, match=told), pytest.raises(RuntimeError, match="dmp.default.prompts"):
        backbone.load_state_dict(plain)
    assert torch.equal(run(backbone, inputs), want)
    save_file(plain, tmp_path / "m.safetensors")
    with pytest.warns(UserWarning, match=told), pytest.raises(RuntimeError, match="dmp.default.prompts"):
        load_model(backbone, tmp_path / "m.safetensors")
    with pytest.warns(UserWarning, match=told), pytest.raises(RuntimeError, match="dmp.default.prompts"):
        nn.DataParallel(backbone).load_state_dict({f"module.{k}": v for k, v in plain.items()})
    wb.patch(backbone, name="second")
    only_first = {k: v for k, v in backbone.state_dict().items() if ".second." not in k}
    with pytest.warns(UserWarning, match="no patch 'second'"), pytest.raises(RuntimeError, match="dmp.second.prompts"):
        backbone.load_state_dict(only_first)


def test_a_plain_checkpoint_goes_into_a_patched_model_when_asked(backbone, inputs):
    plain = {k: v.clone() for k, v in backbone.state_dict().items()}
    before = run(backbone, inputs)
    trained(backbone)
    patched, mine = run(backbone, inputs), weights_of(backbone)
    with torch.no_grad(): next(w for n, w in backbone.named_parameters() if not n.startswith(PATCH_NAME)).add_(1)
    with pytest.warns(UserWarning, match="no patch 'default'.*stays as it is"):
        told = backbone.load_state_dict(plain, strict=False)
    assert all(k.startswith(f"{PATCH_NAME}.default.") for k in told.missing_keys) and len(told.missing_keys) == 3
    assert same(weights_of(backbone), mine) and torch.equal(run(backbone, inputs), patched)
    with wb.patch_disabled(backbone): assert torch.equal(run(backbone, inputs), before)


def test_a_piece_of_a_state_dict_loads_in_silence():
    model = tiny_dit()
    trained(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict({"x_embedder.proj.bias": torch.zeros(32)}, strict=False)
        model.load_state_dict({}, strict=False)


@pytest.mark.parametrize("size", ["10GB", "20KB"])
def test_what_save_pretrained_writes_is_the_plain_model(size, backbone, inputs, tmp_path):
    before = run(backbone, inputs)
    trained(backbone)
    backbone.save_pretrained(tmp_path, max_shard_size=size)
    names = "".join(f.read_bytes()[:100_000].decode("latin-1") for f in tmp_path.iterdir())
    assert f"{PATCH_NAME}.default" not in names and (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == "20KB")
    assert torch.equal(run(type(backbone).from_pretrained(tmp_path), inputs), before)
    assert f"{PATCH_NAME}.default.prompts" in backbone.state_dict()


def test_a_pipeline_and_a_compiled_model_save_the_plain_model(tmp_path):
    model = tiny_diffusers_dit()
    trained(model)
    pipe = diffusers.DiTPipeline(torch.compile(model, backend="eager"),
                                 diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=1),
                                 diffusers.DDIMScheduler())
    pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    files = [f.name for f in (tmp_path / "transformer").iterdir()]
    # the pipeline saw which arguments the method takes
    assert all(".fp16" in f for f in files if f.endswith(".safetensors")) and len(files) > 3
    back = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "transformer", variant="fp16")
    assert not patches_of(back) and back.state_dict().keys() == {k for k in model.state_dict()
                                                                 if not k.startswith(PATCH_NAME)}


def test_push_to_hub_sends_the_plain_model(monkeypatch):
    sent = {}
    monkeypatch.setattr(diffusers.utils.hub_utils, "load_or_create_model_card", lambda *args, **kw: ModelCard(""))
    monkeypatch.setattr(diffusers.utils.hub_utils, "create_repo",
                        lambda repo_id, **kw: type("Url", (), {"repo_id": repo_id}))
    monkeypatch.setattr(DiT, "_upload_folder", lambda self, folder, *a, **kw: sent.update(
        {f.name: f.read_bytes() for f in Path(folder).iterdir()}))
    model = tiny_dit()
    trained(model)
    model.push_to_hub("me/model")
    assert (b"x_embedder" in sent["diffusion_pytorch_model.safetensors"]
            and b"prompts" not in sent["diffusion_pytorch_model.safetensors"])


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: AveragedModel(m)],
                         ids=["deepcopy", "pickle", "AveragedModel"])
def test_copies_save_and_load_for_themselves(how, inputs, tmp_path):
    model = tiny_dit()
    trained(model)
    want = run(model, inputs)
    twin = unwrap_model(how(model))
    wb.unpatch(model)
    assert (torch.equal(run(twin, inputs), want) and same(twin.state_dict(), {**twin.state_dict()})
            and len(patches_of(twin)) == 1)
    twin.save_pretrained(tmp_path)
    assert torch.equal(run(DiT.from_pretrained(tmp_path), inputs), run(model, inputs))
    with pytest.warns(UserWarning, match="no patch 'default'"): twin.load_state_dict(model.state_dict(), strict=False)
    wb.unpatch(twin)
    assert "save_pretrained" not in vars(twin) and not twin._load_state_dict_pre_hooks


def test_an_average_of_weights_holds_the_patch(inputs):
    model = tiny_dit()
    trained(model)
    ema = EMAModel(model.parameters(), decay=0.0, model_cls=DiT, model_config=model.config)
    want = weights_of(model)
    with torch.no_grad():
        for w in wb.get_patch(model).parameters(): w.zero_()
    ema.copy_to(model.parameters())
    assert same(weights_of(model), want)


def test_the_fingerprint_of_a_model_does_not_know_its_patch_its_wrapper_or_its_lora(backbone):
    plain = fingerprint(backbone)
    trained(backbone)
    assert fingerprint(backbone) == plain == fingerprint(torch.compile(backbone)) == fingerprint(
        nn.DataParallel(backbone))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "qkv"]), backbone)
    assert fingerprint(backbone) == plain
    with torch.no_grad(): next(w for n, w in backbone.named_parameters() if PATCH_NAME not in n).add_(1)
    assert fingerprint(backbone) != plain


# --- another base of equal shapes

def test_a_patch_on_other_weights_of_equal_shapes_is_a_warning(tmp_path):
    model = tiny_dit()
    trained(model)
    wb.save_patch(model, tmp_path / "p")
    facts = json.loads((tmp_path / "p" / "adapter_config.json").read_text())["base_model"]["fingerprint"]
    assert facts["float32"] == fingerprint(model) and facts.keys() == {"float32", "bfloat16", "float16"}
    other = randomise(tiny_dit(), seed=9)
    with pytest.warns(UserWarning, match=f"made on other weights than this DiT has: expected those with fingerprint "
                      f"{facts['float32']}"):
        wb.load_patch(other, tmp_path / "p")
    assert len(patches_of(other)) == 1
    with pytest.warns(UserWarning, match="made on other weights"):
        wb.load_patch(randomise(tiny_dit(), seed=9).bfloat16(), tmp_path / "p")


@pytest.mark.parametrize("saved,loaded", [("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float32"),
                                          ("float64", "float16"), ("bfloat16", "float16"), ("float32", "float32")])
def test_the_same_weights_in_another_precision_are_the_same_weights(saved, loaded, tmp_path):
    dtype = {k: getattr(torch, k) for k in (saved, loaded)}
    model = tiny_dit().to(dtype[saved])
    wb.patch(model)
    wb.save_patch(model, tmp_path / "p")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wb.load_patch(tiny_dit().to(dtype[loaded]), tmp_path / "p")


def test_a_patch_without_a_fingerprint_loads_in_silence(tmp_path):
    model = tiny_dit()
    wb.patch(model)
    wb.save_patch(model, tmp_path / "p")
    file = tmp_path / "p" / "adapter_config.json"
    facts = json.loads(file.read_text())
    for odd in (None, 5, "x", {}, {"float32": None}, {"nonsense": "x"}):
        facts["base_model"]["fingerprint"] = odd
        file.write_text(json.dumps(facts))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            wb.load_patch(tiny_dit(), tmp_path / "p")
        assert len(told) == (odd == {"float32": None})


# --- half precision

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_patch_of_a_model_in_half_precision_learns_in_float32(dtype, inputs, tmp_path):
    model = tiny_dit().to(dtype).train()
    p = wb.patch(model, wb.DMPConfig(init="random"))
    before = {k: v.clone() for k, v in p.state_dict().items()}
    optimizer, scaler = (torch.optim.AdamW(p.parameters(), 1e-4, weight_decay=0),
                         torch.amp.GradScaler("cpu", init_scale=8.0))
    for _ in range(5):
        loss = model(inputs[0].to(dtype), *inputs[1:]).sample.float().square().mean() + p.balance_loss()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert {w.dtype for w in p.parameters()} == {torch.float32} and model.dtype == dtype
    assert all((v != p.state_dict()[k]).float().mean() > 0.9 for k, v in before.items())
    wb.save_patch(model, tmp_path / "p")
    wb.unpatch(model)
    assert {w.dtype for w in wb.load_patch(model, tmp_path / "p").parameters()} == {torch.float32} and same(
        weights_of(model), p.state_dict())


def test_the_dtype_of_a_patch_is_a_choice(tmp_path, inputs):
    model = tiny_dit().double()
    assert wb.patch(model).prompts.dtype == torch.float64           # never narrower than the backbone
    wb.unpatch(model)
    assert (trained(model, dtype=torch.float32).prompts.dtype == torch.float32
            and run(model, (inputs[0].double(), *inputs[1:])).dtype == torch.float64)
    wb.save_patch(model, tmp_path / "p")
    wb.unpatch(model)
    assert wb.load_patch(model, tmp_path / "p", dtype=torch.bfloat16).gate.weight.dtype == torch.bfloat16
    wb.unpatch(model)
    for odd in (torch.int32, torch.float8_e4m3fn, "float32", 5):
        with pytest.raises(BadInput, match="dtype is .*expected torch.float32"): wb.patch(model, dtype=odd)
    assert not patches_of(model) and all(w.requires_grad for w in model.parameters())


# --- LoRA

LORA = dict(r=2, target_modules=["to_q", "to_v"])


def sd3(): return BACKBONES["SD3Transformer2DModel"]()


def learns(model):
    "By kind, how many parameters learn and how many there are."
    adapters, found = adapter_parameters(model), {}
    for n, w in model.named_parameters():
        kind = "patch" if n.startswith(PATCH_NAME) else "LoRA" if n in adapters else "backbone"
        a, b = found.get(kind, (0, 0))
        found[kind] = a + w.requires_grad, b + 1
    return found


@pytest.mark.parametrize("lora_first", [False, True])
def test_a_patch_and_a_lora_leave_each_other_learning(lora_first):
    model = sd3().train()
    n = len(list(model.parameters()))
    steps = [lambda: trained(model), lambda: model.add_adapter(LoraConfig(**LORA))]
    for step in reversed(steps) if lora_first else steps: step()
    lora = len(adapter_parameters(model))
    assert lora and learns(model) == {"patch": (3, 3), "LoRA": (lora, lora), "backbone": (0, n)}
    model(**inputs_for("SD3Transformer2DModel")).sample.square().mean().backward()
    assert wb.get_patch(model).prompts.grad is not None
    wb.unpatch(model)
    assert learns(model) == {"LoRA": (lora, lora), "backbone": (0, n)}


def test_unpatch_gives_back_what_the_patch_took_and_no_more():
    model = sd3()
    frozen = {n for n, _ in list(model.named_parameters())[::3]}
    for name in frozen: model.get_parameter(name).requires_grad_(False)
    wb.patch(model)
    model.add_adapter(LoraConfig(**LORA))
    model.delete_adapters("default")                               # the LoRA has gone again, its layers have not
    wb.unpatch(model)
    assert {n.replace(".base_layer.", ".") for n, w in model.named_parameters() if not w.requires_grad} == frozen
    model = sd3()
    model.add_adapter(LoraConfig(**LORA))
    wb.patch(model)
    model.unload_lora()
    wb.unpatch(model)
    assert not any(w.requires_grad for w in model.parameters())     # as the LoRA had it


def test_biases_that_a_lora_trains_are_the_loras(inputs):
    model = tiny_diffusers_dit()
    model = get_peft_model(model, LoraConfig(bias="lora_only", **LORA))
    before = {n for n, w in model.named_parameters() if w.requires_grad}
    wb.patch(model)
    assert (any("bias" in n for n in before)
            and {n for n, w in model.named_parameters() if w.requires_grad and f".{PATCH_NAME}." not in n} == before)


@pytest.mark.filterwarnings("error")
def test_an_optimiser_that_holds_nothing_that_learns_is_told(inputs):
    model = tiny_diffusers_dit().train()
    p = wb.patch(model)
    get_peft_model(model, LoraConfig(**LORA))                        # freezes whatever is not its own
    step = lambda *more: (model(*inputs).sample.square().mean().backward(),
                          (o := torch.optim.SGD([*p.parameters(), *more], 0.1)).step(), o.step())
    with pytest.raises(UserWarning, match="holds the patch 'default', which learns nothing: its parameters are frozen, "
                       "as peft's get_peft_model"):
        step()
    with pytest.raises(UserWarning, match="learns nothing"): step(*(w for w in model.parameters() if w.requires_grad))
    p.requires_grad_(True)
    step()
    with pytest.raises(UserWarning, match="the loss does not depend on it"), wb.patch_disabled(model):
        p.zero_grad()
        step()
    wb.unpatch(model)
    p.zero_grad()
    with pytest.raises(UserWarning, match="not on its model any more"): step()


@pytest.mark.filterwarnings("error")
def test_an_optimiser_that_was_made_before_the_patch_is_told(inputs):
    model = tiny_diffusers_dit().train()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    patch = wb.patch(model)
    model(*inputs).sample.square().mean().backward()
    with pytest.raises(UserWarning, match="parameters of a patched DiTTransformer2DModel, all of them frozen"):
        optimizer.step()
    torch.optim.AdamW(patch.parameters(), 0.1).step()


# --- wrapped models

class Mine(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.net = model

    def forward(self, *args): return self.net(*args)


WRAPS = {"compile": lambda m: torch.compile(m, backend="eager"), "DataParallel": nn.DataParallel,
         "AveragedModel": AveragedModel,
         "peft": lambda m: get_peft_model(m, LoraConfig(r=2, target_modules=["qkv"])),
         "two": lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
         "prepared": lambda m: Accelerator(cpu=True).prepare(m)}


@pytest.mark.parametrize("wrap", WRAPS)
def test_every_function_acts_on_the_model_in_a_wrapper(wrap, tmp_path):
    model = WRAPS[wrap](tiny_dit())
    inner = unwrap_model(model)
    assert isinstance(inner, DiT)
    p = wb.patch(model)
    assert wb.get_patch(model) is p is wb.get_patch(inner) and p.model is inner
    wb.save_patch(model, tmp_path / "p")
    with wb.patch_disabled(model): assert not p.enabled
    wb.use_patches(model)
    assert not p.enabled
    wb.use_patches(model, "default")
    assert p.enabled and wb.unpatch(model) is model and not patches_of(inner)
    wb.load_patch(model, tmp_path / "p")
    assert wb.route(model) is wb.get_router(model) is wb.get_router(inner)
    assert wb.unroute(model) is model and wb.get_router(inner) is None
    wb.unpatch(model)
    wb.PromptPatch.from_pretrained(tmp_path / "p", model=model)
    assert wb.get_patch(model).model is inner


def test_a_wrapper_that_took_its_parameters_is_refused_and_all_else_works(tmp_path):
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(tiny_dit())
        before = {n: w.requires_grad for n, w in wrapped.named_parameters()}
        with pytest.raises(BadInput, match="DistributedDataParallel has taken the parameters.*patch the model first, "
                           "then wrap it"):
            wb.patch(wrapped)
        model = tiny_dit()
        p = trained(model)
        wb.save_patch(model, tmp_path / "p")
        with pytest.raises(BadInput, match="patch the model first, then wrap it"):
            wb.load_patch(torch.compile(wrapped), tmp_path / "p")
        assert {n: w.requires_grad for n, w in wrapped.named_parameters()} == before
        model = nn.parallel.DistributedDataParallel(model)
        assert wb.get_patch(model) is p and wb.route(model) and wb.get_router(model)
        wb.save_patch(model, tmp_path / "q")
        assert ((tmp_path / "q" / "adapter_model.safetensors").read_bytes()
                == (tmp_path / "p" / "adapter_model.safetensors").read_bytes())
        assert wb.unpatch(model) is model
    finally: torch.distributed.destroy_process_group()


@pytest.mark.parametrize("call", [wb.get_patch, wb.unpatch, wb.patch, wb.route, wb.unroute, wb.use_patches,
                                  lambda m: wb.save_patch(m, "x"),
                                  lambda m: wb.patch_disabled(m).__enter__()], ids=lambda c: c.__name__)
def test_what_holds_a_model_is_refused_with_the_name_of_the_part(call):
    pipe = diffusers.DiTPipeline(tiny_diffusers_dit(),
                                 diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=1),
                                 diffusers.DDIMScheduler())
    for holder, part in ((pipe, "transformer"), (Mine(tiny_dit()), "net"), (Mine(torch.compile(tiny_dit())), "net"),
                         (Mine(Mine(tiny_dit())), "net.net")):
        with pytest.raises(BadInput, match=rf"did you mean its \.{part}\?") as e: call(holder)
        assert "\n" not in str(e.value)


# --- disks

@pytest.mark.parametrize("where", ["safetensors", "json", "folder"])
def test_a_disk_that_does_not_take_a_patch_is_one_line(where, monkeypatch, tmp_path):
    model = tiny_dit()
    p = trained(model)
    wb.save_patch(model, tmp_path / "p")
    kept = {f.name: f.read_bytes() for f in (tmp_path / "p").iterdir()}
    def full(*args, **kw): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr({"safetensors": "dmp_wb.methods.files.save_file", "json": "dmp_wb.methods.files.write_json",
                         "folder": "dmp_wb.methods.files.atomic_folder"}[where], full)
    randomise(p, seed=5)
    with pytest.raises(BadInput,
                       match="cannot be written to .*: No space left on device; an older one there is untouched"):
        wb.save_patch(model, tmp_path / "p")
    assert ({f.name: f.read_bytes() for f in (tmp_path / "p").iterdir()} == kept
            and [f.name for f in tmp_path.iterdir()] == ["p"])
    if where != "folder":
        with pytest.raises(BadInput, match="No space left"): p.save_pretrained(tmp_path / "hub")
    monkeypatch.undo()
    wb.save_patch(model, tmp_path / "p")                             # there is room again


@pytest.mark.parametrize("name", ["x" * 300, "file/below", "nul\0byte"])
def test_folders_that_cannot_be_are_one_line(name, tmp_path):
    model = tiny_dit()
    wb.patch(model)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written to"): wb.save_patch(model, tmp_path / name)


# --- files of others

@pytest.mark.parametrize("text",
                         ["[" * 50_000, "{" * 50_000, '{"method": "dmp", "base_model": {"class": ' + "[" * 50_000,
                          b"\xff\xfe", "[]", "null", '{"method": "dmp"}',
                          '{"method": "dmp", "base_model": {}, "num_prompts": ' + "9" * 5000 + "}"])
def test_adapter_configs_that_are_none_are_one_line(text, tmp_path):
    model = tiny_dit()
    wb.patch(model)
    wb.save_patch(model, tmp_path / "p")
    (tmp_path / "p" / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadInput) as e: wb.load_patch(tiny_dit(), tmp_path / "p")
    assert "\n" not in str(e.value) and len(str(e.value)) < 1000


@pytest.mark.parametrize("change", [
    dict(num_prompts=10**12), dict(num_prompts=10**30, mode="prepend"), dict(num_prompts=10**9, mode="prepend"),
    dict(input_size=[10**9, 10**9]), dict(depth=[10**30]), dict(depth={"a": 1}),
    dict(depth=1e400), dict(top_k=[1]), dict(mode=["add"]), dict(mode={}), dict(gate_input=None), dict(init=5),
    dict(importance_weight="nan"), dict(noisy_gating=None), dict(num_train_timesteps="9" * 6000),
    dict(depth=list(range(100_000)))])
def test_settings_of_a_patch_that_cannot_be_are_one_line(change, tmp_path):
    model = tiny_dit()
    wb.patch(model)
    wb.save_patch(model, tmp_path / "p")
    file = tmp_path / "p" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    fresh = tiny_dit()
    with pytest.raises(BadInput) as e: wb.load_patch(fresh, tmp_path / "p")
    assert "\n" not in str(e.value) and len(str(e.value)) < 1500 and not patches_of(fresh) and all(
        w.requires_grad for w in fresh.parameters())
