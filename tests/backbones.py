"Tiny models of the backbone classes, random weights throughout, and what their pipelines would call them with."
from functools import partial

import torch
from conftest import randomise
from diffusers import (AuraFlowTransformer2DModel, CogVideoXTransformer3DModel, DiTTransformer2DModel,
                       FluxTransformer2DModel,
                       HunyuanDiT2DModel, PixArtTransformer2DModel, SanaTransformer2DModel, SD3Transformer2DModel,
                       UNet2DConditionModel,
                       UNet2DModel, WanTransformer3DModel)
from diffusers.models.embeddings import get_2d_rotary_pos_embed

from dmp_wb.models.dit import DiT

UNET = dict(sample_size=8, block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8)

# Class and config. PixArt is alpha with its micro-conditions, SD3 is 3.5,
# Flux "dev" (with a guidance embedding), CogVideoX 2b, Wan 2.1, Hunyuan 1.1.
MODELS = {
    "DiT": (DiT,
            dict(sample_size=8, in_channels=4, out_channels=8, hidden_size=32, num_layers=3, num_attention_heads=4)),
    "DiTTransformer2DModel": (DiTTransformer2DModel, dict(
        sample_size=8, in_channels=4, out_channels=8, num_layers=3, num_attention_heads=4, attention_head_dim=8)),
    "PixArtTransformer2DModel": (PixArtTransformer2DModel, dict(
        sample_size=8, num_layers=3, num_attention_heads=4, attention_head_dim=12, cross_attention_dim=48,
        caption_channels=24,
        use_additional_conditions=True)),
    "SanaTransformer2DModel": (SanaTransformer2DModel, dict(
        sample_size=6, in_channels=4, out_channels=4, num_layers=3, num_attention_heads=4, attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=24)),
    "HunyuanDiT2DModel": (HunyuanDiT2DModel, dict(
        sample_size=8, patch_size=2, in_channels=4, num_layers=4, num_attention_heads=4, attention_head_dim=8,
        hidden_size=32, cross_attention_dim=24,
        cross_attention_dim_t5=16, pooled_projection_dim=20, text_len=5, text_len_t5=6)),
    "SD3Transformer2DModel": (SD3Transformer2DModel, dict(
        sample_size=8, in_channels=16, num_layers=3, num_attention_heads=4, attention_head_dim=8,
        joint_attention_dim=64, caption_projection_dim=32,
        pooled_projection_dim=64, pos_embed_max_size=6, dual_attention_layers=(0,), qk_norm="rms_norm")),
    "FluxTransformer2DModel": (FluxTransformer2DModel, dict(
        in_channels=64, num_layers=2, num_single_layers=2, num_attention_heads=2, attention_head_dim=16,
        axes_dims_rope=(4, 6, 6),
        joint_attention_dim=64, pooled_projection_dim=32, guidance_embeds=True)),
    "AuraFlowTransformer2DModel": (AuraFlowTransformer2DModel, dict(
        sample_size=8, num_mmdit_layers=2, num_single_dit_layers=2, num_attention_heads=4, attention_head_dim=8,
        joint_attention_dim=24,
        caption_projection_dim=32, pos_embed_max_size=36)),
    "CogVideoXTransformer3DModel": (CogVideoXTransformer3DModel, dict(
        sample_height=8, sample_width=12, sample_frames=9, in_channels=4, out_channels=4, num_layers=3,
        num_attention_heads=4, attention_head_dim=8,
        time_embed_dim=16, text_embed_dim=24, max_text_seq_length=5)),
    "WanTransformer3DModel": (WanTransformer3DModel, dict(
        in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2, attention_head_dim=12, text_dim=16,
        freq_dim=32, ffn_dim=48,
        rope_max_seq_len=32)),
    "UNet2DModel": (UNet2DModel, dict(
        **UNET, down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"))),
    "UNet2DConditionModel-SD15": (UNet2DConditionModel, dict(
        **UNET, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32,
        attention_head_dim=4)),
    "UNet2DConditionModel-SDXL": (UNet2DConditionModel, dict(
        **UNET, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=24,
        attention_head_dim=[2, 4, 4],
        transformer_layers_per_block=[1, 2, 3], use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + 6 * 8)),
}

# (height, width) or (frames, height, width) of the latents where no config says so;
# Flux's are those before its pipeline packs 2 × 2 into a token
INPUT_SIZE = {"FluxTransformer2DModel": (8, 12), "WanTransformer3DModel": (3, 8, 12)}

# what a timestep argument is multiplied by to lie in 0…1000
SCALE = {name: 1000 if name in ("FluxTransformer2DModel", "AuraFlowTransformer2DModel") else 1 for name in MODELS}
FLOAT_TIMESTEPS = ("HunyuanDiT2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel", "AuraFlowTransformer2DModel")


def build(name):
    "A model of one of the `BACKBONES`, the same at every call."
    cls, config = MODELS[name]
    # with less, text and timestep hardly reach the output of models this narrow
    std = 0.2 if cls is CogVideoXTransformer3DModel else 0.1
    return randomise(cls(**config), std).eval()


BACKBONES = {name: partial(build, name) for name in MODELS}


def timesteps_for(name, batch, timestep=None):
    "Timesteps as a class wants them: whole numbers, or fractions of the noise."
    t = torch.linspace(300, 900, batch).long() if timestep is None else torch.as_tensor(timestep).expand(batch)
    if name in FLOAT_TIMESTEPS: t = t.float()
    return t if SCALE[name] == 1 else t / SCALE[name]


def inputs_for(name, batch=2, timestep=None, seed=1):
    """All keyword arguments of forward. `timestep` lies in 0…1000 for every class, one for the batch or one a sample;
    None: from 300 to 900."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape): return torch.randn(batch, *shape, generator=g)

    t = timesteps_for(name, batch, timestep)
    mask = torch.ones(batch, 5, dtype=torch.long)
    mask[0, 3:] = 0   # the first prompt is shorter
    match name:
        case "DiT" | "DiTTransformer2DModel":
            return dict(hidden_states=randn(4, 8, 8), timestep=t,
                        class_labels=torch.randint(1001, (batch,), generator=g))
        case "PixArtTransformer2DModel":
            return dict(hidden_states=randn(4, 8, 8), timestep=t, encoder_hidden_states=randn(5, 24),
                        encoder_attention_mask=mask,
                        added_cond_kwargs=dict(resolution=torch.full((batch, 2), 64.0),
                                               aspect_ratio=torch.ones(batch, 1)))
        case "SanaTransformer2DModel":
            return dict(hidden_states=randn(4, 6, 6), timestep=t, encoder_hidden_states=randn(5, 24),
                        encoder_attention_mask=mask)
        case "HunyuanDiT2DModel":
            return dict(
                hidden_states=randn(4, 8, 8), timestep=t, encoder_hidden_states=randn(5, 24), text_embedding_mask=mask,
                encoder_hidden_states_t5=randn(6, 16), text_embedding_mask_t5=torch.ones(batch, 6, dtype=torch.long),
                image_meta_size=torch.tensor([[64.0, 64, 64, 64, 0, 0]]).repeat(batch, 1),
                style=torch.zeros(batch, dtype=torch.long),
                image_rotary_emb=get_2d_rotary_pos_embed(8, ((0, 0), (32, 32)), (4, 4), output_type="pt"))
        case "SD3Transformer2DModel":
            return dict(hidden_states=randn(16, 8, 8), timestep=t, encoder_hidden_states=randn(5, 64),
                        pooled_projections=randn(64))
        case "FluxTransformer2DModel":
            rows, columns = (n // 2 for n in INPUT_SIZE[name])
            img_ids = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)).float()
            return dict(hidden_states=randn(rows * columns, 64), timestep=t, encoder_hidden_states=randn(5, 64),
                        pooled_projections=randn(32),
                        guidance=torch.full((batch,), 3.5), img_ids=img_ids, txt_ids=torch.zeros(5, 3))
        case "AuraFlowTransformer2DModel":
            return dict(hidden_states=randn(4, 8, 8), timestep=t, encoder_hidden_states=randn(5, 24))
        case "CogVideoXTransformer3DModel":
            return dict(hidden_states=randn(3, 4, 8, 12), timestep=t, encoder_hidden_states=randn(5, 24))
        case "WanTransformer3DModel":
            return dict(hidden_states=randn(4, *INPUT_SIZE[name]), timestep=t, encoder_hidden_states=randn(5, 16))
        case "UNet2DModel":
            return dict(sample=randn(3, 8, 8), timestep=t)
        case "UNet2DConditionModel-SD15":
            return dict(sample=randn(4, 8, 8), timestep=t, encoder_hidden_states=randn(5, 32))
        case "UNet2DConditionModel-SDXL":
            return dict(sample=randn(4, 8, 8), timestep=t, encoder_hidden_states=randn(5, 24),
                        added_cond_kwargs=dict(text_embeds=randn(20),
                                               time_ids=torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(batch, 1)))


@torch.no_grad()
def output(model, kwargs): return model(**kwargs).sample
