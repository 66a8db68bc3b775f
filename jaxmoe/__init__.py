"""jaxmoe: an inference runtime for sparse mixture-of-experts language models on JAX."""
