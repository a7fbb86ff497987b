"""Write one HTML page about runs and comparisons: verdicts, figures, tables, settings, versions.

  alibi report DIR... [--output=FILE.html]

DIR       the --workdir of train.py, or of `alibi compare`; several are shown side by side. Of a run
          the page takes evaluation.json (from `alibi eval`) or else extrapolation.json,
          config.json and metrics.jsonl, of a comparison comparison.json and its runs. It says what
          is missing.
--output  the page, report.html in the first DIR unless given; one that exists is replaced

The page holds all that it shows: it can be sent, archived and opened without a network.
"""

from collections.abc import Sequence
from pathlib import Path

from alibi_jax.cli import parse_flags
from alibi_jax.errors import UserError, require
from alibi_jax.evaluation.html import details, losses
from alibi_jax.evaluation.html.read import Comparison, Run, read
from alibi_jax.evaluation.html.tags import Html, join, tag
from alibi_jax.evaluation.html.verdicts import verdicts
from alibi_jax.files import check_writable, given_path, write_text

# Nothing may be fetched or run, whatever a config or a name holds.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def main(arguments: list[str]) -> int:
    """Exit code: 0 done. Raises UserError for bad input, and has then written nothing."""
    directories, flags = _parse(arguments)
    require(bool(directories), "no DIR is given: name one or more, as in `alibi report runs/mine`")
    output = directories[0] / "report.html"
    if "--output" in flags:
        output = given_path("--output", flags["--output"])
        require(
            output.suffix.lower() in (".html", ".htm"),
            f"--output={output}: the report is an HTML page: give a name that ends in .html (a "
            "browser prints it to PDF)",
        )
        check_writable("--output", output)
    try:
        whole = page(*read(directories))
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{', '.join(map(str, directories))}: a file there has a form that this version does "
            f"not know ({type(error).__name__}: {error}); evaluate again, or use the version that "
            "wrote it"
        ) from error
    try:
        write_text(output, whole)
    except OSError as error:
        raise UserError(f"--output={output} cannot be written: {error}") from error
    print(output)
    return 0


def _parse(arguments: Sequence[str]) -> tuple[list[Path], dict[str, str]]:
    """Tell directories from flags."""
    directories, flags, words = [], [], list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            directories.append(given_path("DIR", word))
            continue
        flags.append(word)
        if "=" not in word and words:
            flags.append(words.pop(0))
    return directories, parse_flags(flags, ("--output",))


def page(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> Html:
    """The whole page.

    Args:
        runs: Runs that were named one by one.
        comparisons: Comparisons, with runs of their own.

    Returns:
        A document that needs nothing beside it.
    """
    everything = [*runs, *(run for comparison in comparisons for run in comparison.runs)]
    style = losses.styles(runs, comparisons)
    of_seeds = [part for c in comparisons if (part := details.seeds(c)) is not None]
    parts = {
        "Verdict": verdicts(runs, comparisons),
        "Loss beyond the training length": losses.losses(
            losses.series_of(runs, comparisons, style)
        ),
        "Seeds": join(of_seeds) if of_seeds else None,
        "Loss by position": losses.positions(everything, style),
        "Where more context stops helping": losses.truncation(everything, style),
        "Retrieval": details.retrieval(everything, style),
        "Attention by distance": details.attention(everything),
        "Training": losses.training(everything, style),
        "Cost": details.cost(runs, comparisons),
        "Settings": details.configs(details.configs_of(runs, comparisons)),
        "Versions": details.versions(runs, comparisons),
        "What is missing": details.missing(everything),
    }
    present = {title: part for title, part in parts.items() if part is not None}
    names = ", ".join([run.name for run in runs] + [c.name for c in comparisons])
    links = [tag("li", tag("a", title, href=f"#{_anchor(title)}")) for title in present]
    body = [
        tag("header", tag("h1", "Train short, test long"), tag("p", names)),
        tag("nav", tag("ul", *links), aria_label="sections"),
        tag("main", *(_section(title, part) for title, part in present.items())),
    ]
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{names} – alibi report"),
        tag("style", Html(Path(__file__).with_name("style.css").read_text("utf-8"))),
    ]
    document = tag("html", tag("head", *head), tag("body", *body), lang="en")
    return Html(f"<!DOCTYPE html>\n{document}\n")


def _section(title: str, part: Html) -> Html:
    return tag("section", tag("h2", title), part, id=_anchor(title))


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")
