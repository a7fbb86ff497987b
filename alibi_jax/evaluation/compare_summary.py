"""From the runs of a comparison that ended to the numbers of `comparison.json`."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alibi_jax.errors import require
from alibi_jax.evaluation.bootstrap import interval, resamples
from alibi_jax.evaluation.compare_statistics import estimate, p_value, t_interval
from alibi_jax.evaluation.protocols import SHORTEST_WINDOW
from alibi_jax.evaluation.report import finite, perplexity
from alibi_jax.evaluation.verdict import TOLERANCE, not_finite, percent, why_none

PROTOCOLS = ("nonoverlapping", "fixed_targets")
# What each number of an entry is; kept in the file and written under the table.
MEANINGS = {
    "nats_per_token": "mean over seeds",
    "interval": "95%, Student's t over seeds with n - 1 degrees of freedom; none with one seed",
    "document_interval": "95%, bootstrap over held-out documents of the mean over the "
    "seeds that were trained; it says nothing about other seeds",
    "difference": "mean over seeds of the method minus the reference (a leader: minus the next), "
    "nats per token, paired: equal seeds (so equal initial parameters and order of the data) and "
    "the same tokens",
    "p_value": "two-sided, paired t test over seeds; not corrected for the number of methods, nor "
    "for the choice of a leader",
    "floors": "n-grams of the training text on the same tokens",
    "relative_change": "of a seed's loss against its own at the training length, mean over seeds; "
    "its interval is Student's t over seeds, its document_interval as above",
}
# The intervals of a change: other seeds, or other documents, might say otherwise.
_INTERVALS = {
    "seeds": "relative_change_interval",
    "documents": "relative_change_document_interval",
}


class Run(NamedTuple):
    """One run that ended."""

    status: str  # "finished", "diverged" or "out of memory"
    message: str | None  # what happened, unless it finished
    evaluation: Mapping[str, Any] | None  # what the evaluation of a finished run wrote
    seconds_per_step: float | None
    memory_bytes: int | None
    parameters: int
    seconds_per_step_range: list[float] | None = None  # of 80% of the steps; earlier: not known


def summarize(
    methods: Sequence[str], seeds: Sequence[int], runs: Mapping[tuple[str, int], Run]
) -> dict[str, Any]:
    """Reduces runs to what the table and the figure show.

    Args:
      methods: names of all methods, as asked for. The reference is "alibi", or else the first.
      seeds: of all runs of a method.
      runs: those that ended so far, by method and seed.

    Returns:
      What `comparison.json` holds, without "config" and "versions"; every number is finite or None.

    Raises:
      UserError: the runs were not evaluated on the same tokens after as many steps.
    """
    finished = {key: run.evaluation for key, run in runs.items() if run.evaluation is not None}
    evaluations = list(finished.values())
    reference = "alibi" if "alibi" in methods else methods[0]
    summary: dict[str, Any] = {
        "reference": reference,
        "seeds": list(seeds),
        "num_runs": len(methods) * len(seeds),
        "num_finished": len(finished),
        "missing": [
            {"method": method, "seed": seed}
            for seed, method in itertools.product(seeds, methods)
            if (method, seed) not in runs
        ],
        "lengths": [],
        "left_out": sorted({line for one in evaluations for line in one["left_out"]}),
        "meanings": MEANINGS,
    }
    counts = np.zeros((0, 0))
    if evaluations:
        summary |= _shared(evaluations) | {"floors": _floors(evaluations)}
        summary |= {name: evaluations[0][name] for name in ("num_copies", "training_overlap")}
        num_bootstrap = evaluations[0]["config"]["evaluation"]["num_bootstrap"]
        counts = resamples(summary["num_documents"], num_bootstrap)
    scores = {key: _Scores(evaluation) for key, evaluation in finished.items()}
    summary["methods"] = [
        _method(method, reference, seeds, runs, scores, counts) for method in methods
    ]
    ends = sorted({0, len(summary["lengths"]) - 1}) if evaluations else []
    leaders = [_leader(summary["methods"], index, scores, counts) for index in ends]
    summary["leaders"] = [leader for leader in leaders if leader is not None]
    return summary


def _shared(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all evaluations have in common; raises UserError if they are not of the same tokens."""
    names = ["train_length", "num_windows", "num_documents", "unit", "num_targets"]
    names += ["bytes_per_token", "unknown_bytes", "word_level"]
    names += ["windows_per_document", "tokens_sha256", "step"]

    def of(evaluation: Mapping[str, Any]) -> dict[str, Any]:
        lengths = [entry["length"] for entry in evaluation["protocols"]["fixed_targets"]]
        split = evaluation["config"]["evaluation"]["split"]
        known = {name: evaluation.get(name) for name in names}
        return {"lengths": lengths, "split": split} | known

    first, *others = map(of, evaluations)
    differing = [
        name
        for name, value in first.items()
        if value is None or any(other[name] != value for other in others)
    ]
    require(
        not differing,
        "the runs of this --workdir were not evaluated on the same tokens after as many steps "
        f"({', '.join(differing)} differ or are not known): remove the result.json of each, and "
        "the same command evaluates them again",
    )
    return first


def _floors(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What n-grams make of the tokens of each protocol: the same in every run."""
    names = ("n", "nats_per_token", "interval", "bits_per_byte", "perplexity")
    floors = evaluations[0]["verdict"]["floors"]
    return {
        protocol: [{name: floor[name] for name in names} for floor in floors[protocol]]
        for protocol in PROTOCOLS
    }


class _Scores:
    """Totals of each document in the evaluation of one run."""

    def __init__(self, evaluation: Mapping[str, Any]):
        windows = np.array(evaluation["windows_per_document"], np.float64)
        longest = evaluation["protocols"]["nonoverlapping"][-1]["length"]
        targets = {"nonoverlapping": longest, "fixed_targets": evaluation["num_targets"]}
        self.lengths = [entry["length"] for entry in evaluation["protocols"]["fixed_targets"]]
        # The same of all lengths, whose targets are the same.
        self.bytes_per_token = {
            protocol: evaluation["protocols"][protocol][0]["bytes_per_token"]
            for protocol in PROTOCOLS
        }
        self.verdict = evaluation["verdict"]
        self.tokens = {protocol: targets[protocol] * windows for protocol in PROTOCOLS}
        # float64 [lengths, documents]; infinities and nan were written as None.
        self.nats = {
            protocol: np.array(
                [entry["document_nats"] for entry in evaluation["protocols"][protocol]], np.float64
            )
            for protocol in PROTOCOLS
        }


def _method(
    name: str,
    reference: str,
    seeds: Sequence[int],
    runs: Mapping[tuple[str, int], Run],
    scores: Mapping[tuple[str, int], _Scores],
    counts: np.ndarray,
) -> dict[str, Any]:
    """All that is known of one method; "protocols" is empty until a run of it has finished."""
    ended = {seed: runs[name, seed] for seed in seeds if (name, seed) in runs}
    own = {seed: scores[name, seed] for seed in seeds if (name, seed) in scores}
    others = {seed: scores[reference, seed] for seed in own if (reference, seed) in scores}
    timed = [run.seconds_per_step for run in ended.values() if run.seconds_per_step is not None]
    ranges = [run.seconds_per_step_range for run in ended.values() if run.seconds_per_step_range]
    protocols = {
        protocol: _entries(protocol, own, {} if name == reference else others, counts)
        for protocol in (PROTOCOLS if own else ())
    }
    first = next(iter(ended.values()), None)
    return {
        "name": name,
        "parameters": first and first.parameters,
        "memory_bytes": first and first.memory_bytes,
        "seconds_per_step": statistics.median(timed) if timed else None,
        "seconds_per_step_range": [min(low for low, _ in ranges), max(high for _, high in ranges)]
        if ranges
        else None,
        "runs": [
            {
                "seed": seed,
                "status": run.status,
                "message": run.message,
                "seconds_per_step": run.seconds_per_step,
                "verdict": own[seed].verdict if seed in own else None,
            }
            for seed, run in ended.items()
        ],
        "protocols": protocols,
        "verdict": _verdict(protocols["fixed_targets"], [one.verdict for one in own.values()])
        if own
        else None,
    }


def _entries(
    protocol: str,
    own: Mapping[int, _Scores],
    others: Mapping[int, _Scores],
    counts: np.ndarray,
) -> list[dict[str, Any]]:
    """One protocol of a method by length; `others` are the reference's scores, by seed."""
    any_scores = next(iter(own.values()))
    tokens, bytes_per_token = any_scores.tokens[protocol], any_scores.bytes_per_token[protocol]
    bits = 1 / (math.log(2) * bytes_per_token)
    nats = np.stack([scores.nats[protocol] for scores in own.values()], axis=1)  # [L, seeds, docs]
    entries = []
    for index, length in enumerate(any_scores.lengths):
        level = estimate(nats[index], tokens, counts)
        totals = nats[index].sum(axis=1)
        trained = nats[0].sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            change = (totals - trained) / trained
            # Each seed counts as a fraction of its own loss, as in the mean of `change`.
            changed = ((nats[index] - nats[0]) / trained[:, None]).mean(axis=0)
            base = (nats[0] / trained[:, None]).mean(axis=0)
        entry = {
            "length": length,
            "nats_per_token": level["mean"],
            "interval": level["interval"],
            "document_interval": level["document_interval"],
            "nats_per_token_seeds": level["seeds"],
            "perplexity": perplexity(level["mean"]),
            "bytes_per_token": bytes_per_token,
            "bits_per_byte": _times(bits, level["mean"]),
            "bits_per_byte_interval": _times(bits, level["interval"]),
            "bits_per_byte_seeds": _times(bits, level["seeds"]),
            "relative_change": finite(float(change.mean())),
            "relative_change_interval": t_interval(change),
            "relative_change_document_interval": interval(changed, base, counts),
        }
        if others:
            entry |= _difference(own, others, protocol, index, counts)
        entries.append(entry)
    return entries


def _difference(
    own: Mapping[int, _Scores],
    others: Mapping[int, _Scores],
    protocol: str,
    index: int,
    counts: np.ndarray,
) -> dict[str, Any]:
    """A method minus another at a length, over the seeds that both have, of which there is one."""
    both = [(own[seed], others[seed]) for seed in own if seed in others]
    paired = np.stack([one.nats[protocol][index] - two.nats[protocol][index] for one, two in both])
    gap = estimate(paired, both[0][0].tokens[protocol], counts)
    return {
        "difference": gap["mean"],
        "difference_interval": gap["interval"],
        "difference_document_interval": gap["document_interval"],
        "difference_seeds": gap["seeds"],
        "p_value": p_value(paired.sum(axis=1)),
    }


def _leader(
    methods: Sequence[Mapping[str, Any]],
    index: int,
    scores: Mapping[tuple[str, int], _Scores],
    counts: np.ndarray,
) -> dict[str, Any] | None:
    """The method with the lowest loss on fixed targets at a length, and by how much it leads.

    Returns:
      "length"; "method"; "next", the method with the second lowest loss, or None; "difference" and
      what goes with it, if both have a seed in common. None: no loss is finite.
    """
    levels = {
        method["name"]: method["protocols"]["fixed_targets"][index]
        for method in methods
        if method["protocols"]
    }
    known = [name for name, level in levels.items() if level["nats_per_token"] is not None]
    if not known:
        return None
    best, *rest = sorted(known, key=lambda name: levels[name]["nats_per_token"])
    leader = {"length": levels[best]["length"], "method": best, "next": rest[0] if rest else None}
    own, others = (
        {seed: one for (name, seed), one in scores.items() if name == wanted}
        for wanted in (best, leader["next"])
    )
    if own.keys() & others.keys():
        leader |= _difference(own, others, "fixed_targets", index, counts)
    return leader


def _times(factor: float, value: Any) -> Any:
    if isinstance(value, list):
        return [_times(factor, item) for item in value]
    return None if value is None else factor * value


def _verdict(
    fixed: Sequence[Mapping[str, Any]], of_runs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """How far the loss on fixed targets holds: at most 1% above the training length's.

    Judged by the mean over seeds at each length; the intervals say whether other seeds or other
    documents might say otherwise. A method with a run that learned too little is not judged. How
    far context is used and text retrieved is a list of what the verdict of each run says, where the
    protocols for that were asked for.
    """

    def holds(entry: Mapping[str, Any]) -> bool:
        return entry["relative_change"] is not None and entry["relative_change"] <= TOLERANCE

    held = len(list(itertools.takewhile(holds, fixed[1:])))
    holds_to, factor = fixed[held]["length"], fixed[held]["length"] / fixed[0]["length"]
    reason = _why_none(fixed, of_runs)
    compared = all("learned" in one for one in of_runs)  # an earlier version did not
    verdict: dict[str, Any] = {
        "text": reason or _holding(fixed, held),
        "learned": reason is None if compared else None,
        "holds_to": None if reason else holds_to,
        "holds_factor": None if reason else factor,
    }
    verdict["warning_seeds"] = [one["warning"] for one in of_runs]
    for name, words in (("uses_context_to", "uses context"), ("retrieves_to", "retrieves")):
        values = [one[name] for one in of_runs]
        verdict[f"{name}_seeds"] = values
        known = sorted(value for value in values if value is not None)
        if len(known) == len(values) and (not reason or name == "retrieves_to"):
            ends = [ends for one in of_runs if (ends := one.get(f"{name}_interval"))]
            low, high = min(known + [a for a, _ in ends]), max(known + [b for _, b in ends])
            span = "–".join(map(str, sorted({known[0], known[-1]})))
            if name == "uses_context_to" and high == SHORTEST_WINDOW:
                span = f"at most {span}"
            span += f" [{low}, {high}]" if ends else ""
            verdict["text"] += f"; {words} " + (f"to {span}" if known[-1] else "nothing reliably")
    return verdict


def _why_none(
    fixed: Sequence[Mapping[str, Any]], of_runs: Sequence[Mapping[str, Any]]
) -> str | None:
    """Say why a method is not judged; None if it is."""
    if fixed[0]["nats_per_token"] is None:
        return why_none(None)
    failed = [one["closest_ngram"] for one in of_runs if one.get("learned") is False]
    if not failed:
        return None
    some = f" in {len(failed)} of {len(of_runs)} seeds" if len(failed) < len(of_runs) else ""
    return why_none(failed[0]) + some


def _holding(fixed: Sequence[Mapping[str, Any]], held: int) -> str:
    """Say how far the loss holds, `held` lengths beyond the training length, and how sure it is."""
    if len(fixed) == 1:
        return "evaluated at the training length only"
    to, longest = fixed[held], held + 1 == len(fixed)
    if held:
        factor = to["length"] / fixed[0]["length"]
        text = f"holds to {to['length']} ({factor:g}x{', the longest' if longest else ''})"
        text += f": {_change(to)}"
    else:
        text = "does not hold beyond the training length"
    if not longest:
        text += f"; at {fixed[held + 1]['length']}: {_change(fixed[held + 1])}"
        beyond = not_finite(fixed[held + 2 :])
        text += f"; not finite at {beyond}" if beyond else ""
    deciding = fixed[1 : held + 2]
    doubts = [
        f"over {what}"
        for what, name in _INTERVALS.items()
        if any(entry[name] and entry[name][0] <= TOLERANCE < entry[name][1] for entry in deciding)
    ]
    if doubts:
        text += f" (not certain: an interval {' and one '.join(doubts)} contains +1%)"
    return text


def _change(entry: Mapping[str, Any]) -> str:
    if entry["relative_change"] is None:
        return "not finite"
    bounds = [
        f" [{percent(entry[name][0])}, {percent(entry[name][1])}] over {what}"
        for what, name in _INTERVALS.items()
        if entry[name]
    ]
    return percent(entry["relative_change"]) + ",".join(bounds)
