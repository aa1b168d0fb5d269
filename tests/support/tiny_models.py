"""Architectures of transformers, made tiny from their configs: no weights, no network."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tdpo_ext.integrations.models import decoder_inputs

VOCABULARY = 61
_WIDTH: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_WIDTH, "num_key_value_heads": 1}
_HEADS_OF_8 = {**_GROUPED, "head_dim": 8}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "llama-one-layer": ("LlamaConfig", {**_GROUPED, "num_hidden_layers": 1}),
    "llama-tied": ("LlamaConfig", {**_GROUPED, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", _HEADS_OF_8),
    "mistral": ("MistralConfig", _HEADS_OF_8),
    "gemma2-softcap": ("Gemma2Config", {**_HEADS_OF_8, "final_logit_softcapping": 0.5}),
    "gemma3": ("Gemma3TextConfig", {**_HEADS_OF_8, "final_logit_softcapping": 0.7}),
    "cohere-scale": ("CohereConfig", {**_GROUPED, "logit_scale": 0.25}),
    "cohere2-scale": ("Cohere2Config", {**_HEADS_OF_8, "logit_scale": 0.5}),
    "granite-scaling": ("GraniteConfig", {**_GROUPED, "logits_scaling": 4.0}),
    "hyperclovax-multiplies": (
        "HyperCLOVAXConfig",
        {**_GROUPED, "logits_scaling": 4.0},
    ),
    "minicpm3-before-the-head": (
        "MiniCPM3Config",
        {
            **_WIDTH,
            "dim_model_base": 4,  # it divides by hidden_size / dim_model_base
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
    ),
    "phi-bias": ("PhiConfig", _WIDTH),
    "phi3": ("Phi3Config", _GROUPED),
    "gpt2-tied": ("GPT2Config", _GPT2),
    "gpt-neox": ("GPTNeoXConfig", _WIDTH),
    "gptj-bias": ("GPTJConfig", {**_GPT2, "rotary_dim": 4}),
    "opt-projection": (
        "OPTConfig",
        {**_WIDTH, "ffn_dim": 24, "word_embed_proj_dim": 8, "max_position_embeddings": 64},
    ),
    "bloom": ("BloomConfig", {**_WIDTH, "n_layer": 2, "n_head": 2}),
    "falcon": ("FalconConfig", _WIDTH),
    "stablelm": ("StableLmConfig", _GROUPED),
    "olmo2": ("Olmo2Config", _GROUPED),
    "starcoder2": ("Starcoder2Config", _GROUPED),
    "smollm3": ("SmolLM3Config", _GROUPED),
    "mixtral": (
        "MixtralConfig",
        {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "jetmoe": (
        "JetMoeConfig",
        {
            **_WIDTH,
            "kv_channels": 8,
            "num_key_value_heads": 2,
            "num_attention_heads": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {
            **_HEADS_OF_8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
        },
    ),
    "mamba": (
        "MambaConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    ),
    "falcon-h1-multiplier": (
        "FalconH1Config",
        {
            **_HEADS_OF_8,
            "lm_head_multiplier": 0.3,
            "mamba_d_ssm": 16,
            "mamba_n_heads": 2,
            "mamba_d_head": 8,
            "mamba_d_state": 4,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 4,
        },
    ),
    "t5-scaled-tied": ("T5Config", {**_T5, "tie_word_embeddings": True}),
    "t5-untied": ("T5Config", {**_T5, "tie_word_embeddings": False}),
    "bart-encoder-decoder": (
        "BartConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "max_position_embeddings": 64,
        },
    ),
}
# Older versions of transformers lack the newest of them.
CONFIGS = {name: made for name, made in CONFIGS.items() if hasattr(transformers, made[0])}


def tiny_model(name: str = "llama", seed: int = 0) -> Any:
    """In float32 and evaluation mode, with initial weights large enough for peaked logits."""
    kind, options = CONFIGS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, kind)(**options)
    if config.is_encoder_decoder:
        model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # biases start at 0, where a lost one would not be seen
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.2)
            elif parameter.dim() == 2:
                parameter.mul_(3)
    return model.eval()


def tiny_batch(model: Any, pairs: int = 2, tokens: int = 7, seed: int = 0) -> dict[str, Any]:
    """``model(**inputs)``, with labels ``[2 pairs, tokens]`` apart."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2 * pairs, tokens)
    ids = torch.randint(3, VOCABULARY, shape, generator=generator)
    labels = ids.clone()
    labels[:, :2] = -100
    labels[-1, -2:] = -100
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = decoder_inputs(model, labels)
    return {"inputs": inputs, "labels": labels}
