import numpy as np, time
def test_x(reference_checkpoint):
    t=time.time()
    from jaxmoe.engine.model import Model
    from jaxmoe.engine.engine import Engine
    from jaxmoe.engine.config import EngineConfig
    r = reference_checkpoint()
    print("ref", time.time()-t); t=time.time()
    m = Model(r.folder); print("load", time.time()-t); t=time.time()
    out = m.logits(r.tokens); print("logits", time.time()-t, abs(out-r.logits).max(), abs(r.logits).max()); t=time.time()
    e = Engine(m, EngineConfig(page_size=4, max_batch=1, max_context=32, max_prefill_tokens=6, max_prefill_sequences=1))
    print("engine", time.time()-t, list(e._runner._buckets)); t=time.time()
