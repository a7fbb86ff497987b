"""How many programs are compiled."""

import contextlib

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations():
    """Give a function that says how many programs have been compiled in the block so far."""
    names = []

    def listen(name, *_, **__):
        names.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield lambda: names.count(COMPILED)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
