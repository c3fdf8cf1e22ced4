"""Tiny models of every further class that is supported, random weights throughout, and inputs as their pipelines give
them: two samples, each with a timestep of its own."""
from collections.abc import Callable

import diffusers
import torch
from backbones import MODELS
from conftest import randomise

HEADS = dict(num_attention_heads=2, attention_head_dim=16)
FLUX = dict(in_channels=16, num_layers=1, num_single_layers=2, **HEADS, joint_attention_dim=24,
            axes_dims_rope=(4, 6, 6))
UNET = dict(block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=24)
WAN = dict(in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2, attention_head_dim=12, text_dim=16,
           freq_dim=32, ffn_dim=48, rope_max_seq_len=32)


def randn(*shape, seed=1): return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))


T = torch.tensor([300.0, 900.0])
LONG = torch.tensor([300, 900])
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
IMAGES = dict(hidden_states=randn(4, 8, 8), encoder_hidden_states=randn(5, 24))
VIDEOS = dict(hidden_states=randn(4, 3, 8, 12), encoder_hidden_states=randn(5, 24))


def places(rows, columns, axes=3, first=1):
    "`img_ids` of tokens row by row."
    ids = torch.zeros(rows, columns, axes)
    ids[..., first], ids[..., first + 1] = torch.arange(rows)[:, None], torch.arange(columns)
    return ids.flatten(0, 1)


def packed(axes=3): return dict(hidden_states=randn(24, 16), encoder_hidden_states=randn(5, 24), timestep=T / 1000,
                                img_ids=places(4, 6, axes), txt_ids=torch.zeros(5, axes))


def sizes(): return {k: torch.full((2, 2), v) for k, v in
                     (("original_size", 64.0), ("target_size", 64.0), ("crop_coords", 0.0))}


# name → config, inputs, and the size of the inputs where no config says it; a name may say more after a dash
CASES: dict[str, tuple[dict, Callable[[], dict], tuple | None]] = {
    "Flux2Transformer2DModel": (
        {**FLUX, "axes_dims_rope": (4, 4, 4, 4)},
        lambda: packed(4) | dict(guidance=torch.full((2,), 3.5)), (8, 12)),
    "ChromaTransformer2DModel": (
        {**FLUX, "approximator_num_channels": 8, "approximator_hidden_dim": 32, "approximator_layers": 2},
        packed, (8, 12)),
    "BriaTransformer2DModel": (FLUX, lambda: packed() | dict(timestep=T), (8, 12)),
    "LongCatImageTransformer2DModel": (FLUX, packed, (8, 12)),
    "OvisImageTransformer2DModel": (FLUX, packed, (8, 12)),
    "QwenImageTransformer2DModel": (
        dict(in_channels=16, out_channels=4, num_layers=3, **HEADS, joint_attention_dim=24, axes_dims_rope=(4, 6, 6)),
        lambda: dict(hidden_states=randn(24, 16), encoder_hidden_states=randn(5, 24), encoder_hidden_states_mask=MASK,
                     timestep=T / 1000, img_shapes=[[(1, 4, 6)]] * 2), (8, 12)),
    "QwenImageTransformer2DModel-Edit": (
        dict(in_channels=16, out_channels=4, num_layers=3, **HEADS, joint_attention_dim=24, axes_dims_rope=(4, 6, 6)),
        lambda: dict(hidden_states=randn(24 + 8, 16), encoder_hidden_states=randn(5, 24),
                     encoder_hidden_states_mask=MASK, timestep=T / 1000, img_shapes=[[(1, 4, 6), (1, 2, 4)]] * 2),
        (8, 12)),
    "Lumina2Transformer2DModel": (
        dict(sample_size=8, in_channels=4, hidden_size=32, num_layers=3, num_refiner_layers=1, num_attention_heads=2,
             num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 6, 6), axes_lens=(32, 16, 16), cap_feat_dim=24),
        lambda: dict(hidden_states=randn(4, 8, 8), encoder_hidden_states=randn(5, 24), encoder_attention_mask=MASK,
                     timestep=1 - T / 1000), None),
    "ZImageTransformer2DModel": (
        dict(in_channels=4, dim=32, n_layers=3, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=24,
             axes_dims=[4, 6, 6], axes_lens=[128, 16, 16]),
        lambda: dict(x=list(randn(4, 1, 8, 12)), t=1 - T / 1000, cap_feats=[randn(5, 24)[0], randn(40, 24)[1]]),
        (8, 12)),
    "OmniGenTransformer2DModel": (
        dict(in_channels=4, hidden_size=32, num_attention_heads=2, num_key_value_heads=2, intermediate_size=48,
             num_layers=3, pad_token_id=0, vocab_size=50, pos_embed_max_size=8, time_step_dim=16,
             rope_scaling=dict(long_factor=[1.0] * 8, short_factor=[1.0] * 8)),
        lambda: dict(hidden_states=randn(4, 8, 8), timestep=1 - T / 1000, input_ids=torch.tensor([[3] * 5, [4] * 5]),
                     input_img_latents=[], input_image_sizes={}, attention_mask=torch.ones(2, 22, 22),
                     position_ids=torch.arange(22).repeat(2, 1)), (8, 8)),
    "HiDreamImageTransformer2DModel": (
        dict(patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=2, **HEADS,
             caption_channels=[24, 20], text_emb_dim=16, num_routed_experts=2, num_activated_experts=1,
             axes_dims_rope=(4, 6, 6), max_resolution=(8, 16), llama_layers=[0, 1, 1]),
        lambda: dict(hidden_states=randn(4, 8, 8), timesteps=T, encoder_hidden_states_t5=randn(5, 24),
                     encoder_hidden_states_llama3=torch.stack([randn(6, 20), randn(6, 20, seed=2)]),
                     pooled_embeds=randn(16)), (8, 8)),
    "CogView3PlusTransformer2DModel": (
        dict(in_channels=4, out_channels=4, num_layers=3, **HEADS, text_embed_dim=24, time_embed_dim=20,
             condition_dim=8, pos_embed_max_size=8, sample_size=8),
        lambda: IMAGES | sizes() | dict(timestep=LONG), None),
    "CogView4Transformer2DModel": (
        dict(in_channels=4, out_channels=4, num_layers=3, **HEADS, text_embed_dim=24, time_embed_dim=20,
             condition_dim=8, sample_size=8, rope_axes_dim=(16, 16)),
        lambda: IMAGES | sizes() | dict(timestep=T), None),
    "HunyuanImageTransformer2DModel": (
        dict(in_channels=4, out_channels=4, num_layers=1, num_single_layers=2, num_refiner_layers=1, **HEADS,
             text_embed_dim=24, text_embed_2_dim=20, rope_axes_dim=(8, 8), guidance_embeds=True),
        lambda: IMAGES | dict(timestep=T, encoder_attention_mask=MASK, guidance=torch.full((2,), 3500.0),
                              encoder_hidden_states_2=randn(4, 20), encoder_attention_mask_2=torch.ones(2, 4)), (8, 8)),
    "PRXTransformer2DModel": (
        dict(in_channels=4, context_in_dim=24, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=3, axes_dim=[8, 8]),
        lambda: IMAGES | dict(timestep=T / 1000, attention_mask=MASK), (8, 8)),
    "PixArtTransformer2DModel-Sigma": (
        dict(sample_size=8, num_layers=3, num_attention_heads=4, attention_head_dim=12, cross_attention_dim=48,
             caption_channels=24, use_additional_conditions=False),
        lambda: IMAGES | dict(timestep=LONG, encoder_attention_mask=MASK,
                              added_cond_kwargs=dict(resolution=None, aspect_ratio=None)), None),
    "WanVACETransformer3DModel": (
        {**WAN, "vace_layers": [0, 2], "vace_in_channels": 6},
        lambda: dict(hidden_states=randn(4, 3, 8, 12), timestep=LONG, encoder_hidden_states=randn(5, 16),
                     control_hidden_states=randn(6, 3, 8, 12)), (3, 8, 12)),
    "ChronoEditTransformer3DModel": (
        WAN, lambda: dict(hidden_states=randn(4, 2, 8, 12), timestep=LONG, encoder_hidden_states=randn(5, 16)),
        (2, 8, 12)),
    "SkyReelsV2Transformer3DModel": (
        WAN, lambda: dict(hidden_states=randn(4, 3, 8, 12), timestep=LONG, encoder_hidden_states=randn(5, 16)),
        (3, 8, 12)),
    "SkyReelsV2Transformer3DModel-DF": (
        WAN,
        lambda: dict(hidden_states=randn(4, 3, 8, 12), timestep=LONG[:, None].repeat(1, 3),
                     encoder_hidden_states=randn(5, 16), enable_diffusion_forcing=True), (3, 8, 12)),
    "ConsisIDTransformer3DModel": (
        dict(sample_height=8, sample_width=12, sample_frames=9, in_channels=4, out_channels=4, num_layers=3,
             num_attention_heads=4, attention_head_dim=8, time_embed_dim=16, text_embed_dim=24, max_text_seq_length=5),
        lambda: dict(hidden_states=randn(3, 4, 8, 12), timestep=LONG, encoder_hidden_states=randn(5, 24)), None),
    "HunyuanVideoTransformer3DModel": (
        dict(in_channels=4, out_channels=4, num_layers=1, num_single_layers=2, num_refiner_layers=1, **HEADS,
             text_embed_dim=24, pooled_projection_dim=20, rope_axes_dim=(4, 6, 6)),
        lambda: VIDEOS | dict(timestep=T, encoder_attention_mask=MASK, pooled_projections=randn(20),
                              guidance=torch.full((2,), 6000.0)), (3, 8, 12)),
    "HunyuanVideo15Transformer3DModel": (
        dict(in_channels=4, out_channels=4, num_layers=3, num_refiner_layers=1, **HEADS, text_embed_dim=24,
             text_embed_2_dim=20, image_embed_dim=16, rope_axes_dim=(4, 6, 6)),
        lambda: dict(hidden_states=randn(4, 3, 4, 6), timestep=T, encoder_hidden_states=randn(5, 24),
                     encoder_attention_mask=MASK, encoder_hidden_states_2=randn(4, 20),
                     encoder_attention_mask_2=torch.ones(2, 4), image_embeds=randn(3, 16)), (3, 4, 6)),
    "Kandinsky5Transformer3DModel": (
        dict(in_visual_dim=4, in_text_dim=24, in_text_dim2=20, time_dim=32, out_visual_dim=4, model_dim=32, ff_dim=48,
             num_text_blocks=1, num_visual_blocks=3, axes_dims=(4, 6, 6)),
        lambda: dict(hidden_states=randn(3, 8, 12, 4), timestep=T, encoder_hidden_states=randn(5, 24),
                     pooled_projections=randn(20),
                     visual_rope_pos=[torch.arange(3), torch.arange(4), torch.arange(6)],
                     text_rope_pos=torch.arange(5)), (3, 8, 12)),
    "MochiTransformer3DModel": (
        dict(in_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=3, pooled_projection_dim=20,
             text_embed_dim=24, time_embed_dim=16),
        lambda: VIDEOS | dict(timestep=1000 - T, encoder_attention_mask=MASK.bool()), (3, 8, 12)),
    "EasyAnimateTransformer3DModel": (
        dict(**HEADS, in_channels=4, out_channels=4, patch_size=2, sample_width=12, sample_height=8, num_layers=3,
             mmdit_layers=2, time_embed_dim=20, text_embed_dim=24),
        lambda: VIDEOS | dict(timestep=T), (3, 8, 12)),
    "AllegroTransformer3DModel": (
        dict(num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=3,
             cross_attention_dim=48, sample_height=8, sample_width=12, sample_frames=3, caption_channels=24),
        lambda: VIDEOS | dict(timestep=LONG, encoder_attention_mask=MASK,
                              image_rotary_emb=allegro_places(3, 4, 6)), None),
    "CosmosTransformer3DModel": (
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=3, mlp_ratio=2,
             text_embed_dim=24, adaln_lora_dim=4, max_size=(4, 16, 16), concat_padding_mask=False,
             extra_pos_embed_type=None),
        lambda: VIDEOS | dict(timestep=T / 1000, fps=16), (3, 8, 12)),
    "CosmosTransformer3DModel-1": (
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=3, mlp_ratio=2,
             text_embed_dim=24, adaln_lora_dim=4, max_size=(4, 16, 16), concat_padding_mask=False),
        lambda: VIDEOS | dict(timestep=torch.tensor([-0.5, 0.8]), fps=16),
        (3, 8, 12)),
    "LTXVideoTransformer3DModel": (
        dict(in_channels=4, out_channels=4, **HEADS, cross_attention_dim=32, num_layers=3, caption_channels=24),
        lambda: dict(hidden_states=randn(24, 4), timestep=T, encoder_hidden_states=randn(5, 24),
                     encoder_attention_mask=MASK, num_frames=2, height=3, width=4), (2, 3, 4)),
    "LTXVideoTransformer3DModel-tokens": (
        dict(in_channels=4, out_channels=4, **HEADS, cross_attention_dim=32, num_layers=3, caption_channels=24),
        lambda: dict(hidden_states=randn(24, 4), timestep=T[:, None].repeat(1, 24), encoder_hidden_states=randn(5, 24),
                     encoder_attention_mask=MASK, num_frames=2, height=3, width=4), (2, 3, 4)),
    "LTX2VideoTransformer3DModel": (
        dict(in_channels=4, out_channels=4, **HEADS, cross_attention_dim=32, audio_in_channels=4, audio_out_channels=4,
             audio_num_attention_heads=2, audio_attention_head_dim=8, audio_cross_attention_dim=16, num_layers=3,
             caption_channels=24),
        lambda: dict(hidden_states=randn(24, 4), audio_hidden_states=randn(6, 4), timestep=T,
                     encoder_hidden_states=randn(5, 24), audio_encoder_hidden_states=randn(5, 24),
                     encoder_attention_mask=MASK, audio_encoder_attention_mask=MASK, num_frames=2, height=3, width=4,
                     audio_num_frames=6), (2, 3, 4)),
    "SanaVideoTransformer3DModel": (
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=3,
             num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=24,
             sample_size=8),
        lambda: VIDEOS | dict(timestep=T, encoder_attention_mask=MASK), (3, 8, 12)),
    "LatteTransformer3DModel": (
        dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2,
             cross_attention_dim=32, attention_bias=True, sample_size=8, patch_size=2, activation_fn="gelu-approximate",
             norm_type="ada_norm_single", norm_elementwise_affine=False, caption_channels=24, video_length=3),
        lambda: dict(hidden_states=randn(4, 3, 8, 8), timestep=LONG, encoder_hidden_states=randn(5, 24)), None),
    "StableAudioDiTModel": (
        dict(sample_size=12, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
             num_key_value_attention_heads=1, cross_attention_dim=16, time_proj_dim=16, global_states_input_dim=20,
             cross_attention_input_dim=24),
        lambda: dict(hidden_states=randn(4, 12), timestep=T / 1000, encoder_hidden_states=randn(5, 24),
                     global_hidden_states=randn(1, 20), rotary_embedding=(torch.ones(13, 8), torch.zeros(13, 8))),
        None),
    "UNet3DConditionModel": (
        {**UNET, "sample_size": 8, "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
         "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "attention_head_dim": 8},
        lambda: dict(sample=randn(4, 3, 8, 8), timestep=LONG, encoder_hidden_states=randn(5, 24)), None),
    "UNetMotionModel": (
        {**UNET, "sample_size": 8, "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
         "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"), "num_attention_heads": 2,
         "motion_num_attention_heads": 2},
        # its pipeline repeats the text for every frame
        lambda: dict(sample=randn(4, 3, 8, 8), timestep=LONG,
                     encoder_hidden_states=randn(5, 24).repeat_interleave(3, 0)), None),
    "UNetSpatioTemporalConditionModel": (
        dict(sample_size=8, in_channels=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=24,
             num_attention_heads=2, addition_time_embed_dim=8, projection_class_embeddings_input_dim=24,
             down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
             up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")),
        lambda: dict(sample=randn(3, 8, 8, 8), timestep=torch.tensor([-0.5, 1.2]), encoder_hidden_states=randn(1, 24),
                     added_time_ids=torch.tensor([[6.0, 127, 0.02]] * 2)), None),
    "Kandinsky3UNet": (
        dict(in_channels=4, time_embedding_dim=32, groups=4, attention_head_dim=8, layers_per_block=2,
             block_out_channels=(16, 32, 32), cross_attention_dim=24, encoder_hid_dim=24),
        lambda: dict(sample=randn(4, 8, 12), timestep=LONG, encoder_hidden_states=randn(5, 24),
                     encoder_attention_mask=MASK), (8, 12)),
}


def allegro_places(frames, rows, columns):
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro
    t, h, w, *grids = get_3d_rotary_pos_embed_allegro(
        embed_dim=24, crops_coords=((0, 0), (rows, columns)), grid_size=(rows, columns), temporal_size=frames,
        interpolation_scale=(1.0, 1.0, 1.0), device="cpu")
    return (t, h, w), tuple(torch.cartesian_prod(*(g.long() for g in grids)).T.reshape(3, 1, -1))


def build(name):
    "A tiny model of a class, the same at every call."
    cls = getattr(diffusers, name.split("-")[0])
    return randomise(cls(**CASES[name][0]), 0.15).eval()


CLASSES = {name.split("-")[0] for name in (*CASES, *MODELS)}
