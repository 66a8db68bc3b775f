"""vLLM's worker: its engine in process, stepped by hand, with its own settings but for prefix caching."""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import protocol
import vllm
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind


class Vllm:
    def __init__(self, folder: Path, dtype: str, threads: int) -> None:
        latent = "kv_lora_rank" in json.loads((folder / "config.json").read_text())
        self.llm = LLM(
            str(folder),
            dtype=dtype,
            skip_tokenizer_init=True,
            max_model_len=protocol.MAX_CONTEXT,
            max_num_seqs=protocol.SERVED,
            enable_prefix_caching=False,
            max_logprobs=-1,
            # Its kernel for rotation errs where queries and keys are slices of other arrays, as they are here.
            compilation_config={"custom_ops": ["-rotary_embedding"]} if latent else {},
            seed=0,
            disable_log_stats=True,
        )
        self.names = itertools.count()

    def steps(self, prompts: protocol.Prompts, lengths: Sequence[int]) -> Iterator[protocol.Step]:
        engine, rows = self.llm.llm_engine, {}
        for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            name = str(next(self.names))
            rows[name] = row
            params = SamplingParams(
                temperature=0, max_tokens=length, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
            )
            engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            if step := [(rows[out.request_id], token) for out in outputs for token in out.outputs[0].token_ids]:
                yield step

    def prepare(self, phase: str) -> None:
        pass

    def logits(self, prompt: Sequence[int]) -> list[float]:
        """Log-probabilities: logits up to a constant."""
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False, logprobs=-1)
        (request,) = self.llm.generate([{"prompt_token_ids": list(prompt)}], params, use_tqdm=False)
        found = request.outputs[0].logprobs[0]
        return [found[token].logprob for token in range(protocol.VOCABULARY)]

    def describe(self) -> str:
        scheduler = self.llm.llm_engine.vllm_config.scheduler_config
        return f"vllm {vllm.__version__}, {scheduler.max_num_batched_tokens} tokens a step at most"


if __name__ == "__main__":
    protocol.serve(Vllm)
