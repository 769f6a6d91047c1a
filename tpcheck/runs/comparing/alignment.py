"""What two runs have in common: steps by number, and in each the replicas that were given the same samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import product
from math import gcd

from tpcheck.core.errors import UsageError
from tpcheck.runs.trace.files import numbers_of
from tpcheck.runs.trace.records import PassRecord, RankTrace, StepRecord


@dataclass(frozen=True, slots=True)
class Run:
    """The traces of all ranks of one run.

    Attributes:
        path: Where they were read from, for messages.
        ranks: By global rank.
        replicas: Global ranks of each TP group whose ranks are all there, by dp_rank; of each slice of the sequences
            where ranks have slices (cp).
        positions: For each rank, where in its `steps` the records of a number are: several where the optimizer skipped
            a step, which was then taken on other samples.
    """

    path: str
    ranks: Mapping[int, RankTrace]
    replicas: tuple[tuple[int, ...], ...]
    positions: Mapping[int, Mapping[int, tuple[int, ...]]] = field(repr=False)

    @classmethod
    def of(cls, path: str, traces: Sequence[RankTrace]) -> Run:
        """Return the run of these traces.

        Raises:
            UsageError: There is no trace, no TP group is complete with all slices of its sequences, or the ranks are
                more than those of the topology.
        """
        beyond = next((each for each in traces if each.num_ranks > each.topology.world_size), None)
        if beyond is not None:
            raise UsageError(
                "path",
                path,
                f"a run of TP, CP, DP and PP; this one has {beyond.num_ranks} ranks in {beyond.topology!r}: record "
                "again with topology=, which says how the others belong to them",
            )
        if any(each.topology.cp > 1 and not each.cp_group for each in traces):
            raise UsageError(
                "path",
                path,
                "slices of sequences (cp) with the digests of whole samples: tpcheck recorded none when this trace was "
                "made; record again",
            )
        ranks = {trace.rank: trace for trace in sorted(traces, key=lambda trace: trace.rank)}
        groups = sorted({trace.tp_group or (trace.rank,) for trace in ranks.values()})
        complete = [group for group in groups if all(rank in ranks for rank in group)]
        with_slices = {peer for group in complete for peer in group}
        replicas = tuple(group for group in complete if set(ranks[group[0]].cp_group) <= with_slices)
        if not replicas:
            needed = "the traces of all ranks of a TP group" + (", of all slices (cp)" if complete else "")
            raise UsageError("path", path, f"{needed}; give the folders of all nodes")
        positions: dict[int, dict[int, tuple[int, ...]]] = {}
        for rank, trace in ranks.items():
            of_rank = positions.setdefault(rank, {})
            for position, number in enumerate(numbers_of(trace.steps)):
                of_rank[number] = (*of_rank.get(number, ()), position)
        return cls(path, ranks, replicas, positions)

    @property
    def first(self) -> RankTrace:
        return self.ranks[self.replicas[0][0]]

    @property
    def tp(self) -> int:
        return len(self.replicas[0])

    @property
    def dp(self) -> int:
        return len(self.replicas)

    @property
    def cp(self) -> int:
        """Into how many slices sequences are cut, each of which a TP group has."""
        return max(1, len(self.first.cp_group))

    @property
    def data_replicas(self) -> tuple[tuple[int, ...], ...]:
        """For each replica of the model with samples of its own, which of `replicas` have slices of them."""
        by_samples: dict[int, list[int]] = {}
        for number, (first, *_) in enumerate(self.replicas):
            by_samples.setdefault(min(self.ranks[first].cp_group, default=first), []).append(number)
        return tuple(map(tuple, by_samples.values()))

    @property
    def missing_ranks(self) -> tuple[int, ...]:
        """Ranks of the world whose traces are not there; of a pipeline stage's, the ranks of that stage."""
        topology, ranks = self.first.topology, range(self.first.num_ranks)
        if topology.pp > 1:
            stage = topology.coordinate(self.first.rank)["pp"]
            ranks = [rank for rank in ranks if topology.coordinate(rank)["pp"] == stage]  # type: ignore[assignment]
        return tuple(rank for rank in ranks if rank not in self.ranks)

    @property
    def members(self) -> tuple[int, ...]:
        """Ranks of all complete TP groups."""
        return tuple(rank for group in self.replicas for rank in group)

    @property
    def numbers(self) -> tuple[int, ...]:
        """Numbers of the steps that any rank recorded."""
        return tuple(sorted({number for rank in self.members for number in self.positions[rank]}))

    def steps(
        self, number: int, other: Run | None = None, expected: Mapping[int, StepRecord] | None = None
    ) -> dict[int, StepRecord]:
        """Return the step of this number, by rank; without the ranks that have none.

        Of several records that of the update is returned; where another run's is given, that of its samples.
        """
        steps = {}
        for rank in self.members:
            records = [self.ranks[rank].steps[position] for position in self.positions[rank].get(number, ())]
            if not records:
                continue
            of_samples = [
                record
                for record in records
                if other is not None and expected and len(records) > 1 and begins_with(record, expected, other.replicas)
            ]
            updates = [record for record in of_samples or records if record.has_update]
            steps[rank] = (updates or of_samples or records)[0]
        return steps

    @property
    def replays(self) -> int:
        return max(trace.replays for trace in self.ranks.values())

    @property
    def not_recorded(self) -> dict[str, str]:
        """Why something could not be recorded on some rank, by name."""
        return {name: reason for trace in self.ranks.values() for name, reason in trace.not_recorded.items()}

    @property
    def is_replayed(self) -> bool:
        return bool(self.replays) and "replays" not in self.not_recorded

    @property
    def has_other_history(self) -> bool:
        """Whether the recording begins in the middle of a training."""
        return any(record.kind in ("state", "master") for record in self.first.initial)


@dataclass(frozen=True, slots=True)
class SharedSamples:
    """The replicas of a step that both runs gave the same samples.

    Attributes:
        actual, expected: Their numbers among the `replicas` of the runs.
        is_whole_step: All replicas of both runs: then parameters' gradients are comparable, too.
        actual_copies, expected_copies: How often each sample was seen, in lowest terms.
        actual_cp, expected_cp: How many of the replicas, one after the other, have slices of the same samples.
    """

    actual: tuple[int, ...]
    expected: tuple[int, ...]
    is_whole_step: bool
    actual_copies: int = 1
    expected_copies: int = 1
    actual_cp: int = 1
    expected_cp: int = 1

    def with_slices(self, actual: Run, expected: Run) -> SharedSamples:
        """Return the same of replicas of which each is several that have slices of its samples."""
        return replace(
            self,
            actual=tuple(number for each in self.actual for number in actual.data_replicas[each]),
            expected=tuple(number for each in self.expected for number in expected.data_replicas[each]),
            actual_cp=actual.cp,
            expected_cp=expected.cp,
        )


@dataclass(frozen=True, slots=True)
class AlignedStep:
    """One step that both runs recorded.

    Attributes:
        number: Of the step.
        actual, expected: By rank.
        shared: None where no replica was given the same samples.
        note: What about the samples differs, for coverage; empty where they are the same.
    """

    number: int
    actual: Mapping[int, StepRecord]
    expected: Mapping[int, StepRecord]
    shared: SharedSamples | None
    note: str = ""


def aligned_steps(actual: Run, expected: Run) -> Iterator[AlignedStep]:
    """Yield the steps that both runs recorded, in their order."""
    for number in sorted({*actual.numbers} & {*expected.numbers}):
        steps_e = expected.steps(number)
        steps_a = actual.steps(number, expected, steps_e)
        shared, note = shared_samples(
            *(
                [samples_of(steps, run.replicas[first]) for first, *_ in run.data_replicas]
                for run, steps in ((actual, steps_a), (expected, steps_e))
            )
        )
        yield AlignedStep(number, steps_a, steps_e, shared and shared.with_slices(actual, expected), note)


def samples_of(steps: Mapping[int, StepRecord], group: Sequence[int]) -> Counter[str]:
    """Return the samples of a step that one TP group was given, with how often."""
    step = next((steps[rank] for rank in group if rank in steps), None)
    return Counter() if step is None else Counter(sample for each in step.passes for sample in pass_samples(each))


def pass_samples(call: PassRecord) -> tuple[str, ...]:
    """Return what names the samples of a call: their digests, or one name for all where there is no batch dim."""
    return call.samples or (" ".join(sorted(f"{leaf.name} {leaf.digest}" for leaf in call.leaves)),)


def shared_samples(
    actual: Sequence[Counter[str]], expected: Sequence[Counter[str]]
) -> tuple[SharedSamples | None, str]:
    """Return the replicas with the same samples, and what is to be said of the others.

    How samples are dealt over replicas and micro-batches does not matter.
    """
    all_a, all_e = tuple(range(len(actual))), tuple(range(len(expected)))
    copies = proportion(_total(actual), _total(expected))
    if copies is not None:
        return SharedSamples(all_a, all_e, True, *copies), ""
    for replica in all_a:
        copies = proportion(actual[replica], _total(expected))
        if copies is not None:
            return SharedSamples((replica,), all_e, False, *copies), _only(f"replica {replica} of the actual run")
    for replica in all_e:
        copies = proportion(_total(actual), expected[replica])
        if copies is not None:
            return SharedSamples(all_a, (replica,), False, *copies), _only(f"replica {replica} of the expected run")
    pairs: dict[int, int] = {}
    for replica_a, replica_e in product(all_a, all_e):
        if replica_a not in pairs and replica_e not in pairs.values() and actual[replica_a] == expected[replica_e]:
            pairs[replica_a] = replica_e
    if pairs:
        names = ", ".join(map(str, pairs))
        return SharedSamples(tuple(pairs), tuple(pairs.values()), False), _only(f"replicas {names} of the actual run")
    common = len(_total(actual) & _total(expected))
    if not common:
        return None, "the runs were given different samples"
    return None, f"the runs share {common} of {len(_total(expected))} samples, but no replica has the same ones"


def _only(which: str) -> str:
    return f"only {which} was given the samples of the other run, so parameters were trained on different ones"


def _total(replicas: Sequence[Counter[str]]) -> Counter[str]:
    return sum(replicas, Counter())


def proportion(actual: Counter[str], expected: Counter[str]) -> tuple[int, int] | None:
    """Return how many copies each side has of the same samples; None where they are not the same."""
    if not actual or actual.keys() != expected.keys():
        return None
    factor_a, factor_e = reduce(gcd, actual.values()), reduce(gcd, expected.values())
    is_same = all(count // factor_a == expected[sample] // factor_e for sample, count in actual.items())
    if not is_same:
        return None
    common = gcd(factor_a, factor_e)
    return factor_a // common, factor_e // common


def begins_with(leftover: StepRecord, expected: Mapping[int, StepRecord], replicas: Sequence[Sequence[int]]) -> bool:
    """Return whether the calls that no optimizer step followed begin with samples of a step of the other run."""
    samples = _total([samples_of(expected, group) for group in replicas])
    return bool(leftover.passes) and all(sample in samples for sample in pass_samples(leftover.passes[0]))
