import argparse

import pytest
import torch
from conftest import randomise, tiny_dit
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from safetensors.torch import save_file

from dmp_wb.core.errors import BadInput, MissingFile
from dmp_wb.core.settings import NAMES
from dmp_wb.models.dit import DiT

OFFICIAL_NAMES = {
    "pos_embed", "x_embedder.proj.weight", "x_embedder.proj.bias", "t_embedder.mlp.0.weight", "t_embedder.mlp.0.bias",
    "t_embedder.mlp.2.weight", "t_embedder.mlp.2.bias", "y_embedder.embedding_table.weight",
    "final_layer.linear.weight",
    "final_layer.linear.bias", "final_layer.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias",
} | {f"blocks.0.{layer}.{w}" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
     for w in ("weight", "bias")}


@pytest.mark.parametrize("name,millions", [("DiT-S/2", 33), ("DiT-B/2", 130), ("DiT-L/2", 458), ("DiT-XL/2", 675)])
def test_family_sizes_are_the_papers(name, millions):
    with torch.device("meta"): model = DiT.from_name(name)
    assert abs(model.num_parameters() / 1e6 - millions) < 1
    assert model.learn_sigma and model.config.out_channels == 8


@pytest.mark.parametrize("name", NAMES)
def test_patch_size_and_tokens(name):
    with torch.device("meta"): model = DiT.from_name(name, sample_size=64, learn_sigma=False)
    patch = int(name[-1])
    assert (model.config.patch_size == patch and model.grid_size == (64 // patch, 64 // patch)
            and model.config.out_channels == 4)


def test_parameter_names_are_official():
    assert set(tiny_dit(num_layers=1).state_dict()) == OFFICIAL_NAMES


def test_starts_as_zero_and_blocks_as_identity():
    model = DiT(sample_size=8, hidden_size=32, num_layers=2, num_attention_heads=4)
    x = torch.randn(2, 16, 32)
    assert torch.equal(model.blocks[0](x, torch.randn(2, 32)), x)
    assert model(torch.randn(2, 4, 8, 8), 5, torch.tensor([1, 2])).sample.abs().max() == 0


def naive_forward(model, x, t, y):
    "The paper's forward pass, spelled out token by token, in float64."
    sd = {k: v.double() for k, v in model.state_dict().items()}
    c_ = model.config
    p, D, H = c_.patch_size, c_.hidden_size, c_.num_attention_heads
    lin = lambda z, name: z @ sd[f"{name}.weight"].T + sd[f"{name}.bias"]
    silu = lambda z: z * torch.sigmoid(z)
    norm = lambda z: (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    out = []
    for b in range(len(x)):
        freqs = torch.exp(-torch.log(torch.tensor(10000.0, dtype=torch.float64))
                          * torch.arange(128, dtype=torch.float64) / 128) * t[b].double()
        c = lin(silu(lin(torch.cat([freqs.cos(), freqs.sin()]), "t_embedder.mlp.0")),
                "t_embedder.mlp.2") + sd["y_embedder.embedding_table.weight"][y[b]]
        tokens = []
        for i in range(x.shape[2] // p):
            for j in range(x.shape[3] // p):
                piece = x[b, :, i * p:(i + 1) * p, j * p:(j + 1) * p].double()
                tokens.append((sd["x_embedder.proj.weight"] * piece).sum((1, 2, 3)) + sd["x_embedder.proj.bias"])
        z = torch.stack(tokens) + sd["pos_embed"][0]
        for n in range(c_.num_layers):
            s1, k1, g1, s2, k2, g2 = lin(silu(c), f"blocks.{n}.adaLN_modulation.1").view(6, D)
            q, k, v = lin(norm(z) * (1 + k1) + s1, f"blocks.{n}.attn.qkv").view(-1, 3, H, D // H).permute(1, 2, 0, 3)
            a = ((q @ k.transpose(-1, -2)) / (D // H) ** 0.5).softmax(-1) @ v
            z = z + g1 * lin(a.transpose(0, 1).reshape(-1, D), f"blocks.{n}.attn.proj")
            h = lin(norm(z) * (1 + k2) + s2, f"blocks.{n}.mlp.fc1")
            h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
            z = z + g2 * lin(h, f"blocks.{n}.mlp.fc2")
        shift, scale = lin(silu(c), "final_layer.adaLN_modulation.1").view(2, D)
        z = lin(norm(z) * (1 + scale) + shift, "final_layer.linear")
        image = torch.zeros(c_.out_channels, *x.shape[2:], dtype=torch.float64)
        for n, token in enumerate(z):
            i, j = divmod(n, x.shape[3] // p)
            image[:, i * p:(i + 1) * p, j * p:(j + 1) * p] = token.view(p, p, -1).permute(2, 0, 1)
        out.append(image)
    return torch.stack(out)


@pytest.mark.parametrize("changes", [{}, dict(patch_size=4, in_channels=3, out_channels=6), dict(sample_size=(4, 8))])
def test_forward_is_the_papers(changes):
    model = tiny_dit(**changes)
    randomise(model, 0.2)
    x = torch.randn(2, model.config.in_channels, *model.input_size)
    t, y = torch.tensor([17, 803]), torch.tensor([3, 10])
    with torch.no_grad(): got = model(x, t, y).sample
    want = naive_forward(model, x, t, y)
    assert (got - want).abs().max() < 1e-4 * want.abs().max()   # float32 waves at t = 803 are off by 5e-5 themselves


def test_position_embedding_tells_rows_from_columns():
    square, wide = tiny_dit().pos_embed[0].view(4, 4, -1), tiny_dit(sample_size=(8, 16)).pos_embed[0].view(4, 8, -1)
    assert torch.allclose(square, wide[:, :4])          # the same place, the same embedding
    assert not torch.allclose(square[0, 1], square[1, 0])


def test_batch_entries_do_not_mix(inputs):
    model, (x, t, y) = tiny_dit(), inputs
    with torch.no_grad():
        together = model(x, t, y).sample
        alone = torch.cat([model(x[i:i + 1], t[i:i + 1], y[i:i + 1]).sample for i in range(4)])
    assert torch.allclose(together, alone, atol=1e-6)


def test_labels(inputs):
    model, (x, t, _) = tiny_dit(), inputs
    null = torch.full((4,), 10)
    with torch.no_grad():
        want = model(x, t, null).sample
        assert torch.equal(model(x, t).sample, want)                              # none is the null class
        assert torch.equal(model(x, t, torch.full((4,), 1000)).sample, want)      # and so is DiTPipeline's 1000
        assert not torch.equal(model(x, t, torch.zeros(4, dtype=torch.long)).sample, want)


@pytest.mark.parametrize("timestep", [500, 500.0, torch.tensor(500), torch.tensor([500]), torch.tensor([500.0] * 4)])
def test_timestep_forms(inputs, timestep):
    model, (x, _, y) = tiny_dit(), inputs
    with torch.no_grad():
        assert torch.allclose(model(x, timestep, y).sample, model(x, torch.full((4,), 500), y).sample, atol=1e-6)


def test_gradient_checkpointing_changes_no_gradient(inputs):
    grads = []
    for on in (False, True):
        model = tiny_dit().train()
        if on: model.enable_gradient_checkpointing()
        model(*inputs).sample.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))


def test_save_and_load_as_diffusers_model(tmp_path, inputs):
    model = tiny_dit(sample_size=(8, 8), num_classes=10)
    model.save_pretrained(tmp_path)
    with torch.no_grad(): assert torch.equal(DiT.from_pretrained(tmp_path)(*inputs).sample, model(*inputs).sample)


@pytest.mark.parametrize("out_channels", [4, 8])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_in_dit_pipeline(out_channels, guidance_scale):
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=8)
    pipe = DiTPipeline(tiny_dit(in_channels=4, out_channels=out_channels), vae, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    draw = lambda: pipe([3, 7], guidance_scale=guidance_scale, num_inference_steps=2, output_type="np",
                        generator=torch.Generator().manual_seed(0)).images
    assert draw().shape == (2, 8, 8, 3) and (draw() == draw()).all()


@pytest.mark.parametrize("nested,suffix",
                         [*((n, ".pt") for n in (None, "ema", "model", "both", "ddp")), (None, ".safetensors")])
def test_official_checkpoints(tmp_path, nested, suffix, inputs):
    source = tiny_dit(out_channels=2, num_layers=11)     # more than ten blocks: "blocks.10" sorts before "blocks.2"
    sd, other = source.state_dict(), {k: torch.zeros_like(v) for k, v in source.state_dict().items()}
    if suffix == ".safetensors": save_file(sd, tmp_path / "x.safetensors")
    else:
        args = argparse.Namespace(model="DiT-S/2", lr=1e-4)
        content = {None: sd, "ema": {"ema": sd, "args": args}, "model": {"model": sd, "opt": {}},
                   "both": {"model": other, "ema": sd, "args": args},
                   "ddp": {"model": {f"module.{k}": v for k, v in sd.items()}}}[nested]
        torch.save(content, tmp_path / "x.pt")
    model = DiT.from_official(tmp_path / f"x{suffix}", num_attention_heads=4)
    assert model.config.num_layers == 11 and model.config.num_classes == 10 and model.config.sample_size == 8
    with torch.no_grad(): assert torch.equal(model(*inputs).sample, source(*inputs).sample)


def test_official_sizes_come_from_the_family_table():
    source = DiT.from_name("DiT-S/4", num_classes=3, num_layers=1, sample_size=16)
    assert DiT.from_official(source.state_dict()).config == DiT.from_official(source.state_dict(), 6).config
    assert DiT.from_official(source.state_dict()).config.num_attention_heads == 6


def test_position_embeddings_of_the_checkpoint_are_used():
    sd = {k: v.clone() for k, v in tiny_dit().state_dict().items()}
    sd["pos_embed"] += 1
    assert torch.equal(DiT.from_official(sd, 4).pos_embed, sd["pos_embed"])


class Evil:
    def __reduce__(self): return (print, ("code ran",))


def test_bad_checkpoints(tmp_path, capsys):
    sd = tiny_dit().state_dict()

    def bad(d, match):
        with pytest.raises(BadInput, match=match): DiT.from_official(d, 4)
    with pytest.raises(MissingFile, match="nowhere.pt"): DiT.from_official(tmp_path / "nowhere.pt")
    torch.save({"model": sd, "config": Evil()}, tmp_path / "evil.pt")
    bad(tmp_path / "evil.pt", "evil.pt cannot be read as a checkpoint of plain tensors")
    assert "code ran" not in capsys.readouterr().out
    (tmp_path / "torn.pt").write_bytes((tmp_path / "evil.pt").read_bytes()[:500])
    bad(tmp_path / "torn.pt", "torn.pt cannot be read")
    save_file(sd, tmp_path / "x.safetensors")
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-9])
    bad(tmp_path / "torn.safetensors", "not a whole safetensors file")
    bad({k: v for k, v in sd.items() if k != "blocks.1.mlp.fc2.bias"}, "no tensor 'blocks.1.mlp.fc2.bias'")
    bad({**sd, "router.weight": torch.zeros(2)}, "does not have.*router.weight")
    bad({**sd, "blocks.1.mlp.fc2.bias": torch.zeros(7)}, r"blocks.1.mlp.fc2.bias' has shape \(7,\), expected \(32,\)")
    bad({"ema": {}, "args": 3}, "holds no tensors")
    bad({"weight": torch.zeros(2)}, "expected an official DiT checkpoint")
    with pytest.raises(BadInput, match="width 32.*num_attention_heads"): DiT.from_official(sd)


@pytest.mark.parametrize("changes,match", [
    (dict(sample_size=9), "multiple of patch_size"), (dict(hidden_size=30), "multiple of"),
    (dict(num_classes=-1), "num_classes is -1"),
])
def test_impossible_sizes(changes, match):
    with pytest.raises(BadInput, match=match): tiny_dit(**changes)


def test_unknown_name_is_suggested():
    with pytest.raises(BadInput, match="did you mean 'DiT-S/2'"): DiT.from_name("DiT-S-2")


def test_wrong_input_size_names_both():
    with pytest.raises(BadInput, match="1×16×16: this DiT expects 1×8×8"): tiny_dit()(torch.randn(1, 1, 16, 16), 3)


def test_half_precision():
    model = tiny_dit().to(torch.bfloat16)
    out = model(torch.randn(2, 1, 8, 8, dtype=torch.bfloat16), torch.tensor([3, 4]), torch.tensor([1, 2])).sample
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
