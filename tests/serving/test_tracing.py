import http.server
import sys
import threading

import pytest
from fake_engine import model_info
from harness import generate_request, serving
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from jaxmoe.errors import ConfigError
from jaxmoe.serving.tracing import Tracer

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collector():
    """The address of an OTLP collector, and what it was sent."""
    spans = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                pytest.fail("compressed")
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", spans
        server.shutdown()
        thread.join()


def test_a_request_is_a_span_under_the_one_of_its_sender(checkpoint, collector):
    endpoint, spans = collector
    with serving(model_info(checkpoint), otlp_endpoint=endpoint) as server:
        metadata = [("traceparent", f"00-{TRACE}-{PARENT}-01")]
        list(server.stub.Generate(generate_request([5, 6], max_tokens=3, request_id="a"), metadata=metadata))
        unsampled = [("traceparent", f"00-{TRACE}-{PARENT}-00")]
        list(server.stub.Generate(generate_request([5, 6], max_tokens=3), metadata=unsampled))
    (span,) = spans
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.name) == (TRACE, PARENT, "llm_request")
    told = {attribute.key: attribute.value for attribute in span.attributes}
    assert told["gen_ai.request.id"].string_value == "a"
    assert told["gen_ai.usage.output_tokens"].int_value == 3
    assert told["gen_ai.latency.time_to_first_token"].double_value > 0
    assert [event.name for event in span.events] == ["first scheduled", "first token"]
    assert span.start_time_unix_nano <= span.events[0].time_unix_nano <= span.end_time_unix_nano


def test_without_the_packages_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxmoe\[tracing\]'"):
        Tracer("http://127.0.0.1:4318")
