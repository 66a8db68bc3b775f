import json
import subprocess

import pytest
import tokenizers
from fake_engine import model_info
from harness import serving
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

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


@pytest.fixture(scope="module")
def server(checkpoint):
    with serving(model_info(checkpoint), pace=0.001) as server:
        yield server


def make(directory, *arguments):
    subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)


@pytest.fixture(scope="session")
def pki(tmp_path_factory):
    """An authority, a certificate of it for this machine, and one for a client."""
    directory = tmp_path_factory.mktemp("pki")
    new_key = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    make(directory, *new_key, "-x509", "-days", "30", "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.pem")
    (directory / "names").write_text("subjectAltName=IP:127.0.0.1")
    for name in ("server", "client"):
        make(directory, *new_key, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        signing = ["x509", "-req", "-days", "30", "-CA", "ca.pem", "-CAkey", "ca.key", "-extfile", "names"]
        make(directory, *signing, "-in", f"{name}.csr", "-out", f"{name}.pem")
    return directory
