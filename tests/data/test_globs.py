"""A glob stands for every file once, and says what it leaves out."""

import os

import pytest

from alibi_jax.data.globs import matching_files
from alibi_jax.errors import UserError


@pytest.fixture
def tree(tmp_path):
    """Gives a folder of five texts, of a hidden one and of a picture."""
    for name in ("a.txt", "b.md", "one/c.txt", "one/two/d.txt", "one/two/e.jsonl"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text", encoding="utf-8")
    (tmp_path / "tree" / ".hidden").mkdir()
    (tmp_path / "tree" / ".hidden" / "f.txt").write_text("text", encoding="utf-8")
    return tmp_path / "tree"


def names(folder, pattern):
    return [str(path.relative_to(folder)) for path in matching_files(f"{folder}/{pattern}")]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*", ["a.txt", "b.md"]),
        ("*/*", ["one/c.txt"]),
        ("**/*.txt", ["a.txt", "one/c.txt", "one/two/d.txt"]),
        ("**/two/*", ["one/two/d.txt", "one/two/e.jsonl"]),
        ("**", ["a.txt", "b.md", "one/c.txt", "one/two/d.txt", "one/two/e.jsonl"]),
        ("**/one/**/*.txt", ["one/c.txt", "one/two/d.txt"]),
        (".hidden/**/*", [".hidden/f.txt"]),
        ("[ab].*", ["a.txt", "b.md"]),
    ],
)
def test_patterns(tree, pattern, expected):
    assert names(tree, pattern) == expected


def test_links_lead_to_no_file_twice(tree):
    (tree / "loop").symlink_to(".")
    (tree / "one" / "up").symlink_to("..")
    (tree / "one" / "two" / "up").symlink_to("../..")
    (tree / "same.txt").symlink_to("a.txt")
    os.link(tree / "a.txt", tree / "too.txt")
    found = matching_files(f"{tree}/**/*")
    assert sorted(path.resolve().name for path in found)[1:] == [
        "b.md",
        "c.txt",
        "d.txt",
        "e.jsonl",
    ]
    assert len(found) == 5


def test_linked_folders_are_read(tree, tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "g.txt").write_text("text", encoding="utf-8")
    (tree / "one" / "books").symlink_to(tmp_path / "books")
    assert "one/books/g.txt" in names(tree, "**/*.txt")


def test_a_name_that_exists_is_taken_literally(tree):
    folder = tree / "run [lr=1e-3]"
    folder.mkdir()
    for name in ("a[1].txt", "a1.txt"):
        (folder / name).write_text("text", encoding="utf-8")
    assert names(folder, "*.txt") == ["a1.txt", "a[1].txt"]
    assert names(folder, "a[1].txt") == ["a[1].txt"]
    assert names(tree, "run [lr=1e-3]/**/*") == ["run [lr=1e-3]/a1.txt", "run [lr=1e-3]/a[1].txt"]


def test_a_pipe_is_refused_and_not_waited_for(tree):
    os.mkfifo(tree / "pipe.txt")
    with pytest.raises(UserError, match=r"pipe\.txt is a pipe or device; make the glob match"):
        matching_files(f"{tree}/*.txt")


def test_what_is_left_out_is_named(tree, caplog):
    for name in ("a.pdf", "b.pdf", "LICENSE"):
        (tree / name).write_bytes(b"")
    assert names(tree, "*") == ["a.txt", "b.md"]
    assert "left out, as no text: 3 files (2 .pdf, 1 LICENSE)" in caplog.text


def test_text_that_is_packed_otherwise_is_refused(tree):
    for i in range(3):
        (tree / f"{i}.jsonl.bz2").write_bytes(b"")
    with pytest.raises(UserError, match=r"matches 3 \.bz2 such as 0\.jsonl\.bz2.*narrow the glob"):
        matching_files(f"{tree}/*")
