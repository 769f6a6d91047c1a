"""A finding as text: what differs, where, by how much, why, and how to reproduce it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tpcheck.core import causes
from tpcheck.core.check_names import CHECKPOINT_CHECK
from tpcheck.core.findings import Finding
from tpcheck.report import checkpoints, words
from tpcheck.report.json_values import printable
from tpcheck.report.words import Line, labelled

_ALSO_SHOWN = 8
_RANKS_SHOWN = 4  # with their values
# The noun that an exact check counts, and its verb.
_COUNTED = {
    "groups_match_topology": ("group", "differs", "differ"),
    "parameters_are_sharded": ("parameter", "is wrong", "are wrong"),
    "replicas_agree": ("tensor", "differs", "differ"),
}
_COUNTED_BY_DEFAULT = ("element", "differs", "differ")
# Evidence that the lines below phrase; other evidence is shown by key.
_PHRASED = {
    *("largest", "largest_at", "replays", "dtype", "first_of", "inputs_agree", "isolated", "cause_error", "also"),
    *("error_map", "note", "follows_from", "advice", "counted", "last_right_step"),
    *("collectives", "collectives_expected", "collectives_as_in"),
    *("shape_actual", "shape_expected", "count_differing", "count_total", "norm_actual", "norm_expected"),
    *("differs", "by_rank", "missing_on", "values", "first_sample", "samples_differing", "samples_total"),
    *("batches", "ended", "replicas", "order", "repeats_step", "equal", "batches_left_out"),
    *checkpoints.PHRASED,
}


def finding_lines(finding: Finding, subject: Mapping[str, Any]) -> Iterator[Line]:
    """Yield the lines of one finding; `subject` says what was run."""
    finding = replace(finding, where=printable(finding.where), evidence=printable(finding.evidence))
    yield Line(((finding.check, "bold red"), (f"  {place(finding)}", "bold")))
    where = _where(finding, subject)
    if where:
        yield from labelled("where", where)
    yield from labelled("observed", _observed(finding))
    if finding.evidence.get("values"):
        yield from labelled("values", _by_rank(finding.evidence["values"]))
    stored = checkpoints.values(finding.evidence)
    if stored is not None:
        yield from labelled("values", stored)
    yield from labelled("allowed", _allowed(finding))
    yield from labelled("cause", _cause(finding), "yellow" if finding.cause else "")
    if "collectives_expected" in finding.evidence:
        yield from labelled("issued", _collectives(finding.evidence))
    if finding.evidence.get("advice"):
        yield from labelled("fix", str(finding.evidence["advice"]), "cyan")
    if finding.evidence.get("also"):
        yield from labelled(
            "also", words.join_truncated([_phrase(entry) for entry in finding.evidence["also"]], _ALSO_SHOWN)
        )
    if finding.evidence.get("note"):
        yield from labelled("note", str(finding.evidence["note"]))
    unphrased = {key: value for key, value in finding.evidence.items() if key not in _PHRASED}
    if unphrased:
        yield from labelled("evidence", words.pairs(unphrased))
    if finding.again:
        yield from labelled("again", finding.again, "cyan")


def is_consequence(finding: Finding) -> bool:
    """Return whether the finding follows from one of an earlier check."""
    return finding.cause is None and bool(finding.evidence.get("follows_from"))


def first_finding(findings: Sequence[Finding]) -> Finding | None:
    """Return the finding that others follow from: the first that is no consequence, or else the first."""
    return next((each for each in findings if not is_consequence(each)), None) or next(iter(findings), None)


def module_of(finding: Finding) -> str | None:
    """Return the module that a finding is about, empty for the model itself; None for another subject."""
    module, parameter = finding.where.get("module"), finding.where.get("parameter")
    if module is not None:
        return str(module)
    return None if parameter is None else str(parameter).rpartition(".")[0]


def place(finding: Finding) -> str:
    """Return the name of the tensor that differs."""
    where = printable(finding.where)
    module, parameter, field = (where.get(key) for key in ("module", "parameter", "field"))
    if parameter and module and "." not in str(parameter):
        name = f"{module}.{parameter}"
    else:
        name = parameter or ("(the whole model)" if module == "" else module) or ""
    return f"{name} {field}".strip() if field and str(name) not in str(field) else str(field or name)


def _where(finding: Finding, subject: Mapping[str, Any]) -> str:
    evidence = finding.evidence
    dp_rank = finding.where.get("dp_rank")
    replica = [] if dp_rank is None else [f"dp rank {dp_rank}"]
    parts = [", ".join(part for part in [*words.layout(subject), *replica, words.phase(finding.where)] if part)]
    if evidence.get("first_of"):
        parts.append(f"first wrong tensor of {evidence['first_of']}")
    if evidence.get("isolated"):
        backward = " and output gradients" if finding.where.get("phase") == "backward" else ""
        parts.append(f"each module given the reference's inputs{backward}")
    elif evidence.get("inputs_agree") is not None:
        parts.append("inputs of the module " + ("agree" if evidence["inputs_agree"] else "differ already"))
    return "; ".join(part for part in parts if part)


def _observed(finding: Finding) -> str:
    evidence, where = finding.evidence, finding.where
    text = _amount(finding)
    if evidence.get("largest") is not None:
        at = evidence.get("largest_at", where.get("index"))
        text += f" (largest {words.error(evidence['largest'])}" + ("" if at is None else f" at {words.index(at)}") + ")"
    elif where.get("index") is not None:
        text += f" at {words.index(where['index'])}"
    if where.get("ranks") and evidence.get("differs") != "length":
        text += f" on {words.ranks_at(where)}"
    return text


def _amount(finding: Finding) -> str:
    evidence = finding.evidence
    special = _batch_amount(finding) or checkpoints.amount(finding)
    if special is not None:
        return special
    if "shape_actual" in evidence and evidence["shape_actual"] != evidence.get("shape_expected"):
        return f"shape {_shape(evidence['shape_actual'])}, expected {_shape(evidence.get('shape_expected'))}"
    if "norm_actual" in evidence:
        norms = f"norm {words.numbers(evidence['norm_actual'])}, expected {words.numbers(evidence['norm_expected'])}"
        return f"{norms}: relative error {words.error(finding.observed)}"
    if finding.allowed:
        return f"relative error {words.error(finding.observed)}"
    noun, singular, plural = evidence.get("counted") or _COUNTED.get(finding.check, _COUNTED_BY_DEFAULT)
    number, total = evidence.get("count_differing", finding.observed), evidence.get("count_total")
    counted = words.pluralize(number, noun) if total is None else f"{number:g} of {words.pluralize(total, noun)}"
    return f"{counted} {singular if number == 1 else plural}"


def _batch_amount(finding: Finding) -> str | None:
    """Return what differs and by how much, or None for a finding that is not about batches."""
    evidence = finding.evidence
    differs = evidence.get("differs")
    if finding.check == "batches_differ_across_dp" and differs is None:
        return f"{words.pluralize(finding.observed, 'sample')} in common, in {evidence.get('order', 'some order')}"
    if finding.check == "samples_come_once":
        return _samples_amount(finding)
    if differs == "length":
        return "batches: " + ", ".join(
            f"{count}{'' if name in evidence['ended'] else ' or more'} on {name}"
            for name, count in evidence["batches"].items()
        )
    if differs == "structure":
        return f"missing on {words.ranks(evidence['missing_on'])}; differs"
    if differs in ("type", "dtype", "shape", "device"):
        return f"{differs} {_by_rank(evidence['by_rank'])}; differs"
    return _bits(evidence) if differs == "bits" else None


def _samples_amount(finding: Finding) -> str:
    evidence, step = finding.evidence, finding.where["step"]
    if "repeats_step" not in evidence:
        number = evidence["batches_left_out"]
        return f"{'1 batch' if number == 1 else f'{number} batches'} left out before batch {step}"
    indices = "" if evidence.get("equal") == "contents" else f" (by {evidence['equal']})"
    return (
        f"batch {step} repeats batch {evidence['repeats_step']}: {words.pluralize(finding.observed, 'sample')}{indices}"
    )


def _bits(evidence: Mapping[str, Any]) -> str:
    if "count_total" not in evidence:
        return "differs"
    number, total = evidence["count_differing"], evidence["count_total"]
    text = f"{number} of {words.pluralize(total, 'element')} {'differs' if number == 1 else 'differ'}"
    if evidence.get("samples_total", 1) == 1:
        return text
    return (
        f"{text}, in {evidence['samples_differing']} of {words.pluralize(evidence['samples_total'], 'sample')}, first"
    )


def _by_rank(values: Mapping[str, Any]) -> str:
    return words.join_truncated([f"{_value(value)} on {name}" for name, value in values.items()], _RANKS_SHOWN)


def _value(value: Any) -> str:
    return str(list(value)) if isinstance(value, (tuple, list)) else str(value)


def _allowed(finding: Finding) -> str:
    if not finding.allowed:
        return "0 (this check is exact)"
    dtype, replays = finding.evidence.get("dtype"), finding.evidence.get("replays")
    source = [*([str(dtype)] if dtype else []), *([words.pluralize(replays, "perturbed replay")] if replays else [])]
    return (
        f"{words.error(finding.allowed)}{' (' + ', '.join(source) + ')' if source else ''}; margin {finding.margin:.1e}"
    )


def _cause(finding: Finding) -> str:
    if is_consequence(finding):
        return f"follows from {finding.evidence['follows_from']}, which failed first"
    if finding.cause is None:
        return words.UNKNOWN_CAUSE
    if finding.check == CHECKPOINT_CHECK:
        return checkpoints.cause(finding)
    return causes.cause_text(finding.cause, finding.evidence.get("cause_error"))


def _collectives(evidence: Mapping[str, Any]) -> str:
    """Return `no collective; expected one all_reduce over ranks 0 and 1, as in model.layers.0.mlp.down_proj`."""
    issued, expected = _counted(evidence["collectives"]), _counted(evidence["collectives_expected"])
    return f"{issued}; expected {expected}, as {evidence['collectives_as_in']}"


def _counted(collectives: Sequence[Mapping[str, Any]]) -> str:
    counts = Counter((collective["name"], tuple(collective["ranks"])) for collective in collectives)
    counted = [f"{words.pluralize(count, name)} over {words.ranks(ranks)}" for (name, ranks), count in counts.items()]
    return ", ".join(counted) or "no collective"


def _phrase(entry: Any) -> str:
    """Return an entry of `also` as a phrase: `gradient q.weight`, `labels (bits)`, `replicas 0, 1`."""
    if not isinstance(entry, Mapping):
        return str(entry)
    if "replicas" in entry:
        return "replicas " + words.join_truncated([str(replica) for replica in entry["replicas"]], _ALSO_SHOWN)
    return f"{entry['kind']} {entry['name']}" if "kind" in entry else f"{entry['field']} ({entry['differs']})"


def _shape(shape: Any) -> str:
    return "none" if shape is None else str(list(shape))
