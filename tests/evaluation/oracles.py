"""Models whose use of context is known, as the functions of tokens that the protocols ask for."""

import numpy as np

from alibi_jax.evaluation.assess import Scorer

HEADS, LAYERS = 2, 3
SLOPES = np.array([0.5, 1 / 64])


def position(tokens):
    """Tokens of context of each target, [1, L], from 1."""
    return np.arange(1, tokens.shape[1], dtype=np.float64)[None]


def base(tokens):
    """Cost between 2 and 3 nats, set by the target alone."""
    return 2 + (tokens[:, 1:] % 50) / 50


def uses(reach):
    """A loss that falls by a twentieth nat with every doubling of context, up to `reach` keys."""

    def losses(tokens, window):
        seen = np.minimum(position(tokens), reach)
        if window is not None:
            seen = np.minimum(seen, window)
        return base(tokens) - 0.05 * np.log2(seen)

    return losses


def layers_of(window_of_each, num_layers=2):
    """`uses` by layers that each see their nearest keys, and what those saw in the layer below."""

    def losses(tokens, window):
        keys = window_of_each if window is None else min(window, window_of_each)
        return uses(num_layers * (keys - 1) + 1)(tokens, None)

    return losses


def explodes(trained, rate=0.5):
    """A loss that rises with the log of the position beyond the trained length, as sinusoids do.

    A window is no help: it is the position itself that was never seen.
    """

    def losses(tokens, window):
        return base(tokens) + rate * np.log2(np.maximum(1, position(tokens) / trained))

    return losses


def copies(reach, vocab_size=257, context=3):
    """Logits for the token that followed the last `context` tokens where they stood before.

    It finds only what it would copy from within `reach` tokens back; else all logits are 0.
    """

    def logits(tokens, count):
        rows, length = tokens.shape
        result = np.zeros((rows, count, vocab_size), np.float32)
        for row in range(rows):
            for index in range(count):
                end = length - count + index + 1  # the query sees tokens[:end]
                seen = tokens[row, max(0, end - 1 - reach) : end]
                parts = np.lib.stride_tricks.sliding_window_view(seen, context)
                (places,) = np.nonzero((parts[:-1] == parts[-1]).all(axis=1))
                if len(places):
                    result[row, index, seen[places[-1] + context]] = 1
        return result

    return logits


def remembers_pairs(reach, vocab_size=257):
    """Logits for the token that followed the last token where it first stood, within `reach`.

    The first of all tokens is no key.
    """

    def logits(tokens, count):
        rows, length = tokens.shape
        result = np.zeros((rows, count, vocab_size), np.float32)
        for row in range(rows):
            for index in range(count):
                end = length - count + index
                seen = tokens[row, max(1, end - reach) : end]
                (places,) = np.nonzero(seen[:-1] == tokens[row, end])
                if len(places):
                    result[row, index, seen[places[0] + 1]] = 1
        return result

    return logits


def geometric_mass(slopes, sink=False):
    """Attention that the bias alone makes: probability exp(-slope d) up to a factor.

    A sink, the first key, has that of distance 0.
    """

    def mass(tokens, edges, num_queries):
        distance = np.arange(tokens.shape[1])
        weight = np.exp(-slopes[:, None] * distance)
        if sink:
            weight[:, -1] = 1
        weight = weight / weight.sum(axis=1, keepdims=True)
        bounds = [0, *edges, tokens.shape[1]]
        bins = np.add.reduceat(weight, bounds[:-1], axis=1)
        return np.broadcast_to(bins, (LAYERS, len(tokens), *bins.shape))

    return mass


def scorer(losses=None, logits=None, sink=False):
    """A model of such parts; by default it uses 64 tokens and copies from anywhere."""
    return Scorer(
        losses or uses(64),
        logits or copies(10**9),
        geometric_mass(SLOPES, sink),
        lambda length: SLOPES,
        sink,
    )
