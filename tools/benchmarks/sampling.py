"""What sampling costs: `python tools/benchmarks/sampling.py [--model DiT-S/2] [--batch 16] [--steps 4] [--rounds 9]`.

Patched (gates from a table) against unpatched, and `wb.sample` on our DiT
against diffusers' DiTPipeline with the same weights, labels, noise, steps and
guidance; first of all their images are compared. Times are taken in turn, one round after another in one process;
the ratio is the median of the rounds' ratios,
with their quartiles beside it.
"""
import argparse
import statistics
import time
from types import SimpleNamespace

import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from torch import nn

import dmp_wb as wb
from dmp_wb.core.seeds import seed_of
from dmp_wb.models.dit import DiT
from dmp_wb.diffusion.schedules import sampler

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUIDANCE = 1.5


def build(name):
    "A DiT with weights everywhere, the condition's included."
    torch.manual_seed(0)
    model = DiT.from_name(name, sample_size=32)
    with torch.no_grad():
        for p in model.parameters(): p.normal_(std=0.02)
    return model.eval().to(DEVICE)


def in_diffusers(model):
    "The same weights as diffusers' model, which keeps an embedder in every block."
    c, own = model.config, model.state_dict()
    theirs = DiTTransformer2DModel(num_attention_heads=c.num_attention_heads,
                                   attention_head_dim=c.hidden_size // c.num_attention_heads, in_channels=c.in_channels,
                                   out_channels=c.out_channels,
                                   num_layers=c.num_layers, sample_size=c.sample_size, patch_size=c.patch_size,
                                   num_embeds_ada_norm=c.num_classes, norm_eps=1e-6)
    names = {"pos_embed.proj": "x_embedder.proj", "proj_out_1": "final_layer.adaLN_modulation.1",
             "proj_out_2": "final_layer.linear"}
    state = {}
    for i in range(c.num_layers):
        to, of = f"transformer_blocks.{i}.", f"blocks.{i}."
        names |= {f"{to}norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
                  f"{to}norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
                  f"{to}norm1.linear": f"{of}adaLN_modulation.1",
                  f"{to}attn1.to_out.0": f"{of}attn.proj", f"{to}ff.net.0.proj": f"{of}mlp.fc1",
                  f"{to}ff.net.2": f"{of}mlp.fc2"}
        state[f"{to}norm1.emb.class_embedder.embedding_table.weight"] = own["y_embedder.embedding_table.weight"]
        for end in ("weight", "bias"):
            state |= dict(zip((f"{to}attn1.to_{part}.{end}" for part in "qkv"), own[f"{of}attn.qkv.{end}"].chunk(3)))
    for name, of in names.items(): state |= {f"{name}.{end}": own[f"{of}.{end}"] for end in ("weight", "bias")}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"pos_embed.pos_embed"}, (missing, unexpected)
    # as in the official code; diffusers' own is 1
    for block in theirs.transformer_blocks: block.norm1.emb.time_proj.downscale_freq_shift = 0
    return theirs.eval().to(DEVICE)


class NoVAE(nn.Module):
    "In place of the pipeline's VAE, so that latents are compared with latents."
    config, device, dtype = SimpleNamespace(scaling_factor=1.0), torch.device(DEVICE), torch.float32
    # well inside the range that the pipeline clips to
    def decode(self, latents): return SimpleNamespace(sample=latents / 1e5)


def through_pipeline(model, labels, steps):
    pipe = DiTPipeline(in_diffusers(model), NoVAE(), sampler("ddim", num_inference_steps=steps))
    pipe.set_progress_bar_config(disable=True)

    def draw():
        streams = [torch.Generator().manual_seed(seed_of(0, "image", i)) for i in range(len(labels))]
        return pipe(labels, guidance_scale=GUIDANCE, generator=streams, num_inference_steps=steps,
                    output_type="pt").images
    return draw


def seconds(draw):
    "On a GPU by the clock, on the CPU by the processor's time, which does not count what other processes take."
    if DEVICE == "cpu":
        start = time.process_time()
        draw()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    draw()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(kinds, rounds):
    "Seconds of each kind in every round, one after the other."
    for draw in kinds.values(): draw()   # warm up
    taken, names = {k: [] for k in kinds}, list(kinds)
    for r in range(rounds):
        # nobody is always first
        for k in (*names[r % len(names):], *names[:r % len(names)]): taken[k].append(seconds(kinds[k]))
    return taken


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-S/2")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4, help="a divisor of 1000, as the pipeline needs")
    parser.add_argument("--rounds", type=int, default=9)
    a = parser.parse_args()
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{a.model}, batch {a.batch}, {a.steps} DDIM steps, guidance {GUIDANCE}, float32, {device}, torch "
          f"{torch.__version__}, medians of {a.rounds} rounds in turn")
    plain, patched, labels = build(a.model), build(a.model), list(range(a.batch))
    p = wb.patch(patched)
    with torch.no_grad():
        for w in p.parameters(): w.normal_(std=0.02)
    ours = lambda model: lambda: wb.sample(model, class_labels=labels, guidance_scale=GUIDANCE,
                                           num_inference_steps=a.steps, batch_size=a.batch, clamp=False, quiet=True)
    kinds = {"unpatched": ours(plain), "patched": ours(patched),
             "DiTPipeline": through_pipeline(plain, labels, a.steps)}
    # undoing the pipeline's scale to [0, 1]
    mine, theirs = kinds["unpatched"](), (kinds["DiTPipeline"]().cpu() - 0.5) * 2e5
    print(
        f"images of both: largest difference {(mine - theirs).abs().max() / mine.abs().max():.0e} of the largest value")
    taken = in_turn(kinds, a.rounds)
    for k in kinds:
        print(f"{k:14}{statistics.median(taken[k]):9.3f} s{a.batch / statistics.median(taken[k]):9.2f} images/s")
    for what, over, under, ok, target in (
            ("patched time / unpatched", "patched", "unpatched", lambda r: r <= 1.02, "≤ 1.02"),
            ("throughput of ours / DiTPipeline", "DiTPipeline", "unpatched", lambda r: r >= 1.0, "≥ 1.00")):
        # what slowed a round slowed both
        low, middle, high = statistics.quantiles([x / y for x, y in zip(taken[over], taken[under])], n=4)
        print(f"{what:34}{middle:7.3f}  {target}  {'met' if ok(middle) else 'MISSED'}  rounds: {low:.3f} to {high:.3f}")


if __name__ == "__main__": main()
