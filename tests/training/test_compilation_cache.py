"""What is compiled once is read back by whoever compiles it next, in the run's directory."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from alibi_jax.training import compilation_cache

OPTION = "jax_compilation_cache_dir"


@pytest.fixture
def hits():
    """The cache's events, with a cache that keeps everything; all is put back at the end."""
    names = (OPTION, "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    events = []

    def listen(event, **_):
        if event in ("/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"):
            events.append(event.rpartition("_")[2])

    jax_cache.reset_cache()
    jax.config.update(OPTION, None)
    jax.config.update(names[1], 0.0)
    jax.monitoring.register_event_listener(listen)
    yield events
    jax.monitoring.unregister_event_listener(listen)
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


def compile_anew():
    """Compiles what a process that knows nothing of it would."""
    compiled = jax.jit(lambda x: jnp.sin(x) + 2.0).lower(jnp.ones(3)).compile()
    assert float(compiled(jnp.zeros(3))[0]) == 2.0


def test_off_on_a_cpu(tmp_path, hits):
    compilation_cache.use(tmp_path)
    compile_anew()
    assert compilation_cache.directory() is None
    assert hits == [] and list(tmp_path.iterdir()) == []


def test_a_resumed_run_compiles_nothing(tmp_path, hits, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    jnp.ones(3)  # compiled before the cache is on
    compilation_cache.use(tmp_path)
    compile_anew()
    folder = tmp_path / "compiled"
    assert compilation_cache.directory() == str(folder)
    entries = [path for path in folder.iterdir() if path.name.endswith("-cache")]
    assert entries and "misses" in hits and "hits" not in hits
    hits.clear()
    compile_anew()
    assert hits == ["hits"]

    # An entry that a killed process left half written costs a compilation and no more.
    for path in entries:
        path.write_bytes(path.read_bytes()[:20])
    hits.clear()
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
        compile_anew()
    assert "hits" not in hits


def test_the_user_chooses_the_place(tmp_path, hits, monkeypatch):
    given = tmp_path / "given"
    jax.config.update(OPTION, str(given))  # as JAX_COMPILATION_CACHE_DIR does
    compilation_cache.use(tmp_path / "run")
    compile_anew()
    assert compilation_cache.directory() == str(given) and list(given.iterdir())
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    compilation_cache.use(tmp_path / "run")
    assert compilation_cache.directory() == str(given) and not (tmp_path / "run").exists()
