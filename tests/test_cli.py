"""What all commands share: their flags, what they print, and the backend and paths they ask for."""

import io
import os
import subprocess
import sys

import jax
import pytest

from alibi_jax import backend, cli
from alibi_jax.errors import UserError
from alibi_jax.files import check_writable, given_path


def test_a_flag_given_twice_is_told(capsys):
    """As with argparse the last counts, so that a script can end in "$@"."""
    flags = cli.parse_flags(["--a=1", "--b", "2", "--a=3"], ("--a", "--b"))
    assert flags == {"--a": "3", "--b": "2"}
    assert capsys.readouterr().err == "note: --a is given twice: 3, the last, counts\n"


def test_what_a_stream_cannot_encode_is_escaped(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    cli.print_anything()
    print("1 × cpu →", os.fsdecode(b"\xe9"), flush=True)
    assert written.getvalue() == b"1 \\xd7 cpu \\u2192 \\udce9\n"


def test_nobody_reads():
    """As of `alibi | head`: no traceback, no message, and what a shell gives for SIGPIPE."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "alibi_jax"], stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_no_backend(monkeypatch):
    assert backend.device_count() == 8

    def device_count():
        assert None is not None  # as JAX does without the plugin of JAX_PLATFORMS=cuda

    monkeypatch.setattr(jax, "device_count", device_count)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(UserError, match=r"no device for JAX_PLATFORMS=cuda .*\.\[cuda\]"):
        backend.device_count()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("RESOURCE_EXHAUSTED: Allocation failure", True),
        ("INTERNAL: Error dispatching computation: Out of memory allocating 9 bytes.", True),
        ("INTERNAL: no such kernel", False),
    ],
)
def test_out_of_memory(text, expected):
    assert backend.is_out_of_memory(jax.errors.JaxRuntimeError(text)) == expected


def test_given_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert given_path("--workdir", "~/a:b [c]") == tmp_path / "a:b [c]"
    for text, words in (("~no-such-user/x", "no such home folder"), ("s3://b/x", "is an address")):
        with pytest.raises(UserError, match=words):
            given_path("--workdir", text)


def test_outputs_are_tried_before_the_work(tmp_path):
    kept = tmp_path / "kept.json"
    kept.write_text("kept")
    check_writable("--json", kept)
    check_writable("--json", tmp_path / "new.json")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]
    assert kept.read_text() == "kept"
    for path in (tmp_path, tmp_path / "none" / "x", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match=r"--json=.* cannot be written \(.*choose another"):
            check_writable("--json", path)
    with pytest.raises(UserError, match="No such file or directory"):
        check_writable("--json", given_path("--json", "/proc/x"))
