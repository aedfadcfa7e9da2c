"""A tiny configuration of any class of transformers: its defaults, shrunk name by name.

Every sub-configuration is shrunk by the same rules. What the rules do not know stays as it is, so
that a new model is either built or listed with the reason why it could not be.
"""

from __future__ import annotations

import re
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.sweep.exceptions import CONFIG

VOCAB = 99
WIDTH = 32
HEADS = 4
HEAD = 8  # WIDTH / HEADS
SECTIONS = [1, 1, 2]  # of the HEAD / 2 frequencies: time, height, width
IMAGE = 32
MELS = 16
FRAMES = 32  # of a log-mel spectrogram

# The first pattern that matches an attribute's whole name gives its value; None keeps the default.
RULES: tuple[tuple[str, Any], ...] = (
    (
        r".*(drop|dropout)(_?(rate|prob|p|path))?|.*drop.*(rate|prob)|.*pdrop|layerdrop|.*jitter.*",
        0.0,
    ),
    (r"apply_spec_augment", False),
    (r"mask_(time|feature)_prob", 0.0),
    (r"num_feat_extract_layers|num_conv_layers", None),
    (r"num_groups", 4),
    (r"max_source_positions", FRAMES // 2),
    (r"type_vocab_size", 2),
    (r"additional_vocab_size", 0),
    (r".*vocab_size.*", VOCAB),
    (
        r"num_(key_value|kv)_heads|.*num_key_value_heads|num_key_value_attention_heads|num_kv_heads",
        2,
    ),
    (r"mamba_(n|num)_heads|n_mamba_heads|num_sliding_attention_heads", 8),
    (r"linear_(num_key_heads)", 2),
    (r"linear_num_(value_heads|heads)|linear_num_heads", HEADS),
    (r"qk_head_dim", 2 * HEAD),
    (r"(kv|q|o)_lora_rank|.*_rank", 8),
    (r"mamba_(d_head|head_dim|headdim)", HEAD),
    (r"mamba_d_ssm", 2 * WIDTH),
    (
        r".*head_dim|attention_head_size|d_kv|dim_head|d_head|kv_channels|.*(nope|rope|v)_head_dim",
        HEAD,
    ),
    (r"rotary_dim", HEAD // 2),
    (r".*heads(_per_layer)?|n_head", HEADS),
    (
        r"(text_|vision_)?num_hidden_layers|.*_layers|n_layers?|num_layers|depth|layers|num_blocks",
        2,
    ),
    (r"moe_intermediate_size|.*expert.*_(size|dim)|moe_hidden_size", 16),
    (
        r".*intermediate_size.*|.*ffn_(hidden_)?(dim|size)|d_ff|dff|mlp_dim|n_inner|dim_ff|d_inner",
        48,
    ),
    (
        r"(num_|n_)?(routed_|local_|moe_)*experts|moe_num_experts|n_routed_experts|num_local_experts",
        4,
    ),
    (r"num_experts_per_tok(en)?|moe_(top)?k|top_k_experts|experts_per_token|router_top_k", 2),
    (r"n_group|topk_group|num_expert_group|expert_capacity", 1),
    (r"zero_expert_num", 2),
    (r".*max_.*position.*|n_positions|n_ctx|max_seq_len|seq_len|max_length|context_length", 64),
    (r"max_target_positions", 64),
    (r"(ssm_)?state_size|mamba_d_state|d_state|.*d_state", HEAD),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r"chunk_size|mamba_chunk_size|.*attention_chunk_size", 4),
    (r".*sliding_window|attention_window(_size)?|.*local_attention|window", 4),
    (r"index_topk", 4),
    (r"window_size", 2),
    (r"image_size|input_size|crop_size|img_size|resolution", IMAGE),
    (r"num_mel_bins|n_mels|num_mels", MELS),
    (r"feature_size|input_feat_per_channel", MELS),
    (r"tdnn_dim|xvector_output_dim|classifier_proj_size", 16),
    (r"conv_depthwise_kernel_size", 3),
    (r"num_conv_pos_embeddings", 4),
    (r"num_conv_pos_embedding_groups", 2),
    (r"num_codevectors_per_group|num_negatives", 4),
    (
        r"n_embd|.*d_model|dim|.*hidden_dim|.*hidden_size(_per_layer_input)?|.*embed_dim|embedding_size",
        WIDTH,
    ),
    (
        r".*projection_(dim|size)|projection_dim|.*_proj_(dim|size)|lru_width|emb_dim|embedding_dim",
        WIDTH,
    ),
    (r".*(out|output)_(dim|hidden_size)|.*output_size|.*codevector_dim|pooler.*size", WIDTH),
)
_RULES = [(re.compile(pattern), value) for pattern, value in RULES]
DERIVED = (
    *("transformers_version", "architectures", "dtype", "torch_dtype", "attribute_map"),
    *("stage_names", "out_features", "out_indices", "id2label", "label2id"),
)
TOKEN = re.compile(r".*(_token_id|_token_index|_idx|_id)s?$")
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
QUERIES = "num_attention_heads"
_IN_STAGES = [
    (re.compile(r"conv_dim|conv_channels|tdnn_dim"), lambda place: 16),
    (re.compile(r".*(hidden_sizes|embed_dims?|dims|channels)"), lambda place: 16 * (place + 1)),
    (re.compile(r"depths?|num_blocks|layers|stage_num.*"), lambda place: 1 + place % 2),
    (re.compile(r".*heads"), lambda place: 2),
]
UNSET = {"vocab_size": VOCAB, "head_dim": HEAD, "n_routed_experts": 4, "num_key_value_heads": HEADS}
STAGES = {"embed_dim": 16}  # where the width doubles from stage to stage
PATCHES = re.compile(r"patch_size|encoder_stride|spatial_patch_size")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "depth")


def tiny(config_class: Any) -> Any:
    """A configuration of the class with every dimension shrunk."""
    return config_class(**_shrunk(config_class, nested=False, default=config_class().to_dict()))


def _shrunk(config_class: Any, nested: bool, default: dict[str, Any]) -> dict[str, Any]:
    level = _Level(config_class.sub_configs, nested, default)
    found = {name: level.value(name, v) for name, v in default.items() if name not in DERIVED}
    if not nested:
        found.pop("model_type", None)
    return found | CONFIG.get(config_class.__name__, {})


class _Level:
    """One configuration, of a model or of a part of it, whose layers are cut together.

    Attributes:
        kept: which layers stay: two, or one of each kind where the configuration lists kinds.
    """

    def __init__(self, kinds: dict[str, Any], nested: bool, default: dict[str, Any]) -> None:
        self.kinds, self.nested, self.default = kinds, nested, default
        self.layers = next((default[k] for k in LAYERS if isinstance(default.get(k), int)), 0)
        self.kept = self._kept()
        self.unused = iter(range(VOCAB - 1, 0, -1))  # ids for tokens that mean something

    def _kept(self) -> list[int]:
        lists = [v for v in self.default.values() if self._is_by_layer(v)]
        kinds = [v for v in lists if isinstance(v[0], (str, bool))]
        if not kinds:
            return [0, 1]
        rows = list(zip(*kinds, strict=True))
        first = [rows.index(row) for row in dict.fromkeys(rows)]
        return [0, 1] if len(first) == 1 else sorted(first[:4])

    def _is_by_layer(self, value: Any) -> bool:
        return isinstance(value, list) and len(value) == self.layers > 4

    def value(self, name: str, value: Any) -> Any:
        """The tiny counterpart of an attribute's default."""
        if isinstance(value, dict):
            return self._dict(name, value)
        if TOKEN.fullmatch(name):
            return self._token(name, value)
        if name in LAYERS and isinstance(value, int):
            return len(self.kept)
        if self._is_by_layer(value):
            return [self._number(name, value[i]) for i in self.kept]
        if isinstance(value, (list, tuple)):
            return [_in_stage(name, v, place) for place, v in enumerate(value)]
        return self._number(name, UNSET.get(name) if value is None else value)

    def _dict(self, name: str, value: dict[Any, Any]) -> dict[Any, Any]:
        if name in self.kinds:
            kind = value.get("model_type")
            config_class = CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else self.kinds[name]
            return _shrunk(config_class, nested=True, default=value)
        if name == "per_layer_config":
            return {self.kept.index(int(k)): v for k, v in value.items() if int(k) in self.kept}
        if "rope" not in name:
            return value
        found = _rope(value)
        if self.nested and "rope_theta" in value:  # of a model of images, whose default is wider
            found.setdefault("mrope_section", SECTIONS)
        return found

    def _token(self, name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [self._token(name, v) for v in value]
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            return value
        return SPECIAL[name] if name in SPECIAL else next(self.unused)

    def _number(self, name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [self._number(name, v) for v in value]
        if not _is_number(value):
            return value
        if PATCHES.fullmatch(name):
            return min(value, 8)
        small = next((small for pattern, small in _RULES if pattern.fullmatch(name)), None)
        if "depths" in self.default:
            small = STAGES.get(name, small)
        if ("key_value" in name or "kv_heads" in name) and value == self.default.get(QUERIES):
            small = HEADS
        return _smaller(value, small)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _smaller(value: float, small: Any) -> Any:
    """The default where it is small already, or a fraction that a rule for sizes caught."""
    if small is None or (isinstance(value, float) and not isinstance(small, float)):
        return value
    return type(value)(small) if small == 0 or value > small else value


def _in_stage(name: str, value: Any, place: int) -> Any:
    """A number for one stage of a model in stages, which widens by steps of 16."""
    if isinstance(value, (list, tuple)):
        return [_in_stage(name, v, i) for i, v in enumerate(value)]
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    limits = (limit(place) for pattern, limit in _IN_STAGES if pattern.fullmatch(name))
    limit = next(limits, value)
    return min(value, limit) if value > 1 else value


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Sections and factors by frequency, cut to the HEAD / 2 frequencies of a tiny head."""
    found = dict(parameters)
    for name, value in parameters.items():
        if isinstance(value, dict):
            found[name] = _rope(value)
        elif name.endswith("mrope_section") and len(value) == 3:
            found[name] = SECTIONS
        elif name in ("short_factor", "long_factor"):
            found[name] = value[: HEAD // 2]
    return found
