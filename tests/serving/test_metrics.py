import urllib.error
import urllib.request

import pytest
from fake_engine import model_info
from harness import serving
from prometheus_client.parser import text_string_to_metric_families

from jaxmoe.errors import ConfigError
from jaxmoe.serving.link import Balance, FrontendConfig, Moves, RankLoad, Report, Step, Totals
from jaxmoe.serving.metrics import Metrics, Timeline, waiting_by_rank
from jaxmoe.serving.server import Frontend

MODEL = {"model_name": "fake"}


def read(url):
    with urllib.request.urlopen(url, timeout=30) as response:
        return response.read().decode()


def scrape(server):
    """Values by name and labels."""
    families = text_string_to_metric_families(read(server.frontend.bound.metrics))
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value for family in families for sample in family.samples
    }


def of_model(samples, name, **labels):
    return samples[(name, *sorted((MODEL | labels).items()))]


def test_tokens_that_come_after_the_last_step_are_counted(checkpoint):
    metrics = Metrics()
    metrics.begin(model_info(checkpoint))
    metrics.step(Step(0.0, 0.1, 0.1, ("a",), 3, 1), 0)
    metrics.step(Step(0.1, 0.1, 0.1, (), 0, 0), 1)
    told = {sample.name: sample.value for sample in metrics.samples() if not sample.labels.keys() - MODEL.keys()}
    assert told["vllm:generation_tokens_total"] == told["jaxmoe:step_seconds_count"] == 1


def test_a_scrape_tells_what_was_served(checkpoint):
    with serving(model_info(checkpoint), metrics_port=0) as server:
        list(server.generate([5, 6, 7], max_tokens=10))
        list(server.generate([5, 1], stream=True, max_tokens=10))
        server.refusal([5], top_p=2.0)
        server.engine.wait_until(lambda engine: not engine.has_work)
        told = scrape(server)
    assert of_model(told, "vllm:request_success_total", finished_reason="length") == 1
    assert of_model(told, "vllm:request_success_total", finished_reason="stop") == 1
    assert of_model(told, "vllm:prompt_tokens_total") == 5
    assert of_model(told, "vllm:generation_tokens_total") == 12
    assert of_model(told, "vllm:time_to_first_token_seconds_count") == 2
    assert of_model(told, "vllm:inter_token_latency_seconds_count") == 10
    assert of_model(told, "vllm:request_queue_time_seconds_count") == 2
    assert of_model(told, "vllm:e2e_request_latency_seconds_count") == 2
    assert of_model(told, "vllm:request_generation_tokens_sum") == 12
    assert of_model(told, "vllm:num_preemptions_total") == 3
    assert of_model(told, "vllm:prefix_cache_queries_total") == 40
    assert of_model(told, "vllm:prefix_cache_hits_total") == 30
    assert of_model(told, "vllm:spec_decode_num_draft_tokens_total") == 20
    assert of_model(told, "vllm:spec_decode_num_accepted_tokens_total") == 11
    assert of_model(told, "jaxmoe:failed_steps_total") == 1
    assert of_model(told, "jaxmoe:compiled_programs_total") == 7
    assert of_model(told, "jaxmoe:late_compiles_total") == 0
    assert of_model(told, "jaxmoe:step_host_seconds_count") == of_model(told, "jaxmoe:step_seconds_count") == 12
    assert {of_model(told, "vllm:num_requests_running", engine=str(rank)) for rank in range(2)} == {0}
    assert told["jaxmoe:requests_refused_total", ("code", "INVALID_ARGUMENT")] == 1
    assert told["jaxmoe:phase", ("phase", "serving")] == told[("jaxmoe:serving",)] == 1
    assert told[("process_start_time_seconds",)] > 0


def test_no_label_comes_from_a_request(checkpoint):
    """Or whoever sends requests could fill the memory of whoever watches."""
    with serving(model_info(checkpoint), metrics_port=0) as server:
        before = None
        for n in range(3):
            list(server.generate([5], request_id=f"id {n}", max_tokens=2, stream=n > 1))
            server.refusal([5], request_id=f"id {n}", top_p=2.0)
            labels = scrape(server).keys()
            assert before in (None, labels)
            before = labels
    assert not any("id " in str(key) for key in before)


def test_healthz_follows_the_health_of_the_server(checkpoint):
    with serving(model_info(checkpoint), step_timeout=0.2, metrics_port=0) as server:
        healthz = server.frontend.bound.metrics.replace("/metrics", "/healthz")
        assert read(healthz) == "serving\n"
        server.engine.gate.clear()
        server.refusal([5])
        with pytest.raises(urllib.error.HTTPError, match="503"):
            read(healthz)
        server.engine.gate.set()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            read(healthz + "/secret")


def test_a_port_for_metrics_in_use_is_told(checkpoint):
    with serving(model_info(checkpoint), metrics_port=0) as server:
        port = int(server.frontend.bound.metrics.split(":")[2].partition("/")[0])
        config = FrontendConfig(
            host="127.0.0.1",
            port=0,
            reflection=False,
            drain_timeout=1,
            step_timeout=1,
            max_backlog=1,
            log_level=30,
            metrics_port=port,
        )
        with pytest.raises(ConfigError, match=rf"cannot serve metrics on 127.0.0.1:{port}: Address already in use"):
            Frontend(config)


def test_times_are_those_of_vllm(tmp_path):
    """Queue: from arrival to the step that began the prompt; prefill: from there to the first token; and so on."""
    metrics, timeline = Metrics(), Timeline(arrived=100.0, prompt_tokens=4, max_tokens=8)
    metrics.begin(model_info(tmp_path))
    timeline.started = 102.0
    for now in (105.0, 106.0, 108.0):
        metrics.tokens(timeline, 1, now)
    metrics.step(Step(99.0, 0.5, 0.2, ("a",), 4, 1), generated=1)
    timeline.ended = 108.0
    metrics.ended(timeline, "length")
    sums = {sample.name: sample.value for sample in metrics.samples() if sample.labels == MODEL}
    for name, value in {
        "time_to_first_token": 5,
        "inter_token_latency": 3,
        "e2e_request_latency": 8,
        "request_queue_time": 2,
        "request_prefill_time": 3,
        "request_decode_time": 3,
        "request_inference_time": 6,
        "request_time_per_output_token": 1.5,
    }.items():
        assert sums[f"vllm:{name}_seconds_sum"] == value
    assert sums["jaxmoe:step_host_seconds_sum"] == pytest.approx(0.3)
    assert sums["vllm:iteration_tokens_total_sum"] == 5


def test_every_rank_has_its_own_load():
    ranks = [RankLoad(3, 1, 10, 40), RankLoad(0, 0, 0, 40)]
    metrics = Metrics()
    metrics.begin(model_info(""))
    metrics.follow(lambda: ("serving", True), lambda ranks: 3)
    metrics.report(Report(ranks, Totals()))
    told = {(sample.name, sample.labels.get("engine")): sample.value for sample in metrics.samples()}
    assert [told["vllm:num_requests_running", rank] for rank in "01"] == [3, 0]
    assert [told["vllm:num_requests_waiting", rank] for rank in "01"] == waiting_by_rank(ranks, 3) == [3, 1]
    assert [told["vllm:kv_cache_usage_perc", rank] for rank in "01"] == [0.25, 0]


def test_balance_and_moves_are_told_in_few_numbers(checkpoint):
    balance = Balance(0.5, 0.8, 0.625, 1, 0.25)
    moves = Moves(done=2, failed=1, moved_experts=7, moved_bytes=700, running=True, worst_step_seconds=0.5)
    metrics = Metrics()
    metrics.begin(model_info(checkpoint, mixture_layers=(1, 3)))
    before = {(name, *labels.items()) for name, labels, _ in metrics.samples()}
    metrics.report(Report([], Totals(), balance, moves))
    told = {(name, labels.get("outcome")): value for name, labels, value in metrics.samples()}
    assert told["jaxmoe:expert_balancedness", None] == 0.5
    assert told["jaxmoe:expert_balance_ceiling", None] == 0.8
    assert told["jaxmoe:expert_balance_of_ceiling", None] == 0.625
    assert told["jaxmoe:expert_worst_layer", None] == 3
    assert told["jaxmoe:expert_worst_balancedness", None] == 0.25
    assert [told["jaxmoe:rebalances_total", outcome] for outcome in ("done", "failed", "deadline")] == [2, 1, 0]
    assert (told["jaxmoe:moved_experts_total", None], told["jaxmoe:moved_expert_bytes_total", None]) == (7, 700)
    assert (told["jaxmoe:rebalancing", None], told["jaxmoe:rebalance_worst_step_seconds", None]) == (1, 0.5)
    assert len({(name, *labels.items()) for name, labels, _ in metrics.samples()} - before) == 5
