"""Tiny random models of many families, each with the demo's tokenizer, and each sequence's log p by
transformers alone: the oracle of test_families.py and test_model_checks.py."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import THETA0
from train_gpu import pair_of
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from spin.data.pairs import share_prompts

SMALL = {
    **{"vocab_size": 88, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None},
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "max_position_embeddings": 64},
}
GROUPED = {"num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
WINDOW = {"sliding_window": 7}
FULL_AND_WINDOW = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
USED_WINDOW = {**FULL_AND_WINDOW, "use_sliding_window": True}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LONGROPE = {
    **{"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 20},
    **{"short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
}
MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
SSD = {**MAMBA, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}
FOUR = {**EXPERTS, "num_experts": 4}
SHARED = {**FOUR, "shared_expert_intermediate_size": 24}
DENSE = {"num_local_experts": 0, "shared_intermediate_size": 48, "layer_types": 2 * ["attention"]}
LATENT = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 8, "head_dim": 8},
    **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "num_key_value_heads": 4},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
}
SPARSE = {**LATENT, "index_n_heads": 2, "index_head_dim": 16}
LINEAR = {
    f"linear_{part}": 8 if "dim" in part else 2
    for part in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
}

# name: transformers' model_type, what its config has besides SMALL
FAMILIES = {
    "Llama": ("llama", GROUPED),
    "Mistral, window": ("mistral", {**HEADS, **WINDOW}),
    "Mixtral": ("mixtral", {**EXPERTS, "num_local_experts": 4, "sliding_window": None}),
    "Qwen2": ("qwen2", GROUPED),
    "Qwen2, full and window": ("qwen2", {**GROUPED, **USED_WINDOW}),
    "Qwen2-MoE": ("qwen2_moe", SHARED),
    "Qwen2-MoE, full and window": ("qwen2_moe", {**SHARED, **USED_WINDOW}),
    "Qwen3": ("qwen3", HEADS),
    "Qwen3-MoE": ("qwen3_moe", {**FOUR, "head_dim": 8}),
    "Gemma": ("gemma", HEADS),
    "Gemma 2": ("gemma2", {**HEADS, **FULL_AND_WINDOW}),
    "Gemma 3": ("gemma3_text", {**HEADS, **FULL_AND_WINDOW}),
    "Phi": ("phi", {"partial_rotary_factor": 0.5}),
    "Phi-3, window": ("phi3", {**GROUPED, **WINDOW}),
    "Phi-3, longrope": (
        "phi3",
        {**GROUPED, "rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
    ),
    "PhiMoE, window": ("phimoe", {**EXPERTS, **WINDOW, "num_local_experts": 4}),
    "GPT-2": ("gpt2", {}),
    "GPT-NeoX": ("gpt_neox", {}),
    "GPT-J": ("gptj", {"rotary_dim": 4}),
    "GPT-OSS": ("gpt_oss", {**EXPERTS, **FULL_AND_WINDOW, "head_dim": 8, "num_local_experts": 4}),
    "OPT": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "Falcon": ("falcon", {}),
    "Bloom": ("bloom", {}),
    "MPT": ("mpt", {"max_seq_len": 64}),
    "StableLM": ("stablelm", GROUPED),
    "Nemotron": ("nemotron", HEADS),
    "OLMo": ("olmo", GROUPED),
    "OLMo 2": ("olmo2", GROUPED),
    "Cohere": ("cohere", GROUPED),
    "Cohere 2": ("cohere2", {**HEADS, **FULL_AND_WINDOW}),
    "Starcoder 2": ("starcoder2", {**GROUPED, **WINDOW}),
    "Granite": ("granite", GROUPED),
    "Granite-MoE": ("granitemoe", {**EXPERTS, "num_local_experts": 4}),
    "Granite 4, dense": ("granitemoehybrid", {**GROUPED, **SSD, **DENSE}),
    "SmolLM3": ("smollm3", GROUPED),
    "GLM-4": ("glm4", HEADS),
    "Helium": ("helium", HEADS),
    "DeepSeek-V3": ("deepseek_v3", LATENT),
    "Llama 4, chunks": (
        "llama4_text",
        {**HEADS, "num_local_experts": 4, "attention_chunk_size": 7, "intermediate_size_mlp": 48},
    ),
    "Mamba": ("mamba", {"state_size": 8}),
    "Jamba": (
        "jamba",
        {**GROUPED, **MAMBA, "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    ),
    "Falcon-H1": ("falcon_h1", {**HEADS, **SSD, "mamba_d_ssm": 64}),
    "LFM2": ("lfm2", {**GROUPED, "layer_types": ["conv", "full_attention"]}),
}
# more kinds of cache, for sampling: local layers that no layer_types names, padding on the left
# that is not masked, no cache, recurrent layers, keys shared by layers, a state that outlives
# its sequence, sparse attention
CACHES = {
    "GPT-Neo, local": (
        "gpt_neo",
        {"attention_types": [[["global", "local"], 1]], "window_size": 7, "num_layers": 2},
    ),
    "RWKV": ("rwkv", {"attention_hidden_size": 32, "context_length": 64}),
    "RoFormer": ("roformer", {"is_decoder": True, "embedding_size": 32}),
    "OpenAI GPT": ("openai-gpt", {"n_positions": 64}),
    "Qwen3-Next": (
        "qwen3_next",
        {
            **{**HEADS, **SHARED, **LINEAR, "linear_num_value_heads": 4},
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "Gemma 3n, shared": (
        "gemma3n_text",
        {
            **{**HEADS, **WINDOW, "num_hidden_layers": 4, "num_kv_shared_layers": 2},
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 88},
            **{"laurel_rank": 4, "altup_num_inputs": 2, "pad_token_id": 0},
        },
    ),
    "RecurrentGemma": (
        "recurrent_gemma",
        {**HEADS, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 7},
    ),
    "DeepSeek-V3.2, all keys": ("deepseek_v32", {**SPARSE, "index_topk": 64}),
    "DeepSeek-V3.2": ("deepseek_v32", {**SPARSE, "index_topk": 7}),
    "Doge": ("doge", {**GROUPED, "keep_window_size": 4}),
}


# multimodal checkpoints: name: model_type, its text_config besides SMALL and HEADS, its towers
EYES = {"num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4, "image_size": 16}
SIGHT = {**EYES, "hidden_size": 32, "intermediate_size": 48}
PATCHES = {"depth": 1, "num_heads": 2, "spatial_merge_size": 2, "num_position_embeddings": 16}
HEARS = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
MULTIMODAL = {
    "Qwen3.5": (
        "qwen3_5",
        {**LINEAR, "layer_types": ["linear_attention", "full_attention"]},
        {"vision_config": {**SIGHT, **PATCHES, "out_hidden_size": 32}},
    ),
    "Gemma 3": (
        "gemma3",
        WINDOW,
        {"vision_config": SIGHT, "mm_tokens_per_image": 4, "image_token_index": 80},
    ),
    "Gemma 4, with audio": (
        "gemma4",
        {**FULL_AND_WINDOW, "global_head_dim": 8, "pad_token_id": 0},
        {"vision_config": SIGHT, "audio_config": {**HEARS, "output_proj_dims": 32}},
    ),
}


def quick_and_long(*quick, of=FAMILIES):
    """All families for pytest, those that are not quick marked as long."""
    return [pytest.param(x, marks=() if x in quick else pytest.mark.long) for x in of]


def random_model(auto_class, model_type: str, **settings):
    """In eval mode. Its weights are large, so that what it says depends on all that it reads."""
    torch.manual_seed(0)
    model = auto_class.from_config(AutoConfig.for_model(model_type, **settings)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.3)
    return model


def tiny(name: str, **knobs):
    """A random model of a family."""
    model_type, own = (FAMILIES | CACHES)[name]
    return random_model(AutoModelForCausalLM, model_type, **{**SMALL, **own, **knobs})


def tiny_multimodal(name: str):
    """A random multimodal model: its text model and its towers."""
    model_type, text, towers = MULTIMODAL[name]
    text = {**SMALL, **HEADS, **text}
    return random_model(AutoModelForImageTextToText, model_type, text_config=text, **towers)


def save(model, folder: Path) -> Path:
    """A model's folder, with the demo's tokenizer."""
    other = shutil.ignore_patterns("*.safetensors", "config.json", "generation_config.json")
    shutil.copytree(THETA0, folder, ignore=other)
    model.save_pretrained(folder)
    return folder


def alone(model, sequences) -> torch.Tensor:
    """The oracle: each of N sequences (ids, mask) by itself, log-softmax of all its logits, those
    of the response picked by hand. (N,) in float64."""
    result = []
    for ids, mask in sequences:
        logps = model(torch.as_tensor(ids)[None].long()).logits[0].double().log_softmax(-1)
        result.append(sum(logps[t - 1, ids[t]] for t in range(len(ids)) if mask[t]))
    return torch.stack(result)


def gradient(values, model) -> torch.Tensor:
    """The gradient of a sum in which each value has a weight of its own, flat."""
    weights = torch.arange(1.0, len(values) + 1)
    wanted = [w for w in model.parameters() if w.requires_grad]
    gradients = torch.autograd.grad((weights * values).sum(), wanted, allow_unused=True)
    return torch.cat([g.flatten() for g in gradients if g is not None])


def random_sequences(lengths=(30, 9, 4, 21)) -> list[tuple]:
    """(ids, mask) of sequences of random tokens, each a prompt of three tokens and its response."""
    rng = random.Random(0)
    return [([rng.randrange(3, 88) for _ in range(n)], [0] * 3 + [1] * (n - 3)) for n in lengths]


def random_pairs(lengths, seed=1) -> list[dict]:
    """Pairs of random tokens, as encode_pairs gives them, each prompt to be computed once.
    lengths: tokens of (prompt, real answer, generated answer) of each."""
    rng = np.random.default_rng(seed)
    pairs = []
    for i, (p, *answers) in enumerate(lengths):
        pairs.append(pair_of(i, rng.integers(3, 88, p), answers, rng, 88))
    share_prompts(pairs)
    return pairs
