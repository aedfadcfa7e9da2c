"""What the rules of configs.py and batches.py cannot know of single classes."""

from __future__ import annotations

from typing import Any

# Masks of torch.finfo(float64).min that are made in the default dtype
DEFAULT_DOUBLE = ("FSMT", "XGLM")
# A fully masked row of scores is NaN in these, so no example is padded
NOT_PADDED = ("ProphetNet", "LED", "Longformer", "Canine", "FSMT")
NOT_A_MODEL: frozenset[str] = frozenset()  # names in a mapping that are no class

# by class or configuration: dotted names -> values
CONFIG: dict[str, dict[str, Any]] = {
    "BambaConfig": {"attn_layer_indices": [1]},
    "BitConfig": {"num_groups": 4},
    "BltConfig": {
        "encoder_hash_byte_group_vocab": 50,
        "encoder_hash_byte_group_size": [3, 4],
    },
    "CvtConfig": {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 2], "depth": [1, 1, 2]},
    "CohereCompassTextConfig": {"layer_types": ["full_attention"] * 2},
    "DeepseekV2Config": {"num_experts_per_tok": 2},
    "Dots1Config": {"num_experts_per_tok": 2, "n_shared_experts": 1},
    "DoryConfig": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    "EfficientNetConfig": {
        "depth_coefficient": 0.3,
        "in_channels": [32, 16, 16],
        "out_channels": [16, 16, 24],
        "kernel_sizes": [3, 3, 5],
        "strides": [1, 2, 2],
        "num_block_repeats": [1, 2, 1],
        "expand_ratios": [1, 2, 2],
        "depthwise_padding": [],
        "hidden_dim": 64,
    },
    "Gemma3nTextConfig": {"num_kv_shared_layers": 0},
    "GraniteMoeHybridConfig": {"layer_types": ["linear_attention", "full_attention"]},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "Mamba2Config": {"num_heads": 8, "head_dim": 8},
    "MobileNetV1Config": {"depth_multiplier": 0.25},
    "MobileNetV2Config": {"depth_multiplier": 0.25},
    "RecurrentGemmaConfig": {"block_types": ["recurrent", "attention"]},
    "ReformerConfig": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "num_hashes": 1,
        "attn_layers": ["local", "local"],
    },
    "HGNetV2Config": {
        "stem_channels": [3, 16, 16],
        "stage_in_channels": [16, 16, 32, 32],
        "stage_mid_channels": [8, 8, 16, 16],
        "stage_out_channels": [16, 32, 32, 64],
    },
    "DonutSwinConfig": {"image_size": 64},
    "LayoutLMv3Config": {"coordinate_size": 6, "shape_size": 4},
    "LiltConfig": {"hidden_size": 48},
    "Mistral4Config": {"head_dim": 16},
    "MobileBertConfig": {"intra_bottleneck_size": 32},
    "SwinConfig": {"image_size": 64},
    "ZambaConfig": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
    },
    "LevitConfig": {"image_size": 64, "patch_size": 16},
    "MobileViTV2Config": {"image_size": 64},
    "MobileViTConfig": {"image_size": 64},
    "PerceiverConfig": {
        "d_latents": 32,
        "num_latents": 4,
        "num_self_attends_per_block": 1,
        "num_self_attention_heads": 1,
        "num_cross_attention_heads": 1,
    },
    "xLSTMConfig": {"qk_dim_factor": 1.0},
    "XmodConfig": {"default_language": "en_XX"},
    "Zamba2Config": {
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "num_mem_blocks": 1,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
    },
}
