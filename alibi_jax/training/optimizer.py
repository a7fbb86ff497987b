"""The optimizers with a schedule, clipping, and weight decay where it belongs."""

import jax
import jax.numpy as jnp
import optax

from alibi_jax.config import OptimizerConfig

# Biases, parameters of norms, and what a position method learns: slopes and the like, which have a
# meaning of their own at 0.
NOT_DECAYED = ("bias", "scale", "position")


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then the configured schedule to the last step.

    "wsd" is that of MiniCPM (arXiv:2404.06395) with the decay that Hägele et al. (arXiv:2405.18392)
    found best, 1 - sqrt.
    """
    peak, end = config.learning_rate, config.learning_rate * config.final_fraction
    rest = max(num_steps - config.warmup_steps, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction),
        "linear": optax.linear_schedule(peak, end, rest),
        "constant": optax.constant_schedule(peak),
        "wsd": optax.constant_schedule(peak),
    }[config.schedule]
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    schedules, boundaries = [warmup, after], [config.warmup_steps]
    if (start := config.decay_start(num_steps)) is not None:

        def decay(count: jax.typing.ArrayLike) -> jax.Array:
            done = jnp.clip(count / (num_steps - start), 0.0, 1.0)
            return peak + (end - peak) * jnp.sqrt(done)

        schedules, boundaries = [*schedules, decay], [*boundaries, start]
    return optax.join_schedules(schedules, boundaries)


def decay_mask(params):
    """True for each parameter that weight decay applies to: matrices, not norms, biases, positions.

    By name: parameters of stacked layers have an extra axis, so their rank says nothing.
    """

    def decayed(path, _) -> bool:
        return not any(getattr(key, "key", None) in NOT_DECAYED for key in path)

    return jax.tree.map_with_path(decayed, params)


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then the optimizer that the config names.

    "nag" is Nesterov's accelerated gradient as fairseq has it: the same steps, though fairseq keeps
    a velocity (minus the learning rate times the trace of gradients that optax keeps) and rescales
    it whenever the learning rate changes.

    Raises:
      UserError: the config cannot train.
    """
    config.validate()
    schedule = learning_rate_schedule(config, num_steps)
    clip = optax.clip_by_global_norm(config.clip_norm)
    if config.name == "nag":
        return optax.chain(
            clip,
            optax.trace(decay=config.beta1, nesterov=True),
            optax.add_decayed_weights(config.weight_decay, decay_mask),
            optax.scale_by_learning_rate(schedule),
        )
    return optax.chain(
        clip,
        optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )
