import contextlib
import os
import pathlib
import subprocess
import sys

import grpc
import pytest
from fake_engine import model_info
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from harness import generate_request, serving, tls
from smg_grpc_proto.generated.vllm_engine_pb2_grpc import VllmEngineStub

from jaxmoe.errors import ConfigError
from jaxmoe.serving import security
from jaxmoe.serving.security import Tokens
from jaxmoe.serving.server import ServerConfig


@contextlib.contextmanager
def secure_channel(pki, address, client=None):
    key, cert = ((pki / f"{client}.{end}").read_bytes() for end in ("key", "pem")) if client else (None, None)
    credentials = grpc.ssl_channel_credentials((pki / "ca.pem").read_bytes(), key, cert)
    with grpc.secure_channel(address, credentials) as channel:
        yield channel


def ask(channel, token=None):
    metadata = [("authorization", f"Bearer {token}")] if token else None
    (answer,) = VllmEngineStub(channel).Generate(generate_request([5], max_tokens=1), metadata=metadata, timeout=30)
    return list(answer.complete.output_ids)


def refusal(channel, token=None):
    with pytest.raises(grpc.RpcError) as error:
        ask(channel, token)
    return error.value.code()


def test_over_tls_plaintext_is_not_understood(checkpoint, pki):
    with serving(model_info(checkpoint), **tls(pki)) as server:
        with secure_channel(pki, server.address) as channel:
            assert ask(channel) == [5]
        assert refusal(server.channel) is grpc.StatusCode.UNAVAILABLE


def test_with_mutual_tls_a_client_needs_a_certificate(checkpoint, pki):
    options = tls(pki, tls_client_ca=str(pki / "ca.pem"), max_client_requests=1)
    with serving(model_info(checkpoint), **options) as server:
        with secure_channel(pki, server.address, client="client") as channel:
            assert ask(channel) == [5]
        with secure_channel(pki, server.address) as channel:
            assert refusal(channel) is grpc.StatusCode.UNAVAILABLE


def test_grpcurl_passes_with_a_certificate_and_a_token(checkpoint, pki, tmp_path):
    file = tmp_path / "tokens"
    file.write_text("alpha\n")
    grpcurl = pathlib.Path(sys.executable).with_name("grpcurl")

    def code(address, *options):
        command = [grpcurl, "-cacert", pki / "ca.pem", *options, address, "list"]
        return subprocess.run(command, capture_output=True, timeout=60).returncode

    shown = ("-cert", pki / "client.pem", "-key", pki / "client.key")
    options = tls(pki, tls_client_ca=str(pki / "ca.pem"), auth_token_file=str(file))
    with serving(model_info(checkpoint), **options) as server:
        assert code(server.address, *shown, "-H", "authorization: Bearer alpha") == 0
        assert code(server.address, *shown) != 0
        assert code(server.address, "-H", "authorization: Bearer alpha") != 0


def test_without_a_known_token_nothing_but_health_is_told(checkpoint, tmp_path, monkeypatch):
    file = tmp_path / "tokens"
    file.write_text("# ours\nalpha\nbeta\n")
    with serving(model_info(checkpoint), auth_token_file=str(file)) as server:
        assert ask(server.channel, "alpha") == ask(server.channel, "beta") == [5]
        for token in (None, "alph", "alphaa", "# ours", "gamma"):
            assert refusal(server.channel, token) is grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
            ProtoReflectionDescriptorDatabase(server.channel).get_services()
        health = health_pb2_grpc.HealthStub(server.channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING


def test_tokens_are_read_again_when_their_file_changes(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(security, "_RELOAD_INTERVAL", 0)
    file = tmp_path / "tokens"
    file.write_text("alpha\n")
    tokens = Tokens(str(file))
    assert tokens.accept("alpha")
    (tmp_path / "next").write_text("beta\n")
    os.replace(tmp_path / "next", file)
    assert tokens.accept("beta")
    assert not tokens.accept("alpha")
    file.write_text("")
    assert tokens.accept("beta")
    file.unlink()
    assert tokens.accept("beta")
    assert "holds no token; the tokens of before stay" in caplog.text
    assert "cannot be read" in caplog.text
    assert "beta" not in caplog.text.replace("tokens of before", "")


@pytest.mark.parametrize("content", [None, "", "# only a comment\n"])
def test_a_file_without_tokens_is_told(tmp_path, content):
    file = tmp_path / "tokens"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match="--auth-token-file"):
        Tokens(str(file))


def test_a_start_that_cannot_be_secure_says_why(checkpoint, pki):
    for options, words in (
        ({"tls_cert": "/no/file", "tls_key": str(pki / "server.key")}, "--tls-cert /no/file: No such file"),
        ({"auth_token_file": "/no/file"}, "--auth-token-file /no/file: No such file"),
        (tls(pki, tls_key=str(pki / "client.key")), "no pair"),
    ):
        with pytest.raises(ConfigError, match=words), serving(model_info(checkpoint), **options):
            pass


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tls_cert": "a"}, "go together"),
        ({"tls_client_ca": "a"}, "needs --tls-cert"),
        ({"metrics_port": 0, "metrics_host": "0.0.0.0"}, "--metrics-host 0.0.0.0"),
        ({"port": 1 << 16}, "--port 65536"),
        ({"max_client_requests": -1}, "--max-client-requests -1"),
    ],
)
def test_settings_that_do_not_go_together(options, words):
    with pytest.raises(ConfigError, match=words):
        ServerConfig(**options)


def test_beyond_this_machine_with_tls_or_when_told(pki):
    ServerConfig(host="0.0.0.0", **tls(pki))
    ServerConfig(host="0.0.0.0", metrics_host="0.0.0.0", metrics_port=0, insecure_bind=True)


def test_one_client_may_have_so_many_requests(checkpoint, tmp_path):
    file = tmp_path / "tokens"
    file.write_text("alpha\nbeta\n")
    options = {"auth_token_file": str(file), "max_client_requests": 1}
    with serving(model_info(checkpoint), pace=0.001, **options) as server:
        stub, alpha = VllmEngineStub(server.channel), [("authorization", "Bearer alpha")]
        running = stub.Generate(generate_request([5], stream=True), metadata=alpha)
        next(running)
        assert refusal(server.channel, "alpha") is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert ask(server.channel, "beta") == [5]
        running.cancel()
        server.engine.wait_until(lambda engine: not engine.has_work)
        assert ask(server.channel, "alpha") == [5]
