"""Tiny checkpoints of every family, and what transformers makes of them: eager attention and experts, float32."""

import dataclasses
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers

COMMON = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
BASES = {
    "mixtral": {
        **COMMON, "num_hidden_layers": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
    },
    "deepseek_v3": {
        **COMMON, "num_hidden_layers": 3, "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 8,
        "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "q_lora_rank": 20,
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
        "num_nextn_predict_layers": 0,
    },
    "llama4": {
        **COMMON, "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size_mlp": 48,
        "num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "attention_chunk_size": 8,
        "floor_scale": 4,
    },
}  # fmt: skip
# As wide as the wrapper allows to be small: nothing of it is read.
VISION = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 28,
    "patch_size": 14, "vision_output_dim": 8, "projector_input_dim": 8, "projector_output_dim": 8,
}  # fmt: skip
CLASSES = {
    "mixtral": (transformers.MixtralForCausalLM, transformers.MixtralConfig),
    "deepseek_v3": (transformers.DeepseekV3ForCausalLM, transformers.DeepseekV3Config),
    "llama4": (transformers.Llama4ForCausalLM, transformers.Llama4TextConfig),
}
UNQUANTISED = ("embed_tokens", "norm", "lm_head", "mlp.gate.", "eh_proj", "shared_head", ".bias")


@dataclasses.dataclass(frozen=True)
class Reference:
    """A checkpoint on disk and what transformers makes of it."""

    folder: Path
    model: Any
    tokens: np.ndarray  # [B, T]
    logits: np.ndarray  # [B, T, V]

    def logits_of(self, tokens: np.ndarray) -> np.ndarray:
        return logits_of(self.model, tokens)

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The `count` most likely tokens after the prompt, each computed anew from all before it."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits_of(np.array([tokens]))[0, -1].argmax()))
        return tokens[len(prompt) :]


def write_reference(
    folder: Path,
    family: str,
    *,
    edit: Mapping[str, Any],
    remove: Sequence[str],
    unread: Mapping[str, Any],
    add: Mapping[str, Sequence[int]],
    shard: str,
    dtype: str,
    fused: bool,
    multimodal: bool,
    fp8: tuple[int, int] | None,
    correction: float,
    overrides: Mapping[str, Any],
) -> Reference:
    """Writes a checkpoint of random weights into `folder`; the keywords are those of `reference_checkpoint`."""
    model_class, config_class = CLASSES[family]
    config = config_class(**{**BASES[family], **overrides})
    if multimodal:
        model_class = transformers.Llama4ForConditionalGeneration
        tied = config.tie_word_embeddings
        config = transformers.Llama4Config(
            text_config=config.to_dict(), vision_config=VISION, tie_word_embeddings=tied, image_token_index=127
        )
    model = model_class(config).eval()
    randomise(model, correction)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=shard, save_original_format=not fused)
    edit_config(folder, edit, remove)
    quantised = {}
    if fp8:
        quantised = quantise(read_tensors(folder), fp8)
        write_tensors(folder, dequantise(quantised, fp8))
    loaded = model_class.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    if multimodal:
        loaded = loaded.language_model
    tokens = tokens_with_margin(loaded, config.get_text_config().vocab_size)
    edit_config(folder, unread, ())
    if fp8:
        edit_config(folder, {"quantization_config": quantization_config(fp8)}, ())
        write_tensors(folder, quantised)
    if add:
        write_tensors(folder, {**read_tensors(folder), **{name: torch.randn(*shape) for name, shape in add.items()}})
    return Reference(folder, loaded, tokens, logits_of(loaded, tokens))


def write_further_layer(folder: Path, reference: Reference, like: Reference, copies: bool) -> Reference:
    """A checkpoint of DeepSeek-V3 as another with a layer that predicts a token more: the main model is the same.

    like: has a mixture as its first layer, as this one's is whatever those of the main model are. copies: the files
    hold its embedding and head a second time.
    """
    config = reference.model.config
    layers, width = config.num_hidden_layers, config.hidden_size
    tensors = read_tensors(reference.folder)
    shapes = {
        name.replace("layers.0.", f"layers.{layers}."): tuple(tensor.shape)
        for name, tensor in read_tensors(like.folder).items()
        if "layers.0." in name
    }
    shapes |= {f"model.layers.{layers}.{name}.weight": (width,) for name in ("enorm", "hnorm", "shared_head.norm")}
    shapes[f"model.layers.{layers}.eh_proj.weight"] = (width, 2 * width)
    tensors |= {name: random_tensor(name, shape) for name, shape in shapes.items()}
    if copies:
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        tensors[f"model.layers.{layers}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"model.layers.{layers}.shared_head.head.weight"] = tensors[head].clone()
    (folder / "config.json").write_text((reference.folder / "config.json").read_text())
    write_tensors(folder, tensors)
    return dataclasses.replace(reference, folder=folder)


def random_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if name.endswith("bias"):
        return 0.2 * values
    return 1 + 0.2 * values if len(shape) == 1 else values * 1.4 / shape[-1] ** 0.5


def randomise(model: torch.nn.Module, correction: float = 0.0) -> None:
    """Weights large enough that routing and attention are not flat; each tensor seeded by its name.

    correction: what is added to the biases by which DeepSeek-V3 chooses experts.
    """
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    for name, parameter in [*model.named_parameters(), *buffers]:
        # Alone or in a multimodal model, the same weights.
        seed = zlib.crc32(name.removeprefix("model.").removeprefix("language_model.").removeprefix("model.").encode())
        values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        if name.endswith("e_score_correction_bias"):
            values = correction + 0.2 * values
        elif name.endswith(".bias"):
            values *= 0.3
        elif parameter.ndim == 1:
            values = 1 + 0.2 * values
        elif "embed_tokens" not in name:
            inputs_first = parameter.ndim == 3 and ".feed_forward.experts." in name
            values *= 1.4 / math.sqrt(parameter.shape[1 if inputs_first else -1])
        parameter.data.copy_(values)


def logits_of(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """[B, T, V]"""
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens)), use_cache=False).logits.float().numpy()


def tokens_with_margin(model: torch.nn.Module, vocab: int, shape: tuple[int, int] = (2, 24)) -> np.ndarray:
    """The first random tokens [B, T] that go to the same experts although what the routers see is disturbed.

    The order of a sum in float32 disturbs by a few 1e-6; what sits on a tie tells nothing about the sum.
    """
    routers = [module for name, module in model.named_modules() if name.endswith((".gate", ".router"))]
    noise = torch.Generator()

    def disturb(module: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (args[0] * (1 + 1e-4 * torch.randn(args[0].shape, generator=noise)),)

    for seed in range(100):
        # The last token of the vocabulary stands for an image in multimodal models.
        tokens = np.random.default_rng(seed).integers(0, vocab - 1, shape)
        calm = logits_of(model, tokens)
        worst = 0.0
        for draw in range(2):
            noise.manual_seed(draw)
            hooks = [router.register_forward_pre_hook(disturb) for router in routers]
            worst = max(worst, np.abs(logits_of(model, tokens) - calm).max())
            for hook in hooks:
                hook.remove()
        if worst < 0.05:
            return tokens
    raise AssertionError("no tokens were found whose routing has a margin")


def edit_config(folder: Path, edit: Mapping[str, Any], remove: Sequence[str]) -> None:
    """Changes config.json, or its text_config where it has one."""
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    text.update(edit)
    for name in remove:
        text.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config))


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by name."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in safetensors.torch.load_file(file).items()
    }


def write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], files: int = 2) -> None:
    """Replaces what the checkpoint holds, dealing tensors to files in turn: a weight and its scale lie apart."""
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    names = [f"model-{number:05d}-of-{files:06d}.safetensors" for number in range(1, files + 1)]
    place = {tensor: names[number % files] for number, tensor in enumerate(tensors)}
    for file in names:
        mine = {name: tensors[name].contiguous() for name, at in place.items() if at == file}
        safetensors.torch.save_file(mine, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))


def quantization_config(block: tuple[int, int]) -> dict[str, Any]:
    """As DeepSeek-V3's config.json has it."""
    return {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": list(block)}


def quantise(tensors: Mapping[str, torch.Tensor], block: tuple[int, int]) -> dict[str, torch.Tensor]:
    """All linear weights that DeepSeek-V3's hub files hold in fp8, each followed by its scales, one a block."""
    out = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or any(part in name for part in UNQUANTISED):
            out[name] = tensor
            continue
        rows, columns = (-(-size // step) for size, step in zip(tensor.shape, block, strict=True))
        # Blocks of very different size, as no checkpoint has them, so that no block can pass for another.
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        scale = 2.0 ** torch.randint(-9, -5, (rows, columns), generator=generator) * 1.1
        out[name] = (tensor.float() / repeated(scale, block, tensor.shape)).clamp(-448, 448).to(torch.float8_e4m3fn)
        out[f"{name}_scale_inv"] = scale
    return out


def dequantise(tensors: Mapping[str, torch.Tensor], block: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The float32 weights that such tensors stand for."""
    return {
        name: tensor.float() * repeated(tensors[f"{name}_scale_inv"], block, tensor.shape)
        if tensor.dtype == torch.float8_e4m3fn
        else tensor
        for name, tensor in tensors.items()
        if not name.endswith("_scale_inv")
    }


def repeated(scale: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """Scales of blocks [rows, columns] -> of elements; the last blocks may be partial."""
    return scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]
