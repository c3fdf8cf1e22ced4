"""Patching and routing on tiny models of every supported class, held
against formulas written out here and tensors caught inside the models."""
import contextlib
import copy
import pickle

import pytest
import torch
from accelerate import cpu_offload_with_hook
from backbones import BACKBONES, INPUT_SIZE, SCALE, inputs_for, output
from conftest import randomise

import dmp_wb as wb
from dmp_wb.models.backbones import anatomy_of
from dmp_wb.core.errors import BadInput
from dmp_wb.methods.hooks import HOOKS_NAME
from dmp_wb.methods.patches import PATCH_NAME, patches_of

NAMES = list(BACKBONES)
every = pytest.mark.parametrize("name", NAMES)
PREPENDABLE = [n for n in NAMES if n in ("DiT", "DiTTransformer2DModel", "PixArtTransformer2DModel",
                                         "SD3Transformer2DModel", "AuraFlowTransformer2DModel")]
TEXT = {"AuraFlowTransformer2DModel": 8 + 5}   # registers and text before the image in its single blocks


def config(name, **changes): return wb.DMPConfig(input_size=INPUT_SIZE.get(name), **changes)


def patched(name, model, std=0.3, patch_name="default", **changes):
    return randomise(wb.patch(model, config(name, **changes), patch_name), std, 2)


def tokens(x): return x.flatten(2).transpose(1, 2) if x.ndim == 4 else x   # a feature map's positions, row by row


def text_length(name, module): return TEXT.get(name, 0) if "Single" in type(module).__name__ else 0


@contextlib.contextmanager
def watched(modules, outputs=False):
    """What reaches each module, before any hook that is there and after all of them, and what it answers, likewise;
    call it before patching or routing."""
    seen = {i: {} for i in range(len(modules))}
    handles = []
    for i, m in enumerate(modules):
        def record(key, i=i):
            return lambda mod, args, kwargs, *out: seen[i].__setitem__(
                key, out[0] if out else kwargs.get("hidden_states", args[0] if args else None))
        handles.append(m.register_forward_pre_hook(record("raw"), with_kwargs=True))
        plain = m.forward
        def forward(*args, _plain=plain, _i=i, **kwargs):
            seen[_i]["entered"] = kwargs.get("hidden_states", args[0] if args else None)
            seen[_i]["answer"] = _plain(*args, **kwargs)
            return seen[_i]["answer"]
        m.forward = forward
        handles.append((m, record("left")))
    yield seen, lambda: [m.register_forward_hook(r, with_kwargs=True) for m, r in handles[1::2]]
    for h in handles[::2]: h.remove()
    for m in modules: del m.forward


def test_every_promised_class_is_supported():
    promised = {"DiT", "DiTTransformer2DModel", "PixArtTransformer2DModel", "SanaTransformer2DModel",
                "HunyuanDiT2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel",
                "AuraFlowTransformer2DModel", "CogVideoXTransformer3DModel", "WanTransformer3DModel", "UNet2DModel",
                "UNet2DConditionModel"}
    assert promised <= set(wb.supported_models()) and promised == {n.split("-")[0] for n in NAMES}


@every
def test_anatomy_agrees_with_what_diffusers_records(name):
    from diffusers.hooks._helpers import TransformerBlockRegistry
    model = BACKBONES[name]()
    anatomy, known = anatomy_of(model), 0
    for block in anatomy.blocks(model):
        with contextlib.suppress(ValueError):
            record = TransformerBlockRegistry.get(type(block))
            known += 1
            assert (record.hidden_states_argument_name == anatomy.tokens_argument
                    and record.return_hidden_states_index == anatomy.output_index(block))
    assert known or name.split("-")[0] in ("DiT", "SanaTransformer2DModel", "HunyuanDiT2DModel",
                                           "AuraFlowTransformer2DModel", "UNet2DModel", "UNet2DConditionModel")


# --- patching

@every
def test_fresh_patch_changes_no_bit_and_unpatch_restores(name):
    model, kwargs = BACKBONES[name](), inputs_for(name)
    before, keys, modules = output(model, kwargs), list(model.state_dict()), [n for n, _ in model.named_modules()]
    # PyTorch takes another kernel for some frozen weights and rounds differently
    frozen = output(model.requires_grad_(False), kwargs)
    p = wb.patch(model.requires_grad_(True), config(name))
    assert torch.equal(output(model, kwargs), frozen) and torch.allclose(frozen, before, atol=1e-6)
    assert [k for k in model.state_dict() if not k.startswith(f"{PATCH_NAME}.")] == keys
    assert {n for n, w in model.named_parameters() if w.requires_grad} == {f"{PATCH_NAME}.default.{n}"
                                                                           for n, _ in p.named_parameters()}
    randomise(p, 0.3)
    assert not torch.allclose(output(model, kwargs), before, atol=1e-4)
    wb.unpatch(model)
    assert torch.equal(output(model, kwargs),
                       before) and [n for n, _ in model.named_modules()] == modules and not hasattr(model, HOOKS_NAME)
    assert all(w.requires_grad for w in model.parameters()) and list(model.state_dict()) == keys


@every
@pytest.mark.parametrize("num_prompts", [None, 3])
def test_every_block_receives_its_input_and_its_prompts(name, num_prompts):
    model, kwargs = BACKBONES[name](), inputs_for(name)
    blocks = list(anatomy_of(model).blocks(model))
    with watched(blocks) as (seen, _):
        p = patched(name, model, num_prompts=num_prompts)
        output(model, kwargs)
        gates = p.gates(kwargs["timestep"].double() * SCALE[name])
        assert gates.shape == (2, len(blocks), max(p.counts)) and torch.allclose(gates.sum(-1),
                                                                                 torch.ones(2, len(blocks)), atol=1e-4)
        assert torch.allclose(p.last_gates, gates, atol=1e-5)
        for i, block in enumerate(blocks):
            raw, entered, first = tokens(seen[i]["raw"]), tokens(seen[i]["entered"]), text_length(name, block)
            n, count = p.prompts[i].shape[0], raw.shape[1] - first
            assert n == (num_prompts or count) and torch.equal(raw[:, :first], entered[:, :first])
            owner = [j * n // count for j in range(count)]
            want = raw[:, first:] + gates[:, i, owner, None] * p.prompts[i][owner]
            assert torch.allclose(entered[:, first:], want, atol=1e-5) and not torch.allclose(raw[:, first:], want,
                                                                                              atol=1e-3)


def conditions(name, model, kwargs):
    "The condition as the model itself makes it, caught on its way."
    caught = []
    where = {"PixArtTransformer2DModel": lambda m: m.adaln_single.emb,
             "SanaTransformer2DModel": lambda m: m.time_embed.emb, "HunyuanDiT2DModel": lambda m: m.time_extra_emb,
             "SD3Transformer2DModel": lambda m: m.time_text_embed,
             "FluxTransformer2DModel": lambda m: m.time_text_embed,
             "AuraFlowTransformer2DModel": lambda m: m.time_step_proj,
             "CogVideoXTransformer3DModel": lambda m: m.time_embedding,
             "WanTransformer3DModel": lambda m: m.condition_embedder,
             "DiTTransformer2DModel": lambda m: m.transformer_blocks[0].norm1.emb}
    if name in where:
        handle = where[name](model).register_forward_hook(
            lambda m, a, out: caught.append(out[0] if isinstance(out, tuple) else out))
    elif name == "DiT": handle = model.blocks[0].register_forward_pre_hook(lambda m, a: caught.append(a[1]))
    else:
        # U-Nets hand it to every ResNet unit
        handle = model.mid_block.resnets[0].register_forward_pre_hook(lambda m, a: caught.append(a[1]))
    output(model, kwargs)
    handle.remove()
    return caught[0]


@every
def test_gates_on_the_condition_see_what_the_blocks_see(name):
    model, kwargs = BACKBONES[name](), inputs_for(name)
    c = conditions(name, model, kwargs)
    p = patched(name, model, gate_input="condition")
    output(model, kwargs)
    group = p.groups[p.counts[-1]]
    logits = torch.cat([c, torch.full((2, 1), float(p.blocks[group[-1]]))], 1) @ p.gate.weight.T + p.gate.bias
    want = logits[:, p.rows[p.counts[-1]]].softmax(-1)
    assert torch.allclose(p.last_gates[:, group[-1], :p.counts[-1]], want, atol=1e-5)
    needed = {k: kwargs[k] for k in anatomy_of(model).condition_inputs if k in kwargs}
    assert torch.allclose(p.gates(kwargs["timestep"].double() * SCALE[name], **needed), p.last_gates, atol=1e-5)


@pytest.mark.parametrize("name,missing",
                         [("DiTTransformer2DModel", "class_labels"), ("SD3Transformer2DModel", "pooled_projections"),
                          ("FluxTransformer2DModel", "pooled_projections"),
                          ("HunyuanDiT2DModel", "encoder_hidden_states_t5"),
                          ("UNet2DConditionModel-SDXL", "added_cond_kwargs"),
                          ("PixArtTransformer2DModel", "added_cond_kwargs")])
def test_gates_on_a_condition_that_was_not_given(name, missing):
    p = patched(name, BACKBONES[name](), gate_input="condition")
    with pytest.raises(BadInput, match=f"the gates look at the condition.*expected.*{missing}.*got none of them"):
        p.gates([3, 500])


@every
def test_files(name, tmp_path):
    model, kwargs = BACKBONES[name](), inputs_for(name)
    patched(name, model, gate_input="condition", depth=2)
    want = output(model, kwargs)
    wb.save_patch(model, tmp_path / "p")
    other = BACKBONES[name]()
    wb.load_patch(other, tmp_path / "p")
    assert torch.equal(output(other, kwargs), want)
    model.save_pretrained(tmp_path / "m")
    plain = type(model).from_pretrained(tmp_path / "m")
    wb.unpatch(model)
    assert torch.equal(output(plain, kwargs), output(model, kwargs))
    stranger = "SD3Transformer2DModel" if name != "SD3Transformer2DModel" else "DiT"
    with pytest.raises(BadInput, match=f"class {name.split('-')[0]} there, {stranger} here"):
        wb.load_patch(BACKBONES[stranger](), tmp_path / "p")


@every
def test_input_of_another_size_is_refused(name):
    size = {"SanaTransformer2DModel": 6}.get(name, 8)
    grid = INPUT_SIZE.get(name) or ((3, 8, 12) if "CogVideoX" in name else (size, size))
    # the second has as many tokens
    for other in ((*grid[:-1], grid[-1] * 2), (*grid[:-2], grid[-2] * 2, grid[-1] // 2)):
        # it looks at its inputs itself
        if name == "DiT" and other[-2] != 8: continue
        if any(s % 2 for s in other[-2:]) and name != "SanaTransformer2DModel": continue
        model = BACKBONES[name]()
        wb.patch(model, wb.DMPConfig(input_size=other))
        with pytest.raises(BadInput, match=r"the input has \d+ tokens .* at block 0: this patch was made for \d+ "
                           r"tokens .*input_size"):
            output(model, inputs_for(name))


@pytest.mark.parametrize("name", PREPENDABLE)
def test_prepended_prompts(name):
    model, kwargs = BACKBONES[name](), inputs_for(name)
    before = output(model, kwargs)
    blocks = list(anatomy_of(model).blocks(model))
    with watched(blocks) as (seen, _):
        p = patched(name, model, mode="prepend", num_prompts=5, depth=2)
        got = output(model, kwargs)
        gates = p.gates(kwargs["timestep"].double() * SCALE[name])
        for i, block in enumerate(blocks):
            raw, entered, first = seen[i]["raw"], seen[i]["entered"], text_length(name, block)
            # between blocks there are none
            assert torch.equal(entered[:, :first], raw[:, :first]) and torch.equal(entered[:, first + 5:],
                                                                                   raw[:, first:])
            answer = lambda i: seen[i]["answer"] if isinstance(seen[i]["answer"], torch.Tensor) else seen[i]["answer"][
                anatomy_of(model).output_index(blocks[i])]   # noqa: B023
            before_it = text_length(name, blocks[i - 1])
            # beyond the depth they go on as the blocks left them
            want = gates[:, i, :, None] * p.prompts[i] if i < 2 else answer(i - 1)[:, before_it:before_it + 5]
            assert torch.allclose(entered[:, first:first + 5], want, atol=1e-5)
    assert got.shape == before.shape and not torch.allclose(got, before, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in PREPENDABLE])
def test_prepending_where_the_number_of_tokens_is_fixed(name):
    model = BACKBONES[name]()
    with pytest.raises(BadInput, match="mode is 'prepend': expected 'add'"):
        wb.patch(model, config(name, mode="prepend"))
    assert not patches_of(model) and all(w.requires_grad for w in model.parameters())


@every
def test_guidance_batches_and_shared_timesteps(name):
    model = BACKBONES[name]()
    p = patched(name, model)
    kwargs = inputs_for(name, timestep=600)
    one = output(model, kwargs)
    assert len(p.last_gates) == 1                     # one row of gates for a batch that shares its timestep
    twice = {k: torch.cat([v, v]) if isinstance(v, torch.Tensor) and k not in ("img_ids", "txt_ids")
             else {a: torch.cat([b, b]) for a, b in v.items()} if isinstance(v, dict) else v
             for k, v in kwargs.items()}
    both = output(model, twice)
    assert torch.allclose(both[:2], one, atol=1e-5) and torch.allclose(both[2:], one, atol=1e-5)
    with p.baked([600, 100]): assert torch.equal(output(model, kwargs), one)
    with p.baked([100]), pytest.raises(BadInput, match="timestep 600 is not in the baked table"): output(model, kwargs)
    assert torch.equal(output(model, kwargs), one)


# --- routing

@every
@pytest.mark.parametrize("kind", ["dtr", "random"])
def test_every_routed_block_sees_its_channels_and_the_rest_passes_by(name, kind):
    model, kwargs = BACKBONES[name](), inputs_for(name)
    before, keys, names = output(model, kwargs), list(model.state_dict()), [n for n, _ in model.named_modules()]
    units = anatomy_of(model).routed(model)
    assert len(units) >= 3
    with watched(units) as (seen, watch_outputs):
        wb.route(model, wb.DTRConfig(sharing_ratio=0.6, alpha=1.0, kind=kind))
        handles = watch_outputs()
        output(model, kwargs)
        for h in handles: h.remove()
        widths = set()
        for i, unit in enumerate(units):
            index = anatomy_of(model).output_index
            image = lambda x, unit=unit, index=index: x if isinstance(x, torch.Tensor) else x[index(unit)]
            raw, entered, answer, left = (tokens(image(seen[i][k])) for k in ("raw", "entered", "answer", "left"))
            m = wb.routing_mask(kwargs["timestep"].double() * SCALE[name], raw.shape[-1], sharing_ratio=0.6, alpha=1.0,
                                kind=kind)[:, None]
            first = text_length(name, unit)
            m = torch.cat([torch.ones(2, first, raw.shape[-1]), m.expand(-1, raw.shape[1] - first, -1)], 1)
            assert torch.equal(entered, raw * m) and torch.allclose(left, answer + (1 - m) * raw, atol=1e-6)
            widths.add(raw.shape[-1])
        assert len(widths) == (2 if "UNet" in name else 1)   # a mask of its own for every width
    assert list(model.state_dict()) == keys and [n for n, _ in model.named_modules()] == names
    wb.unroute(model)
    assert torch.equal(output(model, kwargs), before) and not hasattr(model, HOOKS_NAME)


@every
def test_sharing_all_channels_is_the_plain_model(name):
    model, kwargs = BACKBONES[name](), inputs_for(name)
    before = output(model, kwargs)
    wb.route(model, wb.DTRConfig(sharing_ratio=1.0))
    assert torch.allclose(output(model, kwargs), before, atol=1e-6)


@every
@pytest.mark.parametrize("mode", ["add", "prepend"])
def test_patching_and_routing_in_either_order(name, mode):
    if mode == "prepend" and name not in PREPENDABLE: pytest.skip("takes a fixed number of tokens")
    settings = dict(mode=mode, **({"num_prompts": 4} if mode == "prepend" else {}))
    outputs = []
    for order in ("patch first", "route first"):
        model, kwargs = BACKBONES[name](), inputs_for(name)
        unit = list(anatomy_of(model).blocks(model))[-1]
        with watched([unit]) as (seen, _):
            if order == "patch first": p = patched(name, model, **settings)
            wb.route(model)
            if order == "route first": p = patched(name, model, **settings)
            outputs.append(output(model, kwargs))
            if mode == "add" and "UNet" not in name:   # m ⊙ (x + g ⊙ P): the prompts are inside the route
                raw, first = seen[0]["raw"], text_length(name, unit)
                m = wb.routing_mask(kwargs["timestep"].double() * SCALE[name], raw.shape[-1])[:, None]
                want = m * (raw[:, first:] + p.last_gates[:, -1, :, None] * p.prompts[-1])
                assert torch.allclose(seen[0]["entered"][:, first:], want, atol=1e-5)
    assert torch.equal(*outputs)
    wb.unpatch(model)
    routed = BACKBONES[name]()
    wb.route(routed)
    assert torch.equal(output(model, kwargs), output(routed, kwargs))   # what is left is the route alone


# --- what models go through

def loss_of(model, kwargs): return model(**kwargs).sample.float().square().mean()


@pytest.mark.parametrize("name", [n for n in NAMES if BACKBONES[n]()._supports_gradient_checkpointing])
@pytest.mark.parametrize("routed", [False, True])
def test_gradient_checkpointing(name, routed):
    "Also when two forward passes come before their backward passes: each is run again with its own gates and masks."
    model, grads = BACKBONES[name]().train(), []
    p = patched(name, model)
    if routed: wb.route(model)
    for on in (False, True):
        model.enable_gradient_checkpointing() if on else model.disable_gradient_checkpointing()
        p.zero_grad()
        torch.manual_seed(0)
        losses = [loss_of(model, inputs_for(name, timestep=t)) for t in (100, 900)]
        for loss in losses: loss.backward()
        grads.append([w.grad.clone() for w in p.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) and a.abs().sum() > 0 for a, b in zip(*grads, strict=True))


@every
def test_bfloat16(name):
    model = BACKBONES[name]().bfloat16()
    patched(name, model, gate_input="condition")
    wb.route(model)
    narrow = (lambda v: {k: narrow(w) for k, w in v.items()} if isinstance(v, dict)
              else tuple(map(narrow, v)) if isinstance(v, tuple) else v.bfloat16() if v.is_floating_point() else v)
    kwargs = narrow(inputs_for(name))
    out = output(model, kwargs)
    assert (out.dtype == torch.bfloat16 and out.isfinite().all()
            and wb.get_patch(model).gate.weight.dtype == torch.float32)
    full = BACKBONES[name]()
    patched(name, full, gate_input="condition")
    wb.route(full)
    factor = 1000 if name == "FluxTransformer2DModel" else 1   # Flux multiplies in bf16, AuraFlow in float32
    # the times that a bf16 model sees
    rounded = lambda t: (t * factor).float() / factor if t.is_floating_point() else t
    seen = {k: rounded(kwargs[k]) for k in ("timestep", "guidance") if k in kwargs}
    wide = output(full, {**inputs_for(name), **seen})
    assert (out.float() - wide).abs().mean() < 0.02 * wide.abs().mean()


@every
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(name, how):
    model, kwargs = BACKBONES[name](), inputs_for(name)
    plain = output(model, kwargs)
    patched(name, model)
    wb.route(model)
    loss_of(model, kwargs)                              # leaves gates with a graph behind
    want = output(model, kwargs)
    twin = how(model)
    assert torch.equal(output(twin, kwargs), want)
    with torch.no_grad():
        for w in wb.get_patch(twin).parameters(): w.zero_()
    assert torch.equal(output(model, kwargs), want) and not torch.equal(output(twin, kwargs), want)
    wb.unroute(wb.unpatch(twin))
    assert torch.equal(output(twin, kwargs), plain) and torch.equal(output(model, kwargs), want)


@every
@pytest.mark.parametrize("gate_input", ["timestep", "condition"])
def test_offloaded_weights(name, gate_input):
    """accelerate moves the weights inside forward, after the gates:
    here to the meta device, which holds no numbers but minds which device a tensor is on."""
    model = BACKBONES[name]()
    patched(name, model, gate_input=gate_input)
    wb.route(model)
    cpu_offload_with_hook(model, execution_device="meta")
    move = (lambda v: {k: move(w) for k, w in v.items()} if isinstance(v, dict)
            else tuple(map(move, v)) if isinstance(v, tuple) else v.to("meta"))
    kwargs = inputs_for(name)
    out = output(model, {**move(kwargs), "timestep": kwargs["timestep"]} | (
        {k: kwargs[k] for k in anatomy_of(model).condition_inputs if k in kwargs} if gate_input == "condition" else {}))
    assert out.device.type == "meta"


# --- several patches

def test_several_patches(tmp_path):
    model, kwargs = BACKBONES["SD3Transformer2DModel"]().requires_grad_(False), inputs_for("SD3Transformer2DModel")
    plain = output(model, kwargs)
    a = randomise(wb.patch(model, name="a"), 0.3, 1)
    only_a = output(model, kwargs)
    b = randomise(wb.patch(model, wb.DMPConfig(top_k=3), name="b"), 0.3, 2)
    c = randomise(wb.patch(model, wb.DMPConfig(mode="prepend", num_prompts=2), name="c"), 0.3, 3)
    everything = output(model, kwargs)
    wb.use_patches(model, "a")
    assert torch.equal(output(model, kwargs), only_a) and (a.enabled, b.enabled, c.enabled) == (True, False, False)
    wb.use_patches(model, "b", "c")
    without_a = output(model, kwargs)
    wb.use_patches(model, "a", "b", "c")
    assert torch.equal(output(model, kwargs), everything)
    with wb.patch_disabled(model, "a"): assert torch.equal(output(model, kwargs), without_a)
    with pytest.raises(RuntimeError), wb.patch_disabled(model):
        assert torch.equal(output(model, kwargs), plain)
        raise RuntimeError
    assert torch.equal(output(model, kwargs), everything)
    for name in "abc": wb.save_patch(model, tmp_path / name, name=name)
    other = BACKBONES["SD3Transformer2DModel"]()
    for name in "cab": wb.load_patch(other, tmp_path / name, name=name)    # another order
    assert torch.equal(output(other, kwargs), everything)
    wb.unpatch(model, "b")
    assert set(patches_of(model)) == {"a", "c"} and not any(
        w.requires_grad for n, w in model.named_parameters() if not n.startswith(PATCH_NAME))
    wb.unpatch(model)
    # as it came
    assert torch.equal(output(model, kwargs), plain) and not any(w.requires_grad for w in model.parameters())


def test_names_of_patches():
    model = BACKBONES["DiT"]()
    wb.patch(model, name="a")
    with pytest.raises(BadInput, match="patched already by a patch named 'a'"): wb.patch(model, name="a")
    with pytest.raises(BadInput, match="name is 'x.y'"): wb.patch(model, name="x.y")
    with pytest.raises(BadInput, match="name is 'keys'"): wb.patch(model, name="keys")
    wb.patch(model, name="bee")
    with pytest.raises(BadInput, match="has the patches a, bee: expected the name of one"):
        wb.save_patch(model, "nowhere")
    with pytest.raises(BadInput, match="did you mean 'bee'"): wb.use_patches(model, "a", "be")
    assert all(p.enabled for p in patches_of(model).values())
    with pytest.raises(BadInput, match="unknown patch"): wb.unpatch(model, "c")
    wb.patch(model, wb.DMPConfig(mode="prepend"), "p1")
    wb.patch(model, wb.DMPConfig(mode="prepend"), "p2")
    with pytest.raises(BadInput, match="two patches in prepend mode"): output(model, inputs_for("DiT"))
    with wb.patch_disabled(model, "p1"): output(model, inputs_for("DiT"))
