"""A whole server round a fake engine, for tests of its life.

`python fake_server.py TOKENIZER_DIRECTORY PACE DRAIN_TIMEOUT PORT MAX_RUNNING`.

Prints its address, waits for a line to build the engine, and prints "ready". A prompt token of 13 crashes the engine.
"""

import logging
import sys

from fake_engine import FakeEngine, model_info

from jaxmoe.errors import CheckpointError
from jaxmoe.serving.server import Served, ServerConfig, run


class Crashing(FakeEngine):
    def submit(self, request):
        super().submit(request)
        self.crash = 13 in request.prompt


def build_engine(report):
    report("compiling 1 of 2")
    print("building", flush=True)
    if sys.stdin.readline().strip() == "fail":
        raise CheckpointError("the checkpoint is not there")
    info = model_info(sys.argv[1], max_running=int(sys.argv[5]))
    return Served(Crashing(info, pace=float(sys.argv[2])), info)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)

    def say(text):
        print(text, flush=True)

    try:
        code = run(
            build_engine,
            ServerConfig(port=int(sys.argv[4]), drain_timeout=float(sys.argv[3])),
            on_bound=lambda bound: say(bound.address),
            on_ready=lambda address: say("ready"),
        )
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)
