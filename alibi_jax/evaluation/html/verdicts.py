"""The first section of a report: to which length a loss holds, context helps, text is found."""

from collections.abc import Mapping, Sequence
from typing import Any

from alibi_jax.evaluation.compare_table import findings
from alibi_jax.evaluation.html.losses import MISSING
from alibi_jax.evaluation.html.read import Comparison, Run
from alibi_jax.evaluation.html.tags import Cell, Html, join, lines, table, tag
from alibi_jax.evaluation.tables import scored


def verdicts(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> Html:
    """What a person who deploys a model wants to know first."""
    cards = [_card(run) for run in runs]
    return join([*(_methods(c) for c in comparisons), tag("div", *cards, class_="cards")])


def _card(run: Run) -> Html:
    heading = tag("h3", run.name)
    about = []
    if run.config:
        about.append(run.config["model"]["position"])
    if run.evaluation is None:
        return tag(
            "article",
            heading,
            tag("p", *about, class_="about"),
            tag("p", "Not evaluated yet: training goes on, or was stopped before its end."),
            class_="card",
        )
    verdict = run.evaluation["verdict"]
    about.append(f"trained at {run.evaluation['train_length']} tokens")
    findings = [
        tag("div", tag("dt", label), _length(verdict, name))
        for name, label in (
            ("holds_to", "holds to"),
            ("uses_context_to", "uses context to"),
            ("retrieves_to", "retrieves to"),
        )
    ]
    parts = [
        heading,
        tag("p", ", ".join(about), class_="about"),
        tag("dl", *findings),
        tag("p", verdict["text"]),
    ]
    if verdict.get("details"):
        parts.append(tag("p", verdict["details"]))
    if verdict.get("warning"):
        parts.append(tag("p", tag("strong", "Warning: "), verdict["warning"], class_="warning"))
    parts.append(tag("p", tag("small", scored(run.evaluation))))
    return tag("article", *parts, class_="card")


def _length(verdict: Mapping[str, Any], name: str) -> Html:
    """A length of the verdict, with its interval and its protocol in small print."""
    value, interval = verdict.get(name), verdict.get(f"{name}_interval")
    if value is None:
        judged = verdict.get("learned") is not False or name == "retrieves_to"
        return tag("dd", MISSING if judged else "no verdict", class_="unknown")
    protocol = verdict.get(f"{name}_protocol", "fixed_targets")
    how = lines(
        f"[{interval[0]:,}, {interval[1]:,}]" if interval else "", protocol.replace("_", " ")
    )
    return tag("dd", f"{value:,} tokens" if value else "no length", tag("small", how))


def _methods(comparison: Comparison) -> Html:
    """The methods of a comparison: who leads, what holds, and what is missing."""
    numbers = comparison.numbers
    seeds = len(numbers["seeds"])
    parts = [tag("h3", comparison.name)]
    if numbers.get("missing"):
        names = ", ".join(f"{run['method']} seed {run['seed']}" for run in numbers["missing"])
        partial = f"{len(numbers['missing'])} of {numbers['num_runs']} runs are missing: {names}."
        parts.append(tag("p", tag("strong", "Partial: "), partial, class_="warning"))
    for method in numbers["methods"]:
        for run in method["runs"]:
            if run["status"] != "finished":
                what = f"{method['name']} seed {run['seed']} {run['status']}: {run['message']}"
                parts.append(tag("p", tag("strong", "Not finished: "), what, class_="warning"))
    sentences = [tag("li", sentence) for sentence in findings(numbers)]
    if sentences:
        parts.append(tag("ul", *sentences))
    rows = []
    for method in numbers["methods"]:
        finished = sum(run["status"] == "finished" for run in method["runs"])
        verdict = method["verdict"]
        rows.append(
            [
                method["name"],
                f"{finished} of {seeds}",
                _holds_to(verdict),
                Cell(verdict["text"] if verdict else "", "prose"),
            ]
        )
    header = ["method", "seeds", "holds to (tokens)", Cell("verdict, on fixed targets", "prose")]
    parts.append(table(f"Verdicts of {comparison.name}", header, rows))
    said = [_said(run) for run in comparison.runs if run.evaluation is not None]
    if said:
        parts.append(tag("details", tag("summary", "Verdicts of the runs"), tag("ul", *said)))
    return join(parts)


def _holds_to(verdict: Mapping[str, Any] | None) -> str:
    """Tokens to which a method of a comparison holds."""
    if verdict is None:
        return "no run has finished"
    return "no verdict" if verdict["holds_to"] is None else f"{verdict['holds_to']:,}"


def _said(run: Run) -> Html:
    """The verdict on one run of a comparison."""
    assert run.evaluation is not None
    verdict = run.evaluation["verdict"]
    warning = [tag("strong", " Warning: "), verdict["warning"]] if verdict.get("warning") else []
    return tag("li", tag("strong", run.name), ": ", verdict["text"], *warning)
