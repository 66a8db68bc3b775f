"""The bench models: one of each family with about 200 million parameters drawn at random, as Hugging Face checkpoints.

python bench_models.py MODEL DTYPE FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from protocol import MAX_CONTEXT, VOCABULARY

from jaxmoe.checkpoints.writer import save_hf
from jaxmoe.models.config import rules_for
from jaxmoe.models.random_weights import random_params
from jaxmoe.models.registry import family_of
from jaxmoe.sharding.mesh import MeshSpec, make_mesh

SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": MAX_CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {
        **SHARED,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_key_value_heads": 4,
        "head_dim": 64,
        "intermediate_size": 1792,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "deepseek": {
        **SHARED,
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_key_value_heads": 8,
        "q_lora_rank": 192,
        "kv_lora_rank": 128,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "first_k_dense_replace": 1,
        "intermediate_size": 2048,
        "moe_intermediate_size": 256,
        "n_routed_experts": 64,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
    },
    "llama4": {
        **SHARED,
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "num_key_value_heads": 4,
        "head_dim": 64,
        "intermediate_size": 1024,
        "intermediate_size_mlp": 2048,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 8192,
        "use_qk_norm": True,
    },
}


def write(name: str, dtype: str, folder: Path) -> None:
    """Weights are drawn in float32 and rounded, so that both dtypes are the same model."""
    hf = CONFIGS[name] | {"dtype": dtype}
    family, spec = family_of(hf), MeshSpec()
    config, mesh = family.read_config(hf), make_mesh(spec)
    slots = np.broadcast_to(np.arange(config.experts), (len(config.stacks["moe"]), config.experts))
    with jax.set_mesh(mesh):
        make = lambda: family(config, config.experts, jnp.dtype("float32"), nnx.Rngs(0), rules_for(config, spec))  # noqa: E731
        abstract = nnx.eval_shape(make)
    params = random_params(abstract, slots, mesh, jnp.dtype("float32"))
    folder.mkdir(parents=True)
    written = save_hf(folder, family.keys, config, params, jnp.dtype(dtype), wide=family.wide())
    # Last: its presence says that the checkpoint is whole.
    (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
    print(f"{folder}: {written / jnp.dtype(dtype).itemsize / 1e6:.0f} M parameters")


if __name__ == "__main__":
    write(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
