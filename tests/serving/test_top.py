import doctest
import json
import math
import pathlib
import re

import jaxmoe.top
from jaxmoe.client import Client
from jaxmoe.serving.link import Balance, Report, Totals
from jaxmoe.serving.metrics import Metrics
from jaxmoe.serving.proto import admin_pb2 as pb
from jaxmoe.top import Snapshot, heat_map, latency, main, quantile, render

ROOT = pathlib.Path(__file__).parents[2]


def snapshot(metrics, time):
    return Snapshot(pb.Metrics(time=time, samples=[pb.Sample(name=n, labels=ls, value=v) for n, ls, v in metrics]))


def test_rates_and_latencies_are_those_between_two_moments():
    name = "vllm:time_to_first_token_seconds"

    def at(time, fast, slow, tokens):
        buckets = [("0.1", fast), ("1.0", fast + slow), ("+Inf", fast + slow)]
        return snapshot(
            [
                *((f"{name}_bucket", {"le": bound}, value) for bound, value in buckets),
                (f"{name}_sum", {}, fast * 0.05 + slow),
                (f"{name}_count", {}, fast + slow),
                ("vllm:generation_tokens_total", {}, tokens),
                *(("vllm:kv_cache_usage_perc", {"engine": str(rank)}, rank / 11) for rank in (10, 2, 0)),
            ],
            time,
        )

    before, now = at(10, 1000, 5, 100), at(12, 1000, 15, 500)
    found = latency(before, now, name)
    assert (found.values, found.mean) == (10, 1.0)
    assert 0.1 < found.median < found.p99 <= 1
    assert latency(now, now, name) is None
    screen = render("here:1", before, now)
    assert re.search(r"tokens .* 200 generated/s", screen)
    assert re.search(r"first token +1000.00 ", screen)
    assert screen.endswith(" ▂█")


def test_quantiles_are_as_prometheus_has_them():
    assert doctest.testmod(jaxmoe.top).failed == 0
    assert quantile([(1.0, 0.0), (math.inf, 5.0)], 0.5) == 1.0


def test_the_heat_map_has_a_row_a_layer_and_at_most_64_columns():
    def layer(number, experts):
        return pb.LayerLoad(layer=number, experts=experts)

    assert heat_map(pb.ExpertLoad()) == []
    few = pb.ExpertLoad(balancedness=0.5, of_ceiling=0.8, worst_layer=3, worst_balancedness=0.25)
    few.layers.extend([layer(1, [0, 4, 8, 0]), layer(3, [0, 0, 0, 0])])
    _, told, _, first, second = heat_map(few)
    assert told == "balancedness 0.50, 80 % of what even routing reaches; 0.25 in layer 3, the worst"
    assert first.split() == ["1", "▄█", "2.67"]
    assert second.split() == ["3", "1.00"]
    many = pb.ExpertLoad(layers=[layer(0, [0] * 255 + [1])])
    *_, title, row = heat_map(many)
    assert "the busiest of 4 experts a column" in title
    assert row[9:73] == " " * 63 + "█"


def test_one_look_at_a_server(server, capsys):
    with Client(server.address) as client:
        client.generate([5], max_tokens=3)
    assert main(["--server", server.address, "--once", "--interval", "0.01"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"{server.address}  fake  serving\n")
    assert "\x1b" not in told


def test_nobody_there_is_told_in_one_line(capsys):
    assert main(["--server", "127.0.0.1:1", "--once"]) == 2
    assert capsys.readouterr().err == (
        "error: no server answers at 127.0.0.1:1; start one with `python -m jaxmoe.serve`\n"
    )


def test_the_dashboard_shows_only_metrics_that_there_are():
    from fake_engine import model_info

    metrics = Metrics()
    metrics.begin(model_info(""))
    metrics.refused("INTERNAL")
    metrics.report(Report([], Totals(), Balance(0.5, 0.8, 0.625, 0, 0.25)))
    known = {sample.name for sample in metrics.samples()}
    known |= {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"}
    text = (ROOT / "docs" / "grafana_dashboard.json").read_text()
    expressions = [target["expr"] for panel in json.loads(text)["panels"] for target in panel["targets"]]
    named = {name for each in expressions for name in re.findall(r"\b(?:vllm|jaxmoe):\w+|\b\w*process_\w+", each)}
    assert named
    assert named <= known
