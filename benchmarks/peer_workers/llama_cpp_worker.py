"""llama.cpp's worker: its C interface, batched as its server does, what decodes and prompts up to N_BATCH in one step.

The KV cache is float16, as llama.cpp has it unless told otherwise; flash attention is left to its own choice.
"""

import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path

import gguf_file
import llama_cpp as cpp
import numpy as np
import protocol

N_BATCH, N_UBATCH = 2048, 512


class Context:
    """Sequences with a KV cache of their own, and the arrays of a batch."""

    def __init__(self, model: cpp.llama_model_p, sequences: int, length: int, threads: int) -> None:
        params = cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = sequences * length, sequences, False
        params.n_batch, params.n_ubatch, params.n_outputs_max = N_BATCH, N_UBATCH, sequences
        params.n_threads = params.n_threads_batch = threads
        self.pointer = cpp.llama_init_from_model(model, params)
        assert self.pointer is not None
        batch = self.batch = cpp.llama_batch_init(N_BATCH, 0, 1)
        self.tokens, self.positions, self.wanted, counts = (
            np.ctypeslib.as_array(field, (N_BATCH,)) for field in (batch.token, batch.pos, batch.logits, batch.n_seq_id)
        )
        counts[:] = 1
        # Every token points to the number of its sequence.
        self.numbers = np.arange(sequences, dtype=np.int32)
        self.sequence_pointers = np.ctypeslib.as_array(
            ctypes.cast(batch.seq_id, ctypes.POINTER(ctypes.c_size_t)), (N_BATCH,)
        )

    def clear(self) -> None:
        cpp.llama_memory_clear(cpp.llama_get_memory(self.pointer), True)
        self.batch.n_tokens = 0

    def add(self, tokens: Sequence[int], position: int, sequence: int, wanted: bool) -> int:
        """Puts tokens of a sequence into the batch, with logits of the last or of none; the last one's index."""
        start, end = self.batch.n_tokens, self.batch.n_tokens + len(tokens)
        self.tokens[start:end] = tokens
        self.positions[start:end] = np.arange(position, position + len(tokens))
        self.sequence_pointers[start:end] = self.numbers[sequence:].ctypes.data
        self.wanted[start:end] = 0
        self.wanted[end - 1] = wanted
        self.batch.n_tokens = end
        return end - 1

    def decode(self) -> None:
        code = cpp.llama_decode(self.pointer, self.batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        self.batch.n_tokens = 0

    def logits(self, index: int) -> np.ndarray:
        return np.ctypeslib.as_array(cpp.llama_get_logits_ith(self.pointer, index), (protocol.VOCABULARY,))


class LlamaCpp:
    def __init__(self, folder: Path, dtype: str, threads: int) -> None:
        self._silent = cpp.llama_log_callback(lambda level, text, data: None)
        cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        file = gguf_file.convert(folder)
        self.model = cpp.llama_model_load_from_file(str(file).encode(), cpp.llama_model_default_params())
        assert self.model is not None, f"llama.cpp could not load {file}"
        self.threads = threads
        self.contexts: dict[int, Context] = {}

    def _context(self, sequences: int) -> Context:
        """One for a single long sequence, one for many."""
        shape = (1, protocol.MAX_CONTEXT) if sequences == 1 else (protocol.SERVED, 1024)
        if shape[0] not in self.contexts:
            self.contexts[shape[0]] = Context(self.model, *shape, self.threads)
        return self.contexts[shape[0]]

    def steps(self, prompts: protocol.Prompts, lengths: Sequence[int]) -> Iterator[protocol.Step]:
        context = self._context(len(prompts))
        context.clear()
        done = [0] * len(prompts)  # tokens in the cache
        latest: dict[int, int] = {}  # the last token of those that decode
        left = list(lengths)
        while any(left):
            outputs: dict[int, int] = {}
            for row, token in latest.items():
                outputs[row] = context.add([token], done[row], row, wanted=True)
                done[row] += 1
            for row, prompt in enumerate(prompts):
                chunk = prompt[done[row] : done[row] + N_BATCH - context.batch.n_tokens]
                if chunk:
                    done[row] += len(chunk)
                    last = context.add(chunk, done[row] - len(chunk), row, wanted=done[row] == len(prompt))
                    if done[row] == len(prompt):
                        outputs[row] = last
            context.decode()
            step = [(row, int(context.logits(index).argmax())) for row, index in outputs.items()]
            for row, token in step:
                left[row] -= 1
                latest[row] = token
                if not left[row]:
                    del latest[row]
            if step:
                yield step

    def prepare(self, phase: str) -> None:
        pass

    def logits(self, prompt: Sequence[int]) -> list[float]:
        context = self._context(1)
        context.clear()
        last = context.add(prompt, 0, 0, wanted=True)
        context.decode()
        return context.logits(last).tolist()

    def describe(self) -> str:
        features = cpp.llama_print_system_info().decode().strip(" |\n")
        return (
            f"llama-cpp-python {cpp.__version__}, KV cache float16, n_batch {N_BATCH}, n_ubatch {N_UBATCH}; {features}"
        )


if __name__ == "__main__":
    protocol.serve(LlamaCpp)
