"""Adaptive input and softmax against float64 NumPy, written from the papers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from alibi_jax.errors import UserError
from alibi_jax.models import Decoder, DecoderConfig, softmax
from alibi_jax.models.adaptive import AdaptiveVocabulary
from alibi_jax.sharding import MeshConfig, make_mesh, spec

CUTOFFS, VOCAB = (5, 12), 31
CONFIG = DecoderConfig(
    vocab_size=VOCAB,
    num_layers=1,
    embed_dim=16,
    num_heads=2,
    adaptive_cutoffs=CUTOFFS,
    adaptive_factor=2,
    final_norm=False,
)


def make(config=CONFIG, seed=0):
    """Structure, and parameters that are all large enough to matter."""
    rng = np.random.default_rng(seed)
    graphdef, shapes, _ = nnx.split(
        jax.eval_shape(lambda: Decoder(config, nnx.Rngs(0))), nnx.Param, ...
    )
    draw = lambda x: jnp.asarray(rng.normal(0.1, 0.5, x.shape), jnp.float32)  # noqa: E731
    return graphdef, jax.tree.map(draw, shapes)


def exact(params):
    """Parameters of the vocabulary as float64: tables, projections, clusters."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(params))
    bands = [params["vocabulary"]["bands"][i] for i in range(3)]
    tables, projections = ([band[name] for band in bands] for name in ("table", "projection"))
    return tables, projections, params["vocabulary"]["clusters"]


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def log_probabilities(tables, projections, clusters, hidden):
    """Log p(w | h) of every word, one at a time: p(class) of the head, times p(w | class)."""
    head = log_softmax(np.concatenate([hidden @ tables[0].T, hidden @ clusters.T], -1))
    parts = [head[..., : CUTOFFS[0]]]
    for i in (1, 2):
        tail = log_softmax(hidden @ projections[i].T @ tables[i].T)
        parts.append(head[..., CUTOFFS[0] + i - 1][..., None] + tail)
    return np.concatenate(parts, -1)


def random_tokens(batch=8, length=8, seed=0):
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (2, batch, length), dtype=np.int32)
    tokens[:, 0, :6] = (0, 4, 5, 11, 12, 30)  # both ends of every band
    return tokens


def test_input_against_float64():
    graphdef, params = make()
    tokens, _ = random_tokens()
    x = jax.jit(lambda p: nnx.merge(graphdef, p).vocabulary.embed(tokens))(params)
    tables, projections, _ = exact(params)
    expected = np.zeros((*tokens.shape, 16))
    for index, token in np.ndenumerate(tokens):
        band = sum(token >= cutoff for cutoff in CUTOFFS)
        row = tables[band][token - (0, *CUTOFFS)[band]]
        expected[index] = row @ projections[band]
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5)


def test_logits_are_log_probabilities():
    graphdef, params = make()
    tokens, targets = random_tokens()

    @jax.jit
    def run(params):
        model = nnx.merge(graphdef, params)
        return model.hidden(tokens), model(tokens), model.token_losses(tokens, targets)

    hidden, logits, (nats, log_z) = run(params)
    assert logits.shape == (8, 8, VOCAB) and logits.dtype == jnp.float32
    np.testing.assert_allclose(np.exp(np.asarray(logits, np.float64)).sum(-1), 1.0, rtol=1e-5)
    tables, projections, clusters = exact(params)
    hidden = np.asarray(hidden, np.float64)
    truth = log_probabilities(tables, projections, clusters, hidden)
    np.testing.assert_allclose(logits, truth, rtol=1e-4, atol=1e-4)
    of_targets = np.take_along_axis(truth, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(nats, -of_targets, rtol=1e-4, atol=1e-4)
    head = np.concatenate([hidden @ tables[0].T, hidden @ clusters.T], -1)
    np.testing.assert_allclose(log_z, np.log(np.exp(head).sum(-1)), rtol=1e-5, atol=1e-5)


def vocabulary_loss(graphdef, params, hidden, targets):
    nats, log_z = nnx.merge(graphdef, params).vocabulary.token_losses(hidden, targets, None)
    return jnp.mean(nats) + 0.1 * jnp.mean(jnp.square(log_z))


def exact_loss(tables, projections, clusters, hidden, targets):
    truth = log_probabilities(tables, projections, clusters, hidden)
    head = np.concatenate([hidden @ tables[0].T, hidden @ clusters.T], -1)
    log_z = np.log(np.exp(head).sum(-1))
    nats = -np.take_along_axis(truth, targets[..., None], -1)
    return nats.mean() + 0.1 * (log_z**2).mean()


# All at once; chunks of a few tokens, most of which need one tail or none.
@pytest.mark.parametrize("at_once", [1 << 27, 3 * VOCAB])
def test_gradients_against_float64_differences(at_once, monkeypatch):
    monkeypatch.setattr(softmax, "LOGITS_AT_ONCE", at_once)
    graphdef, params = make()
    rng = np.random.default_rng(4)
    hidden = rng.standard_normal((8, 8, 16)).astype(np.float32)
    _, targets = random_tokens()

    def loss(params, hidden):
        return vocabulary_loss(graphdef, params, hidden, targets)

    value, (grads, of_hidden) = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, hidden)
    point = [*exact(params), hidden.astype(np.float64)]
    np.testing.assert_allclose(value, exact_loss(*point, targets), rtol=1e-5)

    of_tables, of_projections, of_clusters = exact(grads)
    assert not of_projections[0].any()  # of the input alone
    pairs = [
        *zip(point[0], of_tables, strict=True),
        *zip(point[1][1:], of_projections[1:], strict=True),
        (point[2], of_clusters),
        (point[3], np.asarray(of_hidden, np.float64)),
    ]
    assert len(pairs) == 7
    for x, grad in pairs:
        for _ in range(4):  # derivatives along random directions, by central differences
            direction = rng.standard_normal(x.shape)
            step, original = 1e-5, x.copy()
            x += step * direction
            above = exact_loss(*point, targets)
            x -= 2 * step * direction
            below = exact_loss(*point, targets)
            x[...] = original
            along = (above - below) / (2 * step)
            np.testing.assert_allclose((grad * direction).sum(), along, rtol=1e-3, atol=2e-5)


def test_chunks_skip_the_tails_that_none_of_their_tokens_needs(monkeypatch):
    """Weights that are not a number poison every token of a chunk that uses them, and no other."""
    size = 8
    monkeypatch.setattr(softmax, "LOGITS_AT_ONCE", size * (VOCAB + 2))
    graphdef, params = make()
    rng = np.random.default_rng(5)
    table = params["vocabulary"]["bands"][2]["table"]
    table[...] = jnp.full_like(table[...], jnp.nan)
    hidden = rng.standard_normal((8, 8, 16)).astype(np.float32)
    targets = rng.integers(0, CUTOFFS[1], (8, 8), dtype=np.int32)
    rare = [(0, 3), (4, 1), (7, 7)]
    for index in rare:
        targets[index] = VOCAB - 1

    def loss(hidden):
        vocabulary = nnx.merge(graphdef, params).vocabulary
        return jnp.sum(vocabulary.token_losses(hidden, targets, None)[0])

    grads = np.asarray(jax.jit(jax.grad(loss))(hidden))
    poisoned = np.isnan(grads).any(-1)
    assert all(poisoned[index] for index in rare)
    assert poisoned.sum() == size


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [((8, 1, 1, 1), "bfloat16"), ((1, 4, 2, 1), "float32"), ((1, 2, 2, 2), "float32")],
)
def test_meshes_agree_with_one_device(sizes, dtype, monkeypatch):
    monkeypatch.setattr(softmax, "LOGITS_AT_ONCE", 3 * VOCAB)
    config = dataclasses.replace(CONFIG, dtype=dtype)
    graphdef, params = make(config)
    tokens, targets = random_tokens()

    def loss(params, tokens, targets):
        model = nnx.merge(graphdef, params)
        return jnp.mean(model.token_losses(tokens, targets)[0])

    run = jax.jit(jax.value_and_grad(loss))
    value, grads = run(params, tokens, targets)
    logits = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))
    with jax.set_mesh(make_mesh(MeshConfig(*sizes))):
        shapes = jax.eval_shape(lambda: nnx.state(Decoder(config, nnx.Rngs(0)), nnx.Param))
        placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding.spec), params, shapes)
        table = placed["vocabulary"]["bands"][1]["table"][...]
        assert table.addressable_shards[0].data.shape == (7, 8 // sizes[1])
        on_mesh = [jax.device_put(x, spec("batch", "length")) for x in (tokens, targets)]
        other_value, other_grads = run(placed, *on_mesh)
        other_logits = logits(placed, on_mesh[0])
    tolerance = 1e-5 if dtype == "float32" else 3e-2
    np.testing.assert_allclose(other_value, value, rtol=tolerance)
    one_device = logits(params, tokens)
    np.testing.assert_allclose(other_logits, one_device, rtol=tolerance, atol=10 * tolerance)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, np.asarray(b), atol=tolerance * max(1.0, np.abs(a).max())
        ),
        grads,
        other_grads,
    )


def test_dropout_of_the_tails_alone():
    config = dataclasses.replace(CONFIG, adaptive_dropout=0.5)
    assert config.uses_dropout and not CONFIG.uses_dropout
    graphdef, params = make(config)
    tokens, targets = random_tokens()
    run = jax.jit(lambda k: nnx.merge(graphdef, params).token_losses(tokens, targets, key=k)[0])
    plain = jax.jit(lambda: nnx.merge(graphdef, params).token_losses(tokens, targets)[0])()
    first, again, other = (np.asarray(run(jax.random.key(k))) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    frequent = targets < CUTOFFS[0]
    np.testing.assert_allclose(first[frequent], np.asarray(plain)[frequent], rtol=1e-6)
    assert (np.abs(first - other)[~frequent] > 1e-6).mean() > 0.9


def test_memory_does_not_hold_the_logits_of_all_tokens(monkeypatch):
    config = dataclasses.replace(
        CONFIG, vocab_size=3000, adaptive_cutoffs=(100, 500), embed_dim=4, mlp_dim=4
    )
    vocabulary = jax.eval_shape(lambda: AdaptiveVocabulary(config, nnx.Rngs(0)))
    graphdef, params = nnx.split(vocabulary)
    hidden = jax.ShapeDtypeStruct((32, 64, 4), jnp.float32)
    targets = jax.ShapeDtypeStruct((32, 64), jnp.int32)

    def temporaries(at_once):
        monkeypatch.setattr(softmax, "LOGITS_AT_ONCE", at_once)

        def loss(params, hidden, targets):
            return jnp.sum(nnx.merge(graphdef, params).token_losses(hidden, targets, None)[0])

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(params, hidden, targets).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    all_logits = 4 * 32 * 64 * 3000
    assert temporaries(1 << 27) > all_logits
    assert temporaries(32 * 64 * 3000 // 32) < all_logits / 4


def test_words_of_all_bands_start_alike_at_the_input():
    """Scaled by sqrt(M), as the WikiText-103 model does, they have the variance 1/sqrt(M)."""
    config = dataclasses.replace(
        CONFIG, vocab_size=3000, adaptive_cutoffs=(1000, 2000), embed_dim=256, adaptive_factor=4
    )
    tokens = jnp.arange(3000)[None]
    x = np.asarray(jax.jit(lambda: AdaptiveVocabulary(config, nnx.Rngs(0)).embed(tokens))())[0]
    for start, dim in ((0, 256), (1000, 64), (2000, 16)):
        variance = 256 * (x[start : start + 1000] ** 2).mean()
        assert 256**0.5 * variance == pytest.approx(
            2 * 256 / (256 + dim), rel=0.1
        )  # of Glorot's projection


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adaptive_cutoffs": ()}, "give one or more rising ids"),
        ({"adaptive_cutoffs": (0, 5)}, "rising ids, above 0"),
        ({"adaptive_cutoffs": (5, 5)}, "rising ids"),
        ({"adaptive_cutoffs": (5, VOCAB)}, "below vocab_size"),
        ({"adaptive_factor": 0}, "adaptive_factor=0"),
        ({"adaptive_factor": 5}, r"embed_dim=16 is not a multiple of 25.*embed_dim / 5\^2"),
        ({"adaptive_dropout": 1.0}, "adaptive_dropout=1.0"),
        ({"mlp_dropout": -0.1}, "mlp_dropout=-0.1"),
        ({"tie_embeddings": False}, "tie_embeddings=true"),
        ({"logit_scale": 2.0}, "logit_scale=1"),
    ],
)
def test_impossible_configs_say_why(changes, words):
    with pytest.raises(UserError, match=words):
        Decoder(dataclasses.replace(CONFIG, **changes), nnx.Rngs(0))


def test_the_wikitext103_vocabulary_has_the_published_parameters():
    """Those of `transformer_lm_wiki103` in fairseq: bands of 1024, 256 and 64, and 247M in all."""
    config = DecoderConfig(
        vocab_size=267_744,
        num_layers=16,
        embed_dim=1024,
        num_heads=8,
        adaptive_cutoffs=(20_000, 60_000),
        final_norm=False,
    )
    params = jax.eval_shape(lambda: nnx.state(Decoder(config, nnx.Rngs(0)), nnx.Param))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    # Rows and projections of each band, and the two clusters; then 16 layers.
    bands = sum(
        size * dim + dim * 1024 for size, dim in ((20_000, 1024), (40_000, 256), (207_744, 64))
    )
    layer = 4 * (1024**2 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024
    assert count == bands + 2 * 1024 + 16 * layer == 246_933_504
