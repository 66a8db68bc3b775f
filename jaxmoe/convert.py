"""`python -m jaxmoe.convert SRC DST`: a checkpoint to the native format, which every mesh reads fast, or from it."""

import argparse
import functools
import shutil
import sys
import time
from pathlib import Path

from jaxmoe.cli import StartProgress
from jaxmoe.demo import find_model
from jaxmoe.errors import CheckpointError, ConfigError, JaxmoeError

EXAMPLES = """\
examples:
  python -m jaxmoe.convert Mixtral-8x7B mixtral-native          once; then --model mixtral-native, on any mesh
  python -m jaxmoe.convert DeepSeek-V3 v3-native --mesh ep=16   over 16 devices, none of which holds it all; fp8
                                                                weights are written in bfloat16
  python -m jaxmoe.convert mixtral-native mixtral-hf --to hf    back, for transformers and others

DST appears when it is whole: an interrupted conversion leaves SRC and an older DST as they were.
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jaxmoe.convert",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", help="folder in either format, or demo:mixtral, demo:deepseek-v3, ...")
    parser.add_argument("target", metavar="DST", type=Path, help="folder to make")
    parser.add_argument(
        "--to",
        choices=("orbax", "hf"),
        default="orbax",
        help="orbax: native, read in parallel by every mesh; hf: safetensors in Hugging Face's names (default: orbax)",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: as they are stored)"
    )
    parser.add_argument(
        "--mesh",
        default="dp=1,ep=1",
        help="devices that hold the weights on the way, dp=D,ep=E[,tp=T]; does not show in DST (default: %(default)s)",
    )
    parser.add_argument(
        "--max-file-size", type=float, default=5.0, metavar="GB", help="with --to hf, of a file (default: %(default)s)"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace DST if it is a checkpoint, once the new one is whole"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 2 after an error that the user can mend, 130 if interrupted."""
    options = parse(argv)
    try:
        print(convert(options), file=sys.stderr)
    except JaxmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; {options.target} is as it was", file=sys.stderr)
        return 130
    return 0


def convert(options: argparse.Namespace) -> str:
    """Does what the options say and returns what was done, in words. Raises JaxmoeError."""
    # Only now is jax loaded.
    import jax
    import numpy as np

    from jaxmoe.checkpoints.folders import copy_companions, new_folder, write_config
    from jaxmoe.checkpoints.loader import read_config
    from jaxmoe.checkpoints.native import save_native
    from jaxmoe.checkpoints.writer import save_hf
    from jaxmoe.engine.model import Model

    source, target = find_model(options.source), options.target
    if not options.max_file_size > 0:
        raise ConfigError(f"--max-file-size {options.max_file_size} must be more than 0")
    if target.resolve() in (source.resolve(), *source.resolve().parents):
        raise ConfigError(f"{target} is or holds {source}; choose another folder")
    began, progress = time.monotonic(), StartProgress()
    with new_folder(target, options.force) as folder:
        dtype = options.dtype or _stored_dtype(source)
        model = Model(source, options.mesh, dtype, progress=progress)
        loaded = time.monotonic()
        _check_space(folder, sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)))
        write_config(folder, read_config(source), dtype, model.config.mtp_layers)
        copy_companions(source, folder)
        family, report = type(model.abstract), functools.partial(progress, "writing weights")
        weights, slots = (folder, family.keys, model.config, model.params), np.asarray(model.placement.slot_expert)
        if options.to == "hf":
            written = save_hf(
                *weights,
                jax.numpy.dtype(dtype),
                wide=family.wide(),
                slot_expert=slots,
                max_file_bytes=int(options.max_file_size * 1e9),
                progress=report,
            )
        else:
            written = save_native(*weights, slots, dtype, report)
    seconds, megabytes = time.monotonic() - began, written / 1e6
    return (
        f"{target}: {megabytes:,.1f} MB of {dtype} weights in {seconds:.1f} s, {megabytes / seconds:,.0f} MB/s "
        f"(reading them took {loaded - began:.1f} s)\n"
        f"serve them: python -m jaxmoe.serve --model {target} --dtype {dtype}"
    )


def _stored_dtype(source: Path) -> str:
    """What loses nothing of the weights: float32, bfloat16 or float16. Raises CheckpointError.

    Of Hugging Face's format that of the embedding, which nobody quantises or keeps wider than the rest.
    """
    from jaxmoe.checkpoints.loader import read_config
    from jaxmoe.checkpoints.native import is_native, read_manifest
    from jaxmoe.checkpoints.safetensors import DTYPES, SafetensorsCheckpoint
    from jaxmoe.models.registry import family_of

    if is_native(source):
        return str(read_manifest(source)["dtype"])
    family = family_of(read_config(source))
    tensors, name = SafetensorsCheckpoint(source).tensors, family.keys["embed"].tensors[0]
    found = tensors.get(name) or tensors.get(family.prefix + name)
    stored = DTYPES.get(found.dtype) if found else None
    return stored.name if stored is not None and stored.name in ("bfloat16", "float16") else "float32"


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, of {needed / 1e9:.1f} that are needed; "
            "choose a DST on another disk"
        )


if __name__ == "__main__":
    raise SystemExit(main())
