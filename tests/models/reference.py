"""The decoder in float64 numpy, written from the papers, one sequence and one head at a time."""

import importlib.util
import math
from pathlib import Path

import numpy as np


def load(name):
    """A module of this folder."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


formulas = load("position_formulas")

ERF = np.vectorize(math.erf)
ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + ERF(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
}


def norm(config, params, x, axes=(-1,)):
    if config.norm == "layernorm":
        x = x - x.mean(axes, keepdims=True)
    x = x / np.sqrt((x**2).mean(axes, keepdims=True) + config.norm_eps) * params["scale"]
    return x + params.get("bias", 0.0)


def linear(params, x, num_inputs=1):
    return np.tensordot(x, params["kernel"], num_inputs) + params.get("bias", 0.0)


def slopes(config):
    if config.slopes is not None:
        return config.slope_scale * np.array(config.slopes)
    assert config.num_heads & (config.num_heads - 1) == 0, "powers of two only"
    heads = np.arange(1, config.num_heads + 1)
    return config.slope_scale * 2.0 ** (-config.bias_max * heads / config.num_heads)


def bias(config, params, own, x, head, i):
    """Bias f64[i + 1] of query i; `params` are the model's, `own` those of the layer's method."""
    distance = i - np.arange(i + 1)
    of_heads = {name: np.asarray(value)[head] for name, value in own.items() if np.ndim(value)}
    shared = params.get("position", {})
    match config.position:
        case "alibi":
            slope = np.exp(of_heads["log_slopes"]) if own else slopes(config)[head]
            return -slope * (np.where(distance == i, 0, distance) if config.sink else distance)
        case "t5":
            return shared["table"][head, [formulas.t5_bucket(d) for d in distance]]
        case "kerple_log":
            p, a = (np.exp(shared[name][head]) for name in ("log_p", "log_a"))
            return formulas.kerple_log(p, a, distance, config.head_size)
        case "kerple_power":
            p, a = 2 / (1 + np.exp(-shared["logit_p"][head])), np.exp(shared["log_a"][head])
            return formulas.kerple_power(p, a, distance, config.head_size)
        case "bam":
            return formulas.bam(np.exp(of_heads["log_scale"]), of_heads["exponent"], distance)
        case "fire":
            mlp = own | {"out": own["out"][head], "out_shift": own["out_shift"][head]}
            limit = 512 * abs(own["multiplier"])
            return formulas.fire(abs(own["c"]), limit, mlp, distance, i)
        case "forgetting":
            gates = 1 / (1 + np.exp(-linear(own, x)[:, head]))
            return np.array([formulas.forgetting(gates, i, j) for j in range(i + 1)])
    return np.zeros(i + 1)


def attention(config, model, params, x, segments):
    query, key, value = (linear(params[name], x) for name in ("query", "key", "value"))
    if config.clip_qkv is not None:
        limit = config.clip_qkv
        query, key, value = (y.clip(-limit, limit) for y in (query, key, value))
    if config.qk_norm is not None:
        axes = (-1,) if config.qk_norm == "per_head" else (-2, -1)
        query = norm(config, params["query_norm"], query, axes)
        key = norm(config, params["key_norm"], key, axes)
    if config.position == "rotary":
        frequencies = formulas.rotary_frequencies(config.head_size)
        position = np.arange(len(x))[:, None, None]
        query, key = (formulas.rotated(y, position, frequencies) for y in (query, key))
    scale = config.head_size**-0.5 if config.attention_scale is None else config.attention_scale
    mixed = np.zeros_like(query)
    own = params.get("position", {})
    for head in range(config.num_heads):
        kv_head = head * config.kv_heads // config.num_heads
        for i in range(len(x)):
            seen = [j for j in range(i + 1) if segments[j] == segments[i]]
            logits = scale * key[seen, kv_head] @ query[i, head]
            logits += bias(config, model, own, x, head, i)[seen]
            weights = np.exp(logits - logits.max())
            mixed[i, head] = weights / weights.sum() @ value[seen, kv_head]
    return linear(params["out"], mixed, 2)


def mlp(config, params, x):
    activation = ACTIVATIONS[config.activation]
    up = linear(params["up"], x)
    hidden = activation(linear(params["gate"], x)) * up if config.gated_mlp else activation(up)
    return linear(params["down"], hidden)


def decoder(config, params, tokens, segments=None):
    """Logits float64[T, V] of tokens [T]."""
    segments = np.zeros(len(tokens)) if segments is None else segments
    x = config.embed_scale * params["embedding"][tokens]
    if config.position == "sinusoidal":
        half = config.embed_dim // 2
        angles = np.arange(len(tokens))[:, None] / 10_000 ** (np.arange(half) / half)
        x = x + np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    if config.position == "learned":
        last = config.trained_length - 1
        x = x + params["position"]["table"][np.minimum(np.arange(len(tokens)), last)]
    if config.embed_norm:
        x = norm(config, params["embed_norm"], x)
    for i in range(config.num_layers):
        block = layer(params["blocks"], i)
        x = x + attention(
            config, params, block["attention"], norm(config, block["attention_norm"], x), segments
        )
        x = x + mlp(config, block["mlp"], norm(config, block["mlp_norm"], x))
    x = norm(config, params["final_norm"], x)
    head = params["embedding"] if config.tie_embeddings else params["head"]
    return config.logit_scale * x @ head.T


def layer(params, i):
    if isinstance(params, dict):
        return {name: layer(value, i) for name, value in params.items()}
    return params[i]
