"""Every language model of the installed transformers, made tiny from its config's defaults."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

import torch
import transformers

VOCABULARY = 61
MOST_PARAMETERS = 3_000_000

# The first that matches a field's name, where the default is a number.
_SIZES: list[tuple[str, int]] = [
    (r"vocab_size|(text_|decoder_|encoder_)?vocab_size", VOCABULARY),
    (r"pad_token_id|decoder_start_token_id", 0),
    (r"bos_token_id", 1),
    (r"eos_token_id", 2),
    (r"qk_rope_head_dim|rotary_dim", 4),
    (r".*(head_dim|d_kv|d_head|head_size|kv_channels)", 8),
    (r".*lora_rank|.*_rank", 8),
    (r".*(key_value_heads|kv_heads|query_groups|kv_groups)", 2),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r".*(heads|n_head)", 4),
    (r"num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|top_?k_experts|experts_top_k", 2),
    (r"n_shared_experts|num_shared_experts|n_group|num_expert_group|topk_group|n_groups", 1),
    (r".*experts", 4),
    (r"first_k_dense_replace|num_nextn_predict_layers|moe_layer_start_index", 1),
    (r".*(num_|n_|encoder_|decoder_|hidden_|^)layers?|n_layer|.*num_blocks", 2),
    (r".*(intermediate_size|ffn_dim|d_ff|ffn_hidden_size|mlp_dim|intermediate_dim|n_inner)", 48),
    (r"mamba_d_ssm", 64),
    (r".*(state_size|d_state)", 4),
    (r".*chunk_size", 4),
    (r".*(hidden_size|d_model|n_embd|embed_dim|model_dim|hidden_dim|embedding_size)|dim|width", 32),
    (r".*(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length)", 64),
    (r"image_size", 32),
    (r"patch_size", 16),
    (r"sliding_window|attention_window|local_window", 16),
]

OWN: dict[str, dict[str, Any]] = {
    "Gemma4TextConfig": {"vocab_size_per_layer_input": VOCABULARY},
    "Mamba2Config": {"num_heads": 8},
    "GPTNeoConfig": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "xLSTMConfig": {"qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "XmodConfig": {"default_language": "en_XX"},
    "FSMTConfig": {"src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY},
    "XLMConfig": {"n_words": VOCABULARY, "emb_dim": 32},
    "FlaubertConfig": {"n_words": VOCABULARY, "emb_dim": 32},
}
"""By config's class: what the patterns cannot know."""


def size_of(field: str) -> int | None:
    for pattern, size in _SIZES:
        if re.fullmatch(pattern, field):
            return size
    return None


def shrunk(config: Any, layers: int = 2, sections: bool = False) -> dict[str, Any]:
    """Arguments with which the config's class makes a small one.

    Args:
        sections: the rotary embedding has parts for time, height and width, not of default size.
    """
    fields = vars(config)
    arguments: dict[str, Any] = {}
    for field, value in fields.items():
        if isinstance(value, transformers.PretrainedConfig):
            small = shrunk(value, layers, sections)
            arguments[field] = {**small, "model_type": value.model_type}
        elif isinstance(value, int) and not isinstance(value, bool):
            size = layers if re.fullmatch(r"num_hidden_layers|n_layers?", field) else size_of(field)
            if size is not None:
                arguments[field] = size if "token_id" in field else min(size, value)
        elif field == "head_dim":
            arguments[field] = 8
    heads = [fields.get(name) for name in ("num_attention_heads", "num_key_value_heads")]
    if heads[1] is not None and heads[0] == heads[1]:
        arguments["num_key_value_heads"] = arguments["num_attention_heads"]
    if "qk_rope_head_dim" in fields and "head_dim" in fields:
        arguments["head_dim"] = arguments["qk_rope_head_dim"]
    rope = fields.get("rope_parameters")
    if sections and isinstance(rope, dict) and "num_attention_heads" in fields:
        half = int(8 * rope.get("partial_rotary_factor", 1.0)) // 2
        parts = [max(1, half - 2), min(1, half - 1), max(0, min(1, half - 2))]
        arguments["rope_parameters"] = {**rope, "mrope_section": parts}
    kinds = fields.get("layer_types")
    if isinstance(kinds, list) and {*kinds[:layers]} == {"linear_attention"}:
        if "full_attention" in kinds:
            arguments["num_hidden_layers"] = kinds.index("full_attention") + 1
        else:
            arguments["layer_types"] = [*kinds[: layers - 1], "full_attention"]
    return {**arguments, **OWN.get(type(config).__name__, {})}


def language_models() -> list[str]:
    """Names of the classes that have a head over tokens."""
    ending = re.compile(r"\w+(ForCausalLM|ForConditionalGeneration|LMHeadModel)")
    names = [name for name in sorted(dir(transformers)) if ending.fullmatch(name)]
    return [name for name in names if not name.startswith("Auto") and "PreTrained" not in name]


def tiny_config(model_class: Any) -> Any:
    """With as many layers as its pattern of layers needs."""
    config_class = model_class.config_class
    defaults = config_class()
    sections = "mrope_section" in inspect.getsource(sys.modules[model_class.__module__])
    try:
        return config_class(**shrunk(defaults, sections=sections))
    except Exception:
        layers = getattr(defaults, "num_hidden_layers", 4)
        return config_class(**shrunk(defaults, layers, sections))


def tiny_architecture(name: str) -> Any:
    """In float32 and evaluation mode, with random weights, from seed 0."""
    model_class = getattr(transformers, name)
    config = tiny_config(model_class)
    if config.is_encoder_decoder:  # pretrained configs say it
        for field in ("decoder_start_token_id", "pad_token_id"):
            if getattr(config, field, None) is None:
                setattr(config, field, 0)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in model_class(config).parameters())
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"{parameters} parameters")
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():  # initial weights give flat logits, and zeros hide what is lost
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return model.float().eval()
