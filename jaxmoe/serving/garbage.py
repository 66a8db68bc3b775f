"""Python's garbage collector, which stops a process for as long as it looks at all that lives there."""

import gc


def pass_over_what_is_here() -> None:
    """Collects once, and has the collector leave alone for good what is left.

    To be called when a process is ready: a full collection would take 0.1 s and more in the engine's (240,000 objects
    of JAX and the model, most of them), in the middle of some step.
    """
    gc.collect()
    gc.freeze()
