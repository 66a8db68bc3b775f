import contextlib
import json
import signal
import threading

import grpc
import pytest
import tokenizers
from fake_engine import FakeEngine, model_info
from google.rpc import error_details_pb2, status_pb2
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated.vllm_engine_pb2_grpc import VllmEngineStub
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jaxmoe.serving.engine_loop import serve_engine
from jaxmoe.serving.link import FrontendConfig, Ready
from jaxmoe.serving.server import Frontend
from jaxmoe.serving.tokenization import Tokenizer

CORPUS = ["one two three END of the story, and the rest of it", "naïve café 你好世界 😀", "the end of the other story"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A directory with the tokenizer files of a checkpoint: byte-level BPE, so that characters split over tokens."""
    directory = tmp_path_factory.mktemp("checkpoint")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"model_type": "mixtral", "eos_token_id": 1}))
    return directory


@pytest.fixture(scope="session")
def tokenizer(checkpoint):
    return Tokenizer.load(checkpoint)


class Server:
    """A front end process, with a fake engine in a thread of this one."""

    def __init__(self, frontend, engine, channel):
        self.frontend = frontend
        self.engine = engine
        self.address = frontend.address
        self.channel = channel
        self.stub = VllmEngineStub(channel)

    def generate(self, prompt, *, timeout=30, **fields):
        """A call; `prompt` is text or tokens, `fields` are those of SamplingParams and of GenerateRequest."""
        return self.stub.Generate(generate_request(prompt, **fields), timeout=timeout)

    def refusal(self, prompt, **fields):
        """The error of a call that is refused."""
        with pytest.raises(grpc.RpcError) as error:
            list(self.generate(prompt, **fields))
        return error.value


def generate_request(prompt, **fields):
    own = {name: fields.pop(name) for name in list(fields) if name in pb.GenerateRequest.DESCRIPTOR.fields_by_name}
    request = pb.GenerateRequest(sampling_params=pb.SamplingParams(**fields), **own)
    if isinstance(prompt, str):
        request.text = prompt
    elif prompt is not None:
        request.tokenized.input_ids.extend(prompt)
    return request


def error_detail(error, kind):
    """The google.rpc detail that an error carries."""
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    assert (status.code, status.message) == (error.code().value[0], error.details())
    detail = getattr(error_details_pb2, kind)()
    assert status.details[0].Unpack(detail)
    return detail


@contextlib.contextmanager
def serving(info, *, pace=0.0, step_timeout=120.0, max_backlog=16384):
    config = FrontendConfig(
        host="127.0.0.1",
        port=0,
        reflection=True,
        drain_timeout=5,
        step_timeout=step_timeout,
        max_backlog=max_backlog,
        log_level=30,
    )
    engine, ready, failures = FakeEngine(info, pace), threading.Event(), []

    def loop(link):
        try:
            serve_engine(engine, link, on_serving=ready.set)
        except RuntimeError as error:
            failures.append(error)

    with Frontend(config) as frontend:
        thread = threading.Thread(target=loop, args=[frontend.link])
        frontend.link.send(Ready(info))
        thread.start()
        try:
            assert ready.wait(20)
            with grpc.insecure_channel(frontend.address) as channel:
                yield Server(frontend, engine, channel)
        finally:
            engine.gate.set()
            with frontend.signals():
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGTERM)
            thread.join(20)
            assert not thread.is_alive()
    assert len(failures) == engine.crash


@pytest.fixture(scope="module")
def server(checkpoint):
    with serving(model_info(checkpoint), pace=0.001) as server:
        yield server
