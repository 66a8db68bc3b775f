"""transformers' worker: a loop over `forward` with a cache for equal requests, its continuous batching for mixed ones;
where that does not know the model, a padded batch.

Each phase is tried with every experts implementation that the model admits, and keeps the fastest.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import protocol
import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, DynamicCache, GenerationConfig

# The last gathers a copy of the weights for each token: no memory is enough for that in the prefills of a batch.
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
FEW_TOKENS = ("decode 1",)
# A block holds the pages of a whole sequence's layers; as many tokens in a step as prompts of a usual server's chunk.
BATCHING = ContinuousBatchingConfig(
    num_blocks=256, max_batch_tokens=2048, max_requests_per_batch=protocol.SERVED, allow_block_sharing=False
)


class Transformers:
    def __init__(self, folder: Path, dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.fastest: dict[str, str] = {}
        self.manager = None

    def steps(self, prompts: protocol.Prompts, lengths: Sequence[int]) -> Iterator[protocol.Step]:
        alike = len({len(prompt) for prompt in prompts}) == len(set(lengths)) == 1
        # Its continuous batching knows neither latent attention nor chunked layers.
        continuous = not alike and self.model.config.model_type not in ("deepseek_v3", "llama4_text")
        return (self._continuous if continuous else self._static)(prompts, lengths)

    def _static(self, prompts: protocol.Prompts, lengths: Sequence[int]) -> Iterator[protocol.Step]:
        """One batch for as long as the longest goes on, padded on the left where prompts differ in length."""
        longest, cache = max(map(len, prompts)), DynamicCache(config=self.model.config)
        padding = [longest - len(prompt) for prompt in prompts]
        tokens = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)])
        options = {}
        for done in range(max(lengths)):
            if any(padding):
                at = torch.arange(longest + done)
                mask = at >= torch.tensor(padding)[:, None]
                positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
                options = {"attention_mask": mask.long(), "position_ids": positions}
            out = self.model(tokens, cache=cache, use_cache=True, logits_to_keep=1, **options)
            tokens = out.logits[:, -1:].argmax(-1)
            yield [(row, token) for row, token in enumerate(tokens[:, 0].tolist()) if done < lengths[row]]

    def _continuous(self, prompts: protocol.Prompts, lengths: Sequence[int]) -> Iterator[protocol.Step]:
        if self.manager is None:
            generation = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=protocol.MAX_SEQUENCE)
            self.manager = self.model.init_continuous_batching(generation, BATCHING)
            self.manager.start()
        rows = {}
        for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            rows[self.manager.add_request(list(prompt), max_new_tokens=length)] = row
        while rows:
            result = self.manager.get_result(timeout=60)
            if result is None or result.error:
                raise RuntimeError(f"continuous batching: {result and result.error}")
            if result.is_finished():
                row = rows.pop(result.request_id)
                yield [(row, token) for token in result.generated_tokens]

    def prepare(self, phase: str) -> None:
        if not self.model._can_set_experts_implementation():
            self.fastest[phase] = "its only experts"
            return
        if phase not in self.fastest:
            rates = {}
            for name in IMPLEMENTATIONS if phase in FEW_TOKENS else IMPLEMENTATIONS[:2]:
                self.model.set_experts_implementation(name)
                protocol.greedy(self, protocol.prompt_of(512, seed=0), 2)
                rates[name] = protocol.measure(self, phase, seed=1)
            self.fastest[phase] = max(rates, key=lambda name: rates[name])
        self.model.set_experts_implementation(self.fastest[phase])

    def logits(self, prompt: Sequence[int]) -> list[float]:
        return self.model(torch.tensor([prompt]), logits_to_keep=1).logits[0, -1].float().tolist()

    def describe(self) -> str:
        chosen = ", ".join(f"{phase} {name}" for phase, name in self.fastest.items())
        return f"transformers {transformers.__version__}, torch {torch.__version__}; experts: {chosen}"


if __name__ == "__main__":
    protocol.serve(Transformers)
