"""The table on the page “Bring your own backbone”: for every class of backbone that is supported, one that is
published, its licence, its parameters, those of a patch with default settings and of one with 256 prompts a block, and
what the tests of this package do with its pipeline.

`python tools/backbone_sizes.py [NAME …]` prints it as Markdown; with --write it goes into the page. Models are made on
the meta device, where weights take no memory, from the settings that the classes of diffusers have of themselves, and
those here where they have none. What is trained, sampled and explored is read from tests/trained_pipelines.py.
"""
import re
import sys
import warnings
from pathlib import Path

import diffusers
import torch

import dmp_wb as wb
from dmp_wb.models.backbones import anatomy_of
from dmp_wb.models.dit import DiT

ROOT = Path(__file__).resolve().parents[1]
PIXART = dict(num_attention_heads=16, attention_head_dim=72, cross_attention_dim=1152, caption_channels=4096)
# class → what is published, settings that its class has not of itself, and the size of its latents
PUBLISHED: dict[str, tuple[str, dict, tuple | None]] = {
    "DiT": ("DiT-XL/2, 256²", {}, None),
    "DiTTransformer2DModel": ("DiT-XL/2, 256²", dict(sample_size=32, num_layers=28, num_attention_heads=16,
                                                    attention_head_dim=72, in_channels=4, out_channels=8), None),
    "PixArtTransformer2DModel": ("PixArt-Σ, 1024²", {**PIXART, "sample_size": 128,
                                                    "use_additional_conditions": False}, None),
    "SanaTransformer2DModel": ("SANA 1.6B, 1024²", {}, None),
    "HunyuanDiT2DModel": ("Hunyuan-DiT 1.2, 1024²", dict(num_layers=40, num_attention_heads=16, attention_head_dim=88,
                                                        hidden_size=1408, sample_size=128, patch_size=2, in_channels=4),
                          None),
    "SD3Transformer2DModel": ("Stable Diffusion 3.5 large, 1024²", dict(
        num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192, qk_norm="rms_norm"),
        None),
    "FluxTransformer2DModel": ("Flux.1 dev, 1024²", dict(guidance_embeds=True), None),
    "Flux2Transformer2DModel": ("Flux.2 dev, 1024²", {}, None),
    "AuraFlowTransformer2DModel": ("AuraFlow 0.3, 1024²", dict(sample_size=128, pos_embed_max_size=9216), None),
    "ChromaTransformer2DModel": ("Chroma1 HD, 1024²", {}, None),
    "BriaTransformer2DModel": ("the class's own settings, 1024²", {}, None),
    "LongCatImageTransformer2DModel": ("LongCat-Image, 1024²", dict(num_layers=10, num_single_layers=20), None),
    "OvisImageTransformer2DModel": ("Ovis-Image, 1024²", {}, None),
    "QwenImageTransformer2DModel": ("Qwen-Image, 1024²", {}, None),
    "Lumina2Transformer2DModel": ("Lumina-Image 2.0, 1024²", dict(cap_feat_dim=2304), None),
    "ZImageTransformer2DModel": ("Z-Image, 1024²", {}, None),
    "OmniGenTransformer2DModel": ("OmniGen v1, 1024²", dict(rope_scaling=dict(short_factor=[1.0] * 48,
                                                                             long_factor=[1.0] * 48)), None),
    "HiDreamImageTransformer2DModel": ("HiDream-I1, 1024²", dict(
        patch_size=2, in_channels=16, caption_channels=[4096, 4096], llama_layers=list(range(32)) + [31] * 16), None),
    "CogView3PlusTransformer2DModel": ("CogView3-Plus, 1024²", {}, None),
    "CogView4Transformer2DModel": ("CogView4, 1024²", dict(num_layers=28, num_attention_heads=32,
                                                          attention_head_dim=128), None),
    "HunyuanImageTransformer2DModel": ("HunyuanImage 2.1, 2048²", {}, None),
    "PRXTransformer2DModel": ("PRX, 512²", {}, None),
    "CogVideoXTransformer3DModel": ("CogVideoX-2b, 49 frames", {}, None),
    "ConsisIDTransformer3DModel": ("ConsisID, 49 frames", dict(num_attention_heads=48, num_layers=42), None),
    "WanTransformer3DModel": ("Wan 2.1 14B, 81 frames", {}, None),
    "WanVACETransformer3DModel": ("Wan 2.1 VACE 14B, 81 frames", {}, None),
    "ChronoEditTransformer3DModel": ("ChronoEdit 14B, 5 frames", {}, None),
    "SkyReelsV2Transformer3DModel": ("SkyReels V2, 97 frames", {}, None),
    "HunyuanVideoTransformer3DModel": ("HunyuanVideo, 129 frames", {}, None),
    "HunyuanVideo15Transformer3DModel": ("HunyuanVideo 1.5, 121 frames", {}, None),
    "Kandinsky5Transformer3DModel": ("Kandinsky 5 Lite, 121 frames", dict(
        in_visual_dim=16, out_visual_dim=16, model_dim=1792, ff_dim=7168, axes_dims=(16, 24, 24)), None),
    "LTXVideoTransformer3DModel": ("LTX-Video 2B, 161 frames", {}, None),
    "LTX2VideoTransformer3DModel": ("LTX-2, 121 frames", {}, None),
    "MochiTransformer3DModel": ("Mochi 1, 163 frames", {}, None),
    "AllegroTransformer3DModel": ("Allegro, 88 frames", {}, None),
    "SanaVideoTransformer3DModel": ("SANA-Video 2B, 81 frames", {}, None),
    "EasyAnimateTransformer3DModel": ("EasyAnimate 5.1, 49 frames", dict(in_channels=16, out_channels=16,
                                                                        patch_size=2), None),
    "CosmosTransformer3DModel": ("Cosmos 1 7B, 121 frames", {}, None),
    "LatteTransformer3DModel": ("Latte-1, 16 frames", {**PIXART, "in_channels": 4, "out_channels": 8, "num_layers": 28,
                                                      "patch_size": 2, "attention_bias": True,
                                                      "norm_type": "ada_norm_single",
                                                      "activation_fn": "gelu-approximate"}, None),
    "StableAudioDiTModel": ("Stable Audio Open, 47 s", {}, None),
    "UNet2DModel": ("DDPM, 256²", dict(sample_size=256, block_out_channels=(128, 128, 256, 256, 512, 512),
                                       down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
                                       up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
                                       layers_per_block=2), None),
    "UNet2DConditionModel": ("Stable Diffusion 1.5, 512²", dict(sample_size=64, cross_attention_dim=768), None),
    "UNet3DConditionModel": ("ModelScope text-to-video, 256²", dict(sample_size=32), None),
    "UNetMotionModel": ("AnimateDiff on Stable Diffusion 1.5, 512²", dict(
        sample_size=64, cross_attention_dim=768, num_attention_heads=8), None),
    "UNetSpatioTemporalConditionModel": ("Stable Video Diffusion, 576 × 1024", dict(
        num_attention_heads=(5, 10, 20, 20)), (72, 128)),
    "Kandinsky3UNet": ("Kandinsky 3, 1024²", {}, None),
}


# where another pipeline than the first in the alphabet is the one to name, or diffusers does not say it
NAMED = {"PixArtTransformer2DModel": "PixArtSigmaPipeline", "ConsisIDTransformer3DModel": "ConsisIDPipeline",
         "Kandinsky5Transformer3DModel": "Kandinsky5T2VPipeline", "UNet2DModel": "DDPMPipeline",
         "UNet2DConditionModel": "StableDiffusionPipeline", "UNetMotionModel": "AnimateDiffPipeline", "DiT": ""}

TENCENT = "Tencent Hunyuan Community"
# what a repository of the authors says of the weights, and the repository; where it says nothing of them they are not
# here, and the table says so
LICENCES = {
    "DiT": ("CC BY-NC 4.0", "facebookresearch/DiT"),
    "DiTTransformer2DModel": ("CC BY-NC 4.0", "facebookresearch/DiT"),
    "HunyuanDiT2DModel": (TENCENT, "Tencent-Hunyuan/HunyuanDiT"),
    "FluxTransformer2DModel": ("FLUX.1-dev Non-Commercial", "black-forest-labs/flux"),
    "Flux2Transformer2DModel": ("FLUX.2-dev Non-Commercial", "black-forest-labs/flux2"),
    "LongCatImageTransformer2DModel": ("Apache 2.0", "meituan-longcat/LongCat-Image"),
    "QwenImageTransformer2DModel": ("Apache 2.0", "QwenLM/Qwen-Image"),
    "HiDreamImageTransformer2DModel": ("MIT", "HiDream-ai/HiDream-I1"),
    "CogView3PlusTransformer2DModel": ("Apache 2.0", "THUDM/CogView4"),
    "HunyuanImageTransformer2DModel": (TENCENT, "Tencent-Hunyuan/HunyuanImage-2.1"),
    "CogVideoXTransformer3DModel": ("Apache 2.0", "zai-org/CogVideo"),
    "ConsisIDTransformer3DModel": ("CogVideoX", "PKU-YuanGroup/ConsisID"),
    "WanTransformer3DModel": ("Apache 2.0", "Wan-Video/Wan2.1"),
    "WanVACETransformer3DModel": ("Apache 2.0", "Wan-Video/Wan2.1"),
    "SkyReelsV2Transformer3DModel": ("Skywork Community", "SkyworkAI/SkyReels-V2"),
    "HunyuanVideoTransformer3DModel": (TENCENT, "Tencent-Hunyuan/HunyuanVideo"),
    "HunyuanVideo15Transformer3DModel": (TENCENT, "Tencent-Hunyuan/HunyuanVideo-1.5"),
    "LTX2VideoTransformer3DModel": ("LTX-2.x Community", "Lightricks/LTX-2"),
    "MochiTransformer3DModel": ("Apache 2.0", "genmoai/mochi"),
    "CosmosTransformer3DModel": ("NVIDIA Open Model", "nvidia-cosmos/cosmos-predict1"),
    "LatteTransformer3DModel": ("Apache 2.0", "Vchitect/Latte"),
    "UNet2DConditionModel": ("CreativeML Open RAIL-M", "CompVis/stable-diffusion"),
    "UNetSpatioTemporalConditionModel": ("SVD Non-Commercial", "Stability-AI/generative-models"),
}


def pipelines(name: str) -> list[str]:
    "The pipelines of diffusers whose constructor names a class, without those of ControlNets."
    import inspect
    found = []
    for attribute in dir(diffusers):
        if not attribute.endswith("Pipeline") or "ControlNet" in attribute: continue
        try: signature = inspect.signature(getattr(diffusers, attribute).__init__)
        except (ValueError, TypeError, RuntimeError): continue
        if any(name in str(p.annotation) for k, p in signature.parameters.items() if k in ("transformer", "unet")):
            found.append(attribute)
    return sorted(found, key=lambda n: (len(n), n))


def sizes(name: str) -> tuple[int, int, int]:
    "Parameters of a model, of its default patch, and of one with at most 256 prompts a block."
    _, settings, size = PUBLISHED[name]
    with torch.device("meta"):
        model = DiT.from_name("DiT-XL/2") if name == "DiT" else getattr(diffusers, name)(**settings)
        backbone, found = sum(w.numel() for w in model.parameters()), []
        least = min(map(lambda g: torch.Size(g).numel(), anatomy_of(model).block_grids(model, size)))
        for prompts in (None, min(256, least)):
            patch = wb.patch(model, wb.DMPConfig(input_size=size, num_prompts=prompts))
            found.append(sum(w.numel() for w in patch.parameters()))
            wb.unpatch(model)
    return backbone, *found


def here(name: str) -> str:
    "What the tests of this package do with a class, through one of its pipelines or without."
    sys.path.insert(0, str(ROOT / "tests"))
    from trained_pipelines import TRAINED, WITHOUT_TEXT
    whole = name in WITHOUT_TEXT or any(p in TRAINED for p in pipelines(name))
    return "trained, sampled, explored" if whole else "patched, routed"


def row(name: str, counted: tuple[int, int, int] | None = None) -> str:
    "A line of the table; the numbers are counted where they are not given."
    backbone, default, small = counted or sizes(name)
    pipeline = NAMED[name] if name in NAMED else next(iter(pipelines(name)), "")
    licence, repository = LICENCES.get(name, ("see its card", ""))
    linked = f"[{licence}](https://github.com/{repository})" if repository else licence
    return (f"| `{name}` | {PUBLISHED[name][0]} | {linked} | {f'`{pipeline}`' if pipeline else ''} | "
            f"{backbone / 1e6:,.0f} M | {default / 1e6:,.1f} M, {100 * default / backbone:.1f} % | "
            f"{small / 1e6:,.1f} M, {100 * small / backbone:.2f} % | {here(name)} |")


def write(lines: list[str]):
    "Put the table in the place of the page's."
    import nbformat
    page = ROOT / "nbs" / "howto" / "backbone.ipynb"
    notebook = nbformat.read(page, 4)
    cell = next(c for c in notebook.cells if "| class | as |" in c.source)
    cell.source = re.sub(r"\| class \| as \|.*?(?=\n\n)", lambda found: "\n".join(lines), cell.source, flags=re.S)
    nbformat.write(notebook, page)


def main():
    warnings.filterwarnings("ignore")
    names = [a for a in sys.argv[1:] if a != "--write"]
    if unknown := [name for name in names if name not in PUBLISHED]:
        sys.exit(f"error: {unknown[0]} is no class of the table: expected some of {', '.join(PUBLISHED)}, or --write")
    lines = ["| class | as | licence | pipeline | backbone | default patch | 256 prompts a block | here |",
             "|---|---|---|---|--:|--:|--:|---|"]
    for name in PUBLISHED:
        if not names or name in names: lines.append(row(name))
    if "--write" in sys.argv: write(lines)
    else: print("\n".join(lines))


if __name__ == "__main__": main()
