"""A Hugging Face checkpoint of the bench models as a GGUF file for llama.cpp: same weights, llama.cpp's names.

What differs beyond names: experts are one tensor a layer; Mixtral's queries and keys are permuted, because llama.cpp
rotates neighbouring pairs; DeepSeek's key-value up-projection is split, and the key's half transposed. There is no
tokenizer: prompts are token ids.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ARCHITECTURES = {
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "deepseek_v3": gguf.MODEL_ARCH.DEEPSEEK2,
    "llama4_text": gguf.MODEL_ARCH.LLAMA4,
}


def convert(folder: Path) -> Path:
    """The GGUF file of `folder`, in it, made if it is not there."""
    path = folder / "model.gguf"
    if path.exists():
        return path
    config = json.loads((folder / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    fresh = path.with_suffix(".new")
    writer = gguf.GGUFWriter(fresh, gguf.MODEL_ARCH_NAMES[architecture])
    write_config(writer, config)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    for name, array in merged(config, read_safetensors(folder / "model.safetensors")):
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert known is not None, f"llama.cpp has no name for {name}"
        # As its own converter: vectors and routers stay float32.
        if array.ndim > 1 and "ffn_gate_inp" not in known and config["dtype"] == "bfloat16":
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(known, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(known, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fresh.rename(path)
    return path


def write_config(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if config["model_type"] == "deepseek_v3":
        latent, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
        # Absorbed: to the cache it is attention with a single key-value head.
        writer.add_head_count_kv(1)
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_leading_dense_block_count(config["first_k_dense_replace"])
        writer.add_q_lora_rank(config["q_lora_rank"])
        writer.add_kv_lora_rank(latent)
        writer.add_key_length(latent + rope)
        writer.add_value_length(latent)
        writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
        writer.add_value_length_mla(config["v_head_dim"])
        writer.add_rope_dimension_count(rope)
        writer.add_expert_count(config["n_routed_experts"])
        writer.add_expert_shared_count(config["n_shared_experts"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_weights_norm(config["norm_topk_prob"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])
        return
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_expert_count(config["num_local_experts"])
    if config["model_type"] == "llama4_text":
        writer.add_feed_forward_length(config["intermediate_size_mlp"])
        writer.add_expert_feed_forward_length(config["intermediate_size"])
        writer.add_interleave_moe_layer_step(config["interleave_moe_layer_step"])
    else:
        writer.add_feed_forward_length(config["intermediate_size"])


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """By name, float32; float32 is mapped from the file."""
    data = np.memmap(path, np.uint8, "r")
    start = 8 + int(data[:8].view(np.uint64)[0])
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        raw = data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
        if entry["dtype"] == "BF16":
            raw = raw.view(np.uint16).astype(np.uint32) << 16
        tensors[name] = raw.view(np.float32).reshape(entry["shape"])
    return tensors


def merged(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Names and arrays as llama.cpp counts tensors; the names are those that its name map knows."""
    experts: dict[str, list[np.ndarray]] = {}
    for name, array in tensors.items():
        if one := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name):
            # Experts of a layer are in order.
            experts.setdefault(f"{one[1]}.{one[3]}.weight", []).append(array)
        elif config["model_type"] == "mixtral" and re.search(r"self_attn\.[qk]_proj", name):
            yield name, neighbours(array, config["head_dim"])
        elif name.endswith("kv_b_proj.weight"):
            heads = array.reshape(config["num_attention_heads"], -1, config["kv_lora_rank"])
            key, value = np.split(heads, [config["qk_nope_head_dim"]], axis=1)
            yield name.replace("kv_b", "k_b"), key.swapaxes(1, 2)
            yield name.replace("kv_b", "v_b"), value
        elif name.endswith("experts.gate_up_proj"):
            gate, up = np.split(array.swapaxes(1, 2), 2, axis=1)
            yield name.replace("gate_up_proj", "gate_proj.weight"), gate
            yield name.replace("gate_up_proj", "up_proj.weight"), up
        elif name.endswith("experts.down_proj"):
            yield name + ".weight", array.swapaxes(1, 2)
        else:
            # llama.cpp's map knows the router's correction as a bias.
            yield name.replace("e_score_correction_bias", "e_score_correction.bias"), array
    for name, arrays in experts.items():
        yield name, np.stack(arrays)


def neighbours(array: np.ndarray, head_dim: int) -> np.ndarray:
    """From rotating dimension i with i + head_dim / 2 to rotating 2 i with 2 i + 1: rows 0 2 1 3 for a head of four."""
    heads = array.reshape(-1, 2, head_dim // 2, array.shape[-1])
    return heads.swapaxes(1, 2).reshape(array.shape)
