import jax
import jax.numpy as jnp
import pytest

from jaxmoe.engine.programs import build, identifier, summary, table


@pytest.fixture
def compile_cache(tmp_path):
    """An empty one, used for any program however small."""
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.jax_compilation_cache_dir
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", before)


def double(name):
    def fn(x):
        return 2 * x

    fn.__name__ = name
    return jax.jit(fn).lower(jax.ShapeDtypeStruct((3,), jnp.float32))


def test_a_program_is_found_in_the_compile_cache_the_second_time(compile_cache):
    first, second = (build("double batch=3", double, None) for _ in range(2))
    assert (first.cached, second.cached) == (False, True)
    assert min(first.lowering, first.compiling, second.lowering, second.compiling) > 0
    assert summary([first, second], 1.5).startswith(
        "2 programs ready in 1.5 s, 1 of them from the compile cache; slowest"
    )
    told = [line.split()[-1] for line in table([first, second])]
    assert sorted(told[1:3]) == ["no", "yes"]


def test_a_program_is_known_to_profiles_by_its_title():
    program = build("double batch=3", double, None)
    assert program.name == "jit_double_batch3"
    assert program.compiled.as_text().startswith("HloModule jit_double_batch3,")


def test_titles_become_identifiers():
    assert identifier("prefill batch=1 tokens=64 pages=16").isidentifier()
