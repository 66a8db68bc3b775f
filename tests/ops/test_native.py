"""The kernels in C++ against XLA's implementations of the same ops; and their bits, which do not depend on company."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoe.errors import ConfigError
from jaxmoe.ops import native, paged_attention
from jaxmoe.ops.gating import ACTIVATIONS
from jaxmoe.ops.grouped_mlp import gated_mlp, grouped_mlp
from jaxmoe.ops.linear import Compute, linear, linear_by_head, linear_transposed
from jaxmoe.ops.paged_attention import Where
from jaxmoe.ops.sampling import greedy, sample
from jaxmoe.sharding.mesh import MeshSpec, make_mesh
from jaxmoe.spans import FULL, Span

TOLERANCE = {"float32": 2e-5, "bfloat16": 4e-2}
PAGE, LAYER = 16, 1


def normal(shape, dtype="float32", seed=0, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, dtype)


def both(function, *args, **options):
    """The result of "native" and that of "xla", as float32."""
    run = {kind: jax.jit(functools.partial(function, implementation=kind, **options)) for kind in ("native", "xla")}
    return [jax.tree.map(lambda array: np.asarray(array, np.float32), run[kind](*args)) for kind in run]


def by(function):
    """An op that is told of its kernels by `Compute`, for `both`."""
    return lambda *args, implementation, **options: function(*args, compute=Compute(implementation), **options)


def assert_alike(pair, dtype="float32"):
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=TOLERANCE[dtype]), *pair)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 3, 24, 25, 40, 200, 401])
@pytest.mark.parametrize(("depth", "columns"), [(12, (5,)), (70, (3, 7)), (520, (4, 33))])
def test_linear(rows, depth, columns, dtype):
    stacks = [normal((2, depth, *columns), dtype, seed, depth**-0.5) for seed in (1, 2)]
    assert_alike(both(by(linear), normal((rows, depth), dtype), stacks, jnp.int32(LAYER)), dtype)


@pytest.mark.parametrize("in_use", [0, 3, 50])
def test_rows_of_padding_come_out_as_zeros_and_change_no_other(in_use):
    x, stack = normal((50, 24)), normal((2, 24, 33), seed=1)
    gate_up, down = normal((2, 24, 2, 37), seed=2, scale=0.4), normal((2, 37, 24), seed=3, scale=0.2)
    some, every = Compute("native", jnp.int32(in_use)), Compute("native")
    for run in (
        lambda compute: linear(x, [stack], LAYER, compute)[0],
        lambda compute: gated_mlp(x, gate_up, down, LAYER, "silu", compute),
    ):
        out = run(some)
        np.testing.assert_array_equal(out[:in_use], run(every)[:in_use])
        assert not out[in_use:].any()


@pytest.mark.parametrize("rows", [1, 50])
def test_linear_transposed(rows):
    assert_alike(both(linear_transposed, normal((rows, 600)), normal((77, 600), seed=1, scale=0.04)))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 7, 30, 200])
def test_linear_by_head_and_its_transpose(rows, dtype):
    stack = normal((2, 40, 3, 56), dtype, 1, 0.15)
    of_rank, of_columns = normal((rows, 3, 40), dtype, 2), normal((rows, 3, 20), dtype, 3)
    assert_alike(both(linear_by_head, of_rank, stack, jnp.int32(LAYER), columns=slice(20, None)), dtype)
    assert_alike(both(linear_by_head, of_columns, stack, jnp.int32(LAYER), columns=slice(20), transposed=True), dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 40])
def test_a_gated_mlp_of_every_activation(activation, rows):
    gate_up, down = normal((2, 24, 2, 37), seed=1, scale=0.4), normal((2, 37, 24), seed=2, scale=0.2)
    assert_alike(both(by(gated_mlp), normal((rows, 24)), gate_up, down, jnp.int32(LAYER), activation=activation))


@pytest.mark.parametrize("weigh_input", [False, True])
def test_a_mixture_in_bfloat16(weigh_input):
    x, gate_up, down = (normal(shape, "bfloat16", scale=0.3) for shape in [(50, 24), (2, 6, 24, 2, 20), (2, 6, 20, 24)])
    slots = jnp.asarray(np.argsort(np.random.default_rng(1).random((50, 6)), axis=1)[:, :2], jnp.int32)
    weights = jnp.abs(normal((50, 2)))
    run = functools.partial(grouped_mlp, x, slots, weights, gate_up, down, LAYER, weigh_input=weigh_input)
    pair = [np.asarray(run(implementation=kind), np.float32) for kind in ("native", "tiles")]
    assert_alike(pair, "bfloat16")


def paged(batch, contexts, dtype="float32", kv_heads=2, width=24, values=None, seed=5, shared=False):
    """Pages of two layers in any order, and where sequences of these lengths lie in them."""
    rng = np.random.default_rng(seed)
    longest = -(-max(contexts) // PAGE) + 2  # a table has a tail that nobody reaches
    table = rng.permutation(batch * longest).reshape(batch, longest).astype(np.int32)
    shape = (2, batch * longest, PAGE, kv_heads)
    arrays = [normal((*shape, each), dtype, seed + each) for each in ((width,) if shared else (width, values or width))]
    return tuple(arrays), Where(jnp.int32(LAYER), jnp.asarray(table), jnp.zeros(batch, jnp.int32))


def last_positions(contexts, tokens):
    """Of the last `tokens` of each context; -1 where it has fewer."""
    offset = np.arange(tokens) - tokens
    positions = np.asarray(contexts)[:, None] + offset
    return jnp.asarray(np.where(positions >= 0, positions, -1), jnp.int32)


def attend(query, positions, pages, where, span=FULL, value_dim=24, implementation="xla"):
    return paged_attention.attend(query, positions, pages, where, 0.2, span, value_dim, implementation)


def seen(out, positions):
    """Rows of queries that are there."""
    return [np.asarray(each, np.float32)[np.asarray(positions) >= 0] for each in out]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("span", [FULL, Span("window", 21), Span("chunk", 32)], ids=str)
@pytest.mark.parametrize("heads", [2, 6, 40])
@pytest.mark.parametrize("tokens", [1, 5, 90])
def test_attention_over_pages(tokens, heads, span, dtype):
    contexts = [3, 64, 150] * 4  # enough for heads to stay together
    pages, where = paged(12, contexts, dtype)
    positions = last_positions(contexts, tokens)
    out = both(attend, normal((12, tokens, heads, 24), dtype, 9), positions, pages, where, span=span)
    assert_alike(seen(out, positions), dtype)


@pytest.mark.parametrize("tokens", [1, 40])
def test_attention_over_latents_that_all_heads_share(tokens):
    contexts = [100, 7]
    (entries,), where = paged(2, contexts, kv_heads=1, width=36, shared=True)
    pages = (entries[:, :, :, 0],)
    positions = last_positions(contexts, tokens)
    out = both(attend, normal((2, tokens, 130, 36), seed=9), positions, pages, where, value_dim=28)
    assert_alike(seen(out, positions))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 70])
def test_keys_and_values_made_of_latents(tokens, dtype):
    contexts = [130, 70] * 5
    (entries,), where = paged(10, contexts, dtype, kv_heads=1, width=36, shared=True)
    entries = entries[:, :, :, 0]
    key_value = normal((3, 28, 4, 22), dtype, 4, 0.2)
    positions = last_positions(contexts, tokens)

    def run(query, positions, entries, where, key_value, layer, implementation):
        options = (0.2, FULL, 12, implementation)
        return paged_attention.attend_latent(query, positions, entries, where, key_value, layer, *options)

    query = normal((10, tokens, 4, 18), dtype, 6)
    assert_alike(seen(both(run, query, positions, entries, where, key_value, jnp.int32(2)), positions), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_table_may_begin_later_than_at_the_first_token(dtype):
    pages, where = paged(2, [80, 80], dtype)
    where = where._replace(first=jnp.asarray([0, 48], jnp.int32))
    positions = jnp.asarray([[79], [100]], jnp.int32)
    out = both(attend, normal((2, 1, 4, 24), dtype), positions, pages, where, span=Span("window", 30))
    assert_alike(out, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_new_vectors_are_written_to_their_places_and_nowhere_else(dtype):
    pages, where = paged(2, [40, 40], dtype)
    new = tuple(normal((2, 6, 2, 24), dtype, seed) for seed in (7, 8))
    positions = jnp.asarray([[14, 15, 16, 17, -1, -1], [-1] * 6], jnp.int32)
    one, other = both(paged_attention.write, pages, new, positions, where)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_pages_are_written_in_place():
    pages, where = paged(1, [40])
    new, positions = tuple(normal((1, 1, 2, 24), seed=seed) for seed in (7, 8)), jnp.asarray([[3]], jnp.int32)
    write = functools.partial(paged_attention.write, implementation="native")
    compiled = jax.jit(write, donate_argnums=0).lower(pages, new, positions, where).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(array.nbytes for array in pages)
    assert memory.temp_size_in_bytes < pages[0].nbytes


class TestBitsDoNotDependOnCompany:
    """The same rows alone and among others: equal to the bit."""

    @pytest.mark.parametrize("rows", [1, 5, 23, 26, 211])
    def test_linear(self, rows):
        x, stack = normal((400, 530)), normal((1, 530, 150), seed=1)
        run = jax.jit(lambda x: native.linear(x, [stack], 0)[0])
        np.testing.assert_array_equal(run(x)[7 : 7 + rows], run(x[7 : 7 + rows]))

    @pytest.mark.parametrize("rows", [1, 30])
    def test_mixture(self, rows):
        x, slots = normal((300, 40)), jnp.asarray(np.random.default_rng(0).integers(0, 3, (300, 2)), jnp.int32)
        weights = jnp.abs(normal((300, 2)))
        gate_up, down = normal((1, 3, 40, 2, 50), seed=1, scale=0.2), normal((1, 3, 50, 40), seed=2, scale=0.2)
        run = jax.jit(lambda *of_rows: native.grouped_mlp(*of_rows, gate_up, down, 0, "silu", False))
        part = (x[9 : 9 + rows], slots[9 : 9 + rows], weights[9 : 9 + rows])
        np.testing.assert_array_equal(run(x, slots, weights)[9 : 9 + rows], run(*part))

    @pytest.mark.parametrize("span", [FULL, Span("window", 70), Span("chunk", 100)], ids=str)
    def test_attention_of_a_prompt_whole_in_chunks_and_token_by_token(self, span):
        pages, where = paged(1, [230])
        query = normal((1, 230, 6, 24), seed=3)
        positions = jnp.arange(230, dtype=jnp.int32)[None]
        run = jax.jit(functools.partial(attend, implementation="native", span=span))
        whole = np.asarray(run(query, positions, pages, where))
        for tokens in (1, 23):
            parts = [
                run(query[:, at : at + tokens], positions[:, at : at + tokens], pages, where)
                for at in range(0, 230, tokens)
            ]
            np.testing.assert_array_equal(whole, np.concatenate(parts, axis=1))


@pytest.mark.parametrize("columns", [1, 5, 37, 1000])
def test_the_best_of_each_row_and_the_log_of_its_sum(columns):
    logits = normal((6, columns), scale=5).at[2].set(1.0).at[3, -1].set(90.0)
    assert_alike(both(greedy, logits))


@pytest.mark.parametrize("columns", [1, 37, 1000, 20_000])
@pytest.mark.parametrize(
    "how", [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 300, "top_p": 0.5, "min_p": 0.01}], ids=str
)
def test_draws_are_those_of_the_same_noise(columns, how):
    rows = 64
    logits = normal((rows, columns), scale=3).at[:3].set(0.0)
    params = {"temperature": jnp.linspace(0, 3, rows), "top_k": 0, "top_p": 1.0, "min_p": 0.0} | how
    full = {name: jnp.broadcast_to(jnp.asarray(value), (rows,)) for name, value in params.items()}
    seeds = jnp.arange(rows, dtype=jnp.int32) * -77_777_777
    (tokens, logprobs), (expected, _) = both(sample, logits, *full.values(), seeds, jnp.arange(rows) * 1000)
    np.testing.assert_array_equal(tokens, expected)
    every = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_allclose(logprobs, every[np.arange(rows), tokens.astype(int)], atol=2e-5)


def test_kernels_run_on_every_virtual_device():
    mesh = make_mesh(MeshSpec.parse("dp=2,ep=4"))
    ranks = P(("dp", "ep"), None, None)
    x, stack = normal((8, 3, 64)), normal((1, 64, 96), seed=1, scale=0.2)

    def local(x, stack):
        return native.linear(x, [stack], 0)[0]

    with jax.set_mesh(mesh):
        run = jax.jit(jax.shard_map(local, in_specs=(ranks, P()), out_specs=ranks, check_vma=False))
        out = run(jax.device_put(x, NamedSharding(mesh, ranks)), stack)
    np.testing.assert_allclose(out, x @ stack[0], atol=1e-5)
    assert len(out.sharding.device_set) == 8


def test_a_choice_that_cannot_be_had_says_why(monkeypatch):
    with pytest.raises(ConfigError, match="kernels='native' compute in float32 or bfloat16 on a CPU, not in float16"):
        native.choose("native", "cpu", jnp.dtype("float16"))
    with pytest.raises(ConfigError, match="not in float32 on tpu; use kernels='xla'"):
        native.choose("native", "tpu", jnp.dtype("float32"))
    with pytest.raises(ConfigError, match="kernels='cuda' is not one of auto, native, xla"):
        native.choose("cuda", "cpu", jnp.dtype("float32"))
    monkeypatch.setattr(native, "COMPILERS", ("no-such-compiler",))
    native._registered.cache_clear()
    try:
        assert native.choose("auto", "cpu", jnp.dtype("float32")) == "xla"
        with pytest.raises(ConfigError, match=r"no C\+\+ compiler \(no-such-compiler\) was found"):
            native.choose("native", "cpu", jnp.dtype("float32"))
    finally:
        native._registered.cache_clear()


def test_a_source_that_does_not_compile_leaves_xla(monkeypatch, tmp_path, caplog):
    broken = tmp_path / "kernels"
    broken.mkdir()
    (broken / "native.cc").write_text("this is no C++")
    monkeypatch.setattr(native, "SOURCES", broken)
    monkeypatch.setattr(native, "BUILT", tmp_path / "built")
    for cached in (native._registered, native._source_hash):
        cached.cache_clear()
    try:
        assert native.choose("auto", "cpu", jnp.dtype("float32")) == "xla"
        assert "could not be compiled" in caplog.text
        assert not list((tmp_path / "built").iterdir())
    finally:
        for cached in (native._registered, native._source_hash):
            cached.cache_clear()
