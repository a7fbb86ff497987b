"""A real decoder behind the protocols: chunks change nothing, and truncation is found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from alibi_jax.bias import slopes
from alibi_jax.evaluation import Windows
from alibi_jax.evaluation.bootstrap import resamples
from alibi_jax.evaluation.judgement import enough
from alibi_jax.evaluation.model import chunk_length, make_scorer, slopes_of
from alibi_jax.evaluation.protocols import (
    sliding_losses,
    truncated_losses,
    truncation_windows,
)
from alibi_jax.models import Decoder, DecoderConfig


def decoder_of(position, num_layers=2, **fields):
    config = DecoderConfig(
        vocab_size=32,
        num_layers=num_layers,
        embed_dim=16,
        num_heads=2,
        position=position,
        scan_layers=False,
        **fields,
    )
    return Decoder(config, nnx.Rngs(0))


@pytest.mark.parametrize("position", ["alibi", "forgetting"])
def test_chunks_give_what_one_pass_gives(position):
    decoder = decoder_of(position)
    tokens = np.random.default_rng(0).integers(0, 32, (2, 97)).astype(np.int32)
    whole, chunked = make_scorer(decoder, 96), make_scorer(decoder, 40)
    assert chunk_length(96, 40) == 32
    expected = whole.losses(tokens, 20)
    assert expected.shape == (2, 96)
    np.testing.assert_allclose(chunked.losses(tokens, 20), expected, atol=2e-5)
    # 40 logits come from two chunks.
    expected = whole.logits(tokens[:, :-1], 40)
    assert expected.shape == (2, 40, 32)
    np.testing.assert_allclose(chunked.logits(tokens[:, :-1], 40), expected, atol=2e-5)


def test_losses_and_logits_are_the_models_own():
    decoder = decoder_of("sinusoidal")
    tokens = np.random.default_rng(0).integers(0, 32, (2, 17)).astype(np.int32)
    scorer, logits = make_scorer(decoder, 16), decoder(jnp.asarray(tokens[:, :-1]))
    np.testing.assert_allclose(scorer.logits(tokens[:, :-1], 5), logits[:, -5:], atol=2e-5)
    nats = -jax.nn.log_softmax(logits)[jnp.arange(2)[:, None], jnp.arange(16)[None], tokens[:, 1:]]
    np.testing.assert_allclose(scorer.losses(tokens, None), nats, atol=2e-5)


def test_a_chunk_divides_its_row():
    assert [chunk_length(n, 64) for n in (64, 65, 96, 128, 640, 17)] == [64, 13, 48, 64, 64, 17]


def test_slopes_are_those_of_the_layers():
    np.testing.assert_array_equal(slopes_of(decoder_of("alibi"), 64), np.tile(slopes(2), (2, 1)))
    assert slopes_of(decoder_of("rotary"), 64) is None
    some = slopes_of(decoder_of("alibi", alibi_heads=1, sink=True), 64)
    np.testing.assert_array_equal(some, [[slopes(1)[0], 0]] * 2)
    assert make_scorer(decoder_of("alibi", sink=True), 64).sink
    assert not make_scorer(decoder_of("alibi"), 64).sink
    dynamic = decoder_of("alibi", length_scaling="dynamic", trained_length=16)
    np.testing.assert_allclose(slopes_of(dynamic, 64), np.tile(slopes(2) / 4, (2, 1)), rtol=1e-6)


def test_attention_mass_of_a_decoder_that_reads_nothing_is_that_of_its_slopes():
    decoder = decoder_of("alibi")
    decoder.blocks.attention.query.kernel[...] *= 0.0
    scorer = make_scorer(decoder, 64)
    mass = np.asarray(scorer.attention_mass(np.zeros((3, 64), np.int32), (1, 2, 8), 1))
    assert mass.shape == (2, 3, 2, 4)
    weight = np.exp(-np.outer(slopes(2), np.arange(64)))
    bins = np.add.reduceat(weight / weight.sum(axis=1, keepdims=True), [0, 1, 2, 8], axis=1)
    np.testing.assert_allclose(mass, np.broadcast_to(bins, mass.shape), atol=1e-6)


@pytest.fixture(scope="module", params=[(1, 64), (2, 32)])
def sampled(request):
    """A decoder, and text drawn from it while its layers see only so many of the nearest keys.

    No model has a lower expected loss on this text than the one that it is from (Gibbs).
    """
    num_layers, reach = request.param
    decoder = decoder_of("none", num_layers=num_layers, logit_scale=8.0)
    decoder.blocks.attention.out.kernel[...] *= 8.0

    @jax.jit
    def draw(tokens, index, key):
        hidden = decoder.hidden(tokens, window=reach)
        last = jax.lax.dynamic_slice_in_dim(hidden, index - 1, 1, axis=1)
        drawn = jax.random.categorical(key, decoder.logits(last)[:, 0])
        return jax.lax.dynamic_update_slice(tokens, drawn.astype(jnp.int32)[:, None], (0, index))

    tokens = jnp.zeros((12, 129), jnp.int32)
    for index in range(1, 129):
        tokens = draw(tokens, index, jax.random.fold_in(jax.random.key(0), index))
    tokens = np.asarray(tokens)
    windows = Windows(tokens, np.arange(12), "document", np.ones_like(tokens))
    return num_layers, reach, make_scorer(decoder, 512).losses, windows


SCORED = {"num_targets": 64, "tokens_per_batch": 4096, "progress": lambda count: None}


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_decoder_is_found_to_use_what_its_text_was_made_of(sampled, wrapped):
    num_layers, reach, losses, windows = sampled

    def truncated(tokens, window):
        """The decoder, truncated on purpose."""
        return losses(tokens, min(window or reach, reach))

    counts = resamples(12, 200)
    of_layers = {
        window or 128: truncated_losses(truncated if wrapped else losses, windows, window, **SCORED)
        for window in truncation_windows(128)
    }
    assert list(of_layers) == [32, 64, 128]
    use = enough("layer_window", of_layers, windows.document, counts)
    assert use == {"layer_window": reach, "layer_window_interval": [reach, reach]}
    if not wrapped or num_layers == 1:
        return
    np.testing.assert_array_equal(of_layers[32], of_layers[128])
    # Two layers see 2 * 31 + 1 tokens, although neither sees more than 32.
    of_input = {
        length: sliding_losses(
            lambda tokens: truncated(tokens, None), windows, length, stride=stride, **SCORED
        )
        for length, stride in ((32, 1), (64, 1), (128, 64))  # all of C tokens for every target
    }
    use = enough("uses_context_to", of_input, windows.document, counts)
    assert use == {"uses_context_to": 64, "uses_context_to_interval": [64, 64]}
