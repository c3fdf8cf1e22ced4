"Tiny whole pipelines that are trained on: those of `pipelines`, and more, as folders."
from functools import partial

from backbones import BACKBONES
from conftest import randomise
from diffusers import (AuraFlowPipeline, AutoencoderDC, AutoencoderKLCogVideoX, AutoencoderKLQwenImage,
                       AutoencoderKLWan, ChromaPipeline, ChromaTransformer2DModel, CogVideoXDDIMScheduler,
                       CogVideoXPipeline, CogVideoXTransformer3DModel, CogView3PlusPipeline,
                       CogView3PlusTransformer2DModel, DDIMScheduler, EulerDiscreteScheduler,
                       FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel,
                       PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel, QwenImagePipeline,
                       QwenImageTransformer2DModel, SanaPipeline, SanaTransformer2DModel, StableDiffusionXLPipeline,
                       WanPipeline, WanTransformer3DModel, ZImagePipeline, ZImageTransformer2DModel)
from more_backbones import CASES
from pipelines import (autoencoder, CLIP_WIDTH, clip, clip_tokenizer, flux_pipeline, PROMPT_LENGTH, sd3_pipeline,
                       sd_pipeline, seeded, T5_WIDTH, t5)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (CLIPTextModel, CLIPTextModelWithProjection, Gemma2Config, Gemma2Model,
                          Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, Qwen3Config, Qwen3Model,
                          UMT5Config, UMT5EncoderModel)

from dmp_wb.core.settings import DataConfig


def sdxl_pipeline(folder):
    tokenizer, tokenizer_2 = (clip_tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2"))
    unet = dict(BACKBONES["UNet2DConditionModel-SDXL"]().config) | dict(
        cross_attention_dim=2 * CLIP_WIDTH, projection_class_embeddings_input_dim=CLIP_WIDTH + 6 * 8)
    return StableDiffusionXLPipeline(
        unet=randomise(type(BACKBONES["UNet2DConditionModel-SDXL"]()).from_config(unet), 0.1).eval(),
        vae=autoencoder(4, scaling_factor=0.13, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 0.6, 0.7, 0.8]),
        scheduler=EulerDiscreteScheduler(), tokenizer=tokenizer, text_encoder=clip(CLIPTextModel, tokenizer),
        tokenizer_2=tokenizer_2, text_encoder_2=clip(CLIPTextModelWithProjection, tokenizer_2, seed=1))


def pixart_pipeline(folder, cls=PixArtAlphaPipeline):
    encoder, tokenizer = t5()
    model = PixArtTransformer2DModel(sample_size=8, num_layers=3, num_attention_heads=4, attention_head_dim=12,
                                     cross_attention_dim=48, caption_channels=T5_WIDTH,
                                     use_additional_conditions=False)
    return cls(tokenizer=tokenizer, text_encoder=encoder, vae=autoencoder(4, scaling_factor=0.13025),
               transformer=randomise(model, 0.1).eval(), scheduler=DDIMScheduler(clip_sample=False))


def gemma(tokenizer):
    config = Gemma2Config(vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=2,
                          num_attention_heads=2, num_key_value_heads=1, head_dim=12)
    return seeded(lambda: Gemma2Model(config))


def sana_pipeline(folder):
    _, tokenizer = t5()
    model = SanaTransformer2DModel(sample_size=16, in_channels=4, out_channels=4, num_layers=3, num_attention_heads=4,
                                   attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=16,
                                   cross_attention_dim=32, caption_channels=24)
    vae = seeded(lambda: AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
        scaling_factor=0.41407))
    return SanaPipeline(tokenizer=tokenizer, text_encoder=gemma(tokenizer), vae=vae,
                        transformer=randomise(model, 0.1).eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))


def wan_pipeline(folder):
    _, tokenizer = t5()
    config = UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    model = WanTransformer3DModel(in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2,
                                  attention_head_dim=12, text_dim=16, freq_dim=32, ffn_dim=48, rope_max_seq_len=32)
    vae = seeded(lambda: AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.6, 0.7, 0.8]))
    return WanPipeline(tokenizer=tokenizer, text_encoder=seeded(lambda: UMT5EncoderModel(config)), vae=vae,
                       transformer=randomise(model, 0.1).eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))


def qwen_tokenizer():
    words = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])


def qwen_pipeline(folder):
    tokenizer = qwen_tokenizer()
    text = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=2, rope_parameters={"mrope_section": [1, 1, 2],
                                                                               "rope_type": "default"})
    sight = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=sight)
    vae = seeded(lambda: AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.6, 0.7, 0.8]))
    model = QwenImageTransformer2DModel(in_channels=16, out_channels=4, num_layers=3, num_attention_heads=2,
                                        attention_head_dim=16, joint_attention_dim=16, axes_dims_rope=(4, 6, 6))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9)
    return QwenImagePipeline(scheduler=scheduler, vae=vae, tokenizer=tokenizer,
                             text_encoder=seeded(lambda: Qwen2_5_VLForConditionalGeneration(config)),
                             transformer=randomise(model, 0.1).eval())


def auraflow_pipeline(folder):
    _, tokenizer = t5()
    config = UMT5Config(vocab_size=len(tokenizer), d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return AuraFlowPipeline(tokenizer=tokenizer, text_encoder=seeded(lambda: UMT5EncoderModel(config)),
                            vae=autoencoder(4, scaling_factor=0.13025),
                            transformer=BACKBONES["AuraFlowTransformer2DModel"](),
                            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73))


def cogvideox_pipeline(folder):
    encoder, tokenizer = t5()
    vae = seeded(lambda: AutoencoderKLCogVideoX(
        in_channels=3, out_channels=3, latent_channels=4, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 8, 8, 8), temporal_compression_ratio=4, scaling_factor=0.7,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4))
    model = CogVideoXTransformer3DModel(
        sample_height=4, sample_width=4, sample_frames=1, in_channels=4, out_channels=4, num_layers=3,
        num_attention_heads=2, attention_head_dim=16, time_embed_dim=16, text_embed_dim=T5_WIDTH,
        max_text_seq_length=PROMPT_LENGTH, use_rotary_positional_embeddings=True)
    return CogVideoXPipeline(tokenizer=tokenizer, text_encoder=encoder, vae=vae,
                             transformer=randomise(model, 0.1).eval(),
                             scheduler=CogVideoXDDIMScheduler(prediction_type="v_prediction"))


def lumina_pipeline(folder):
    _, tokenizer = t5()
    model = Lumina2Transformer2DModel(**CASES["Lumina2Transformer2DModel"][0] | {"axes_lens": (300, 16, 16)})
    return Lumina2Pipeline(tokenizer=tokenizer, text_encoder=gemma(tokenizer), transformer=randomise(model, 0.1).eval(),
                           vae=autoencoder(4, scaling_factor=0.3611, shift_factor=0.1159),
                           scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0))


def z_image_pipeline(folder):
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    text = Qwen3Config(vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=2,
                       num_attention_heads=2, num_key_value_heads=1, head_dim=12)
    model = ZImageTransformer2DModel(**CASES["ZImageTransformer2DModel"][0])
    return ZImagePipeline(tokenizer=tokenizer, text_encoder=seeded(lambda: Qwen3Model(text)),
                          vae=autoencoder(4, scaling_factor=0.3611, shift_factor=0.1159),
                          transformer=randomise(model, 0.1).eval(),
                          scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))


def chroma_pipeline(folder):
    encoder, tokenizer = t5()
    model = ChromaTransformer2DModel(**CASES["ChromaTransformer2DModel"][0] | {"joint_attention_dim": T5_WIDTH})
    return ChromaPipeline(tokenizer=tokenizer, text_encoder=encoder, transformer=randomise(model, 0.1).eval(),
                          vae=autoencoder(4, scaling_factor=0.3611, shift_factor=0.1159),
                          scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))


def cogview_pipeline(folder):
    encoder, tokenizer = t5()
    model = CogView3PlusTransformer2DModel(**CASES["CogView3PlusTransformer2DModel"][0] | {"text_embed_dim": T5_WIDTH})
    return CogView3PlusPipeline(tokenizer=tokenizer, text_encoder=encoder, vae=autoencoder(4, scaling_factor=0.7),
                                transformer=randomise(model, 0.1).eval(),
                                scheduler=CogVideoXDDIMScheduler(prediction_type="v_prediction"))


# pipeline → how it is made, the side of its images, and what an experiment on it says beside it
TRAINED = {
    "StableDiffusionPipeline": (sd_pipeline, 16, ["schedule.name=scaled_linear"]),
    "StableDiffusion3Pipeline": (sd3_pipeline, 16, ["objective.prediction_type=flow_prediction"]),
    "FluxPipeline": (flux_pipeline, 16, ["objective.prediction_type=flow_prediction"]),
    "StableDiffusionXLPipeline": (sdxl_pipeline, 16, ["schedule.name=scaled_linear"]),
    "PixArtAlphaPipeline": (pixart_pipeline, 16, []),
    "PixArtSigmaPipeline": (partial(pixart_pipeline, cls=PixArtSigmaPipeline), 16, []),
    "SanaPipeline": (sana_pipeline, 32, ["objective.prediction_type=flow_prediction"]),
    "QwenImagePipeline": (qwen_pipeline, 32, ["objective.prediction_type=flow_prediction"]),
    "AuraFlowPipeline": (auraflow_pipeline, 16, ["objective.prediction_type=flow_prediction"]),
    "CogVideoXPipeline": (cogvideox_pipeline, 32, ["objective.prediction_type=v_prediction"]),
    "Lumina2Pipeline": (lumina_pipeline, 16, ["objective.prediction_type=flow_prediction"]),
    "ZImagePipeline": (z_image_pipeline, 16, ["objective.prediction_type=flow_prediction"]),
    "ChromaPipeline": (chroma_pipeline, 16, ["objective.prediction_type=flow_prediction"]),
    "CogView3PlusPipeline": (cogview_pipeline, 16, ["objective.prediction_type=v_prediction"]),
    "WanPipeline": (wan_pipeline, 32, ["objective.prediction_type=flow_prediction"]),
}

# classes without text that are trained, sampled and explored with their class labels
WITHOUT_TEXT = ("DiT", "DiTTransformer2DModel", "UNet2DModel")

CAPTIONS = ["a cat", "two dogs", "a red house", "", "the sea", "cats"]


def length_of(pipe):
    "The tokens that a prompt is padded to: some have a preamble."
    index = (pipe / "model_index.json").read_text()
    return 256 if "QwenImage" in index or "Lumina2" in index else PROMPT_LENGTH


def data(photos, pipe, side, **more):
    return DataConfig(name=str(photos), size=side, caption_column="text", pipeline=str(pipe),
                      prompt_length=length_of(pipe), conditional=False, num_workers=0, **more)


def experiment(name, pipe, source, *more):
    return ["base=" + str(pipe), f"data.name={source}", "data.num_workers=0", "methods={dmp: {num_prompts: 4}}",
            "train.batch_size=2", "train.steps=4", "train.checkpoint_every=2", "train.log_every=1", "train.cpu=true",
            "train.label_dropout=0.3", "name=tried", "train.log_with=null", *TRAINED[name][2], *more]
