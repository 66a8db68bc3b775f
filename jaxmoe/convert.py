"""`python -m jaxmoe.convert SRC DST`: a checkpoint into the native format, or back into Hugging Face's.

The native format loads fastest, on any mesh: parameters lie as in memory, and every device reads its own shard. With
`--to hf` the result is an ordinary folder of safetensors that transformers loads, fp8 weights dequantised.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmoe.cli import StartProgress
from jaxmoe.demo import find_model
from jaxmoe.errors import JaxmoeError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jaxmoe.convert", description=__doc__)
    parser.add_argument("source", metavar="SRC", help="checkpoint folder of either format, or demo:NAME")
    parser.add_argument("target", metavar="DST", type=Path, help="folder to make")
    parser.add_argument("--to", default="orbax", choices=("orbax", "hf"), help="format to write (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: as the config says)"
    )
    parser.add_argument(
        "--mesh", default="dp=1,ep=1", help="devices that hold the model meanwhile (default: %(default)s)"
    )
    parser.add_argument(
        "--max-file-size", type=float, default=5.0, metavar="GB", help="of safetensors files (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="replace DST if it exists, once the new one is whole")
    args = parser.parse_args(argv)
    try:
        print(convert(args), file=sys.stderr)
    except JaxmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def convert(args: argparse.Namespace) -> str:
    """Does what the arguments say; returns what was done, in words."""
    import jax
    import numpy as np

    from jaxmoe.checkpoints.loader import read_config
    from jaxmoe.checkpoints.native import BESIDE, finished_folder, save_native
    from jaxmoe.checkpoints.writer import save_hf
    from jaxmoe.engine.model import DTYPES, Model
    from jaxmoe.models.llama4 import text_config
    from jaxmoe.models.registry import family_of

    source, target = find_model(args.source), args.target.absolute()
    hf = read_config(source)
    dtype = args.dtype or _dtype_of(text_config(hf)) or _dtype_of(hf) or "float32"
    progress = StartProgress()
    began = time.monotonic()
    with finished_folder(target, args.force) as out:
        model = Model(source, args.mesh, dtype, progress=progress)
        family = family_of(hf)
        slot_expert = np.asarray(model.placement.slot_expert)
        for name in BESIDE:
            if (source / name).exists():
                shutil.copyfile(source / name, out / name)
        described = {key: value for key, value in hf.items() if key != "quantization_config"}
        if "num_nextn_predict_layers" in hf:
            described["num_nextn_predict_layers"] = model.config.mtp_layers
        if args.to == "orbax":
            size = save_native(out, described, family.keys, model.config, model.params, slot_expert, model.mesh)
        else:
            size = save_hf(
                out,
                family.keys,
                model.config,
                model.params,
                jax.numpy.dtype(DTYPES[dtype]),
                wide=family.wide(),
                slot_expert=slot_expert,
                max_file_bytes=int(args.max_file_size * 1e9),
                progress=lambda done, total: progress("writing weights", done, total),
            )
            _write_config(out, described, dtype, model.config)
    seconds = time.monotonic() - began
    return (
        f"wrote {size / 1e6:,.1f} MB of {dtype} weights in {seconds:.1f} s ({size / 1e6 / seconds:,.0f} MB/s); "
        f"serve them with: python -m jaxmoe.serve --model {args.target}"
    )


def _dtype_of(hf: Mapping[str, Any]) -> str | None:
    name = hf.get("torch_dtype") or hf.get("dtype")
    return name if name in ("float32", "bfloat16", "float16") else None


def _write_config(out: Path, hf: Mapping[str, Any], dtype: str, config: Any) -> None:
    """That of the text model alone, with the dtype that was written."""
    text = dict(hf.get("text_config") or hf)
    if "text_config" in hf:
        text |= {"model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"]}
        text["tie_word_embeddings"] = config.tie_embeddings
    text.pop("dtype", None)
    text["torch_dtype"] = dtype
    (out / "config.json").write_text(json.dumps(text, indent=2) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
