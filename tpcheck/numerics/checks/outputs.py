"""Is every module's output the reference's, and the loss?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tpcheck.core.name_maps import without_numbers
from tpcheck.core.placement import Shard
from tpcheck.core.topology import Topology
from tpcheck.numerics.checks.activations import (
    ComparedActivation,
    ComparedActivations,
    compare_activations,
    first_wrong_activations,
    scope_of,
)
from tpcheck.numerics.checks.recompute import (
    compare_with_recomputed,
    parts_of,
    recompute_linear,
    weight_parts,
)
from tpcheck.numerics.checks.suspects import compare_logged, compare_scalar, tensor_suspect
from tpcheck.numerics.data_flow import consumers, is_exchanged_behind, is_inside, is_result
from tpcheck.numerics.differences import subtract
from tpcheck.numerics.evidence import (
    LOGGED_LOSS,
    CheckOutcome,
    Collective,
    EmbeddingFacts,
    Evidence,
    FusedBlocks,
    LabelFacts,
    LossFacts,
    SiblingCollectives,
    Suspect,
    TensorKey,
    worst_by_module,
)

_CHECK = "outputs_match_reference"
_LOGGED = {LOGGED_LOSS: "logged loss"}

Issued = tuple[tuple[str, tuple[int, ...] | str], ...]  # (name, global ranks or axis) in order


def outputs_match_reference(evidence: Evidence, step: int) -> CheckOutcome:
    """Compare the activations and the loss of `step`; report each module that is wrong although its inputs agree.

    Modules further on, whose inputs are wrong in consequence, are compared with what their own inputs and weights give,
    so that one fault does not hide another. Where precision is low, each module is also compared on the reference's
    inputs (teacher forcing): those results go before those of the ordinary pass. Calibrated.
    """
    activations = compare_activations(evidence, step, "forward")
    suspects = _suspects(evidence, step, activations)
    loss_margin, loss_suspects = _compare_loss(evidence, step, activations)
    margins = {**activations.margins(), "loss": loss_margin}
    by_module = worst_by_module(activations.by_module(), {("forward", ""): loss_margin})
    outcome = CheckOutcome(margins, tuple(suspects or loss_suspects), activations.not_compared, by_module)
    outcome = outcome.or_else(compare_logged(evidence, step, _LOGGED, check=_CHECK, phase="forward"))
    forced = None if step else evidence.of_forced_modules()
    if forced is None:
        return outcome
    activations = compare_activations(forced, 0, "forward")
    suspects = _suspects(forced, 0, activations)
    return outcome.with_forced_modules(activations.margins(), suspects, activations.by_module())


def _suspects(evidence: Evidence, step: int, activations: ComparedActivations) -> list[Suspect]:
    roots, num_wrong = first_wrong_activations(evidence, step, activations), len(activations.wrong())
    suspects = [_root_suspect(evidence, step, activations, root, num_wrong) for root in roots]
    return [*suspects, *_independent(evidence, step, activations, roots)]


def activation_suspect(
    evidence: Evidence, step: int, activation: ComparedActivation, check: str, details: Mapping[str, Any], module: str
) -> Suspect:
    """Return the suspect for one activation; `module` is the module at fault."""
    placed = activation.placed
    suspect = tensor_suspect(
        evidence,
        activation.difference,
        check=check,
        kind="activation",
        where=_where(activation.key, step, module),
        expected=activation.expected,
        actual_parts=placed.parts,
        expected_parts=placed.expected_parts(activation.expected),
        is_replicated=placed.is_replicated,
        details=details,
        cut=placed.expected_parts,
    )
    labels = _label_facts(evidence, step, activation.key.micro_batch) if activation.expected.numel() == 1 else None
    return replace(suspect, role=activation.key.role, labels=labels)


def _label_facts(evidence: Evidence, step: int, micro_batch: int) -> LabelFacts | None:
    return LabelFacts(evidence.labels[step], evidence.dp_rank, micro_batch) if evidence.labels else None


def _where(key: TensorKey, step: int, module: str) -> dict[str, Any]:
    field = f"{key.role} {key.path}"
    if module != key.module:
        field += f" of {key.module}"
    if key.micro_batch:
        field += f", micro-batch {key.micro_batch}"
    return {"phase": key.phase, "step": step, "module": module, "field": field}


def _root_suspect(
    evidence: Evidence, step: int, activations: ComparedActivations, root: TensorKey, num_wrong: int
) -> Suspect:
    activation = activations.by_key[root]
    details: dict[str, Any] = {"first_of": num_wrong, "inputs_agree": True}
    if activation.is_recomputed:
        details["note"] = "right when it is first computed, wrong when activation checkpointing computes it again"
    scope = scope_of(root, {key.module for key in activations.by_key})
    if is_result(root):
        suspect = activation_suspect(evidence, step, activation, _CHECK, details, scope)
        suspect = replace(suspect, collectives=_unlike_siblings(evidence, step, root.module))
        if root.module == "" and activation.expected.dim() == 0:
            return replace(suspect, loss=_loss_facts(evidence, step, activations))
        terms = recompute_linear(evidence, step, root, activation.difference.allowed)
        alone = evidence.computed_alone.get(root, ()) if step == 0 and terms is None else ()
        embedding = None if terms else _embedding_facts(evidence, step, root)
        suspect = replace(suspect, linear=terms, embedding=embedding, computed_alone=alone)
        return suspect if terms else _with_addends(evidence, step, activations, suspect, root)
    found = _blocks_read_wrongly(evidence, step, activations, activation, scope)
    if found is None:
        details["note"] = f"the input of {root.module} is wrong although everything before it agrees"
        suspect = activation_suspect(evidence, step, activation, _CHECK, details, scope)
        return _with_addends(evidence, step, activations, suspect, root)
    module, blocks = found
    details["note"] = f"its output is right, but {root.module} reads its fused blocks in the wrong order"
    suspect = activation_suspect(evidence, step, activation, _CHECK, details, module)
    return replace(suspect, fused_blocks=blocks)


def _with_addends(
    evidence: Evidence, step: int, activations: ComparedActivations, suspect: Suspect, root: TensorKey
) -> Suspect:
    """Add what a sum over the ranks may stand beside, in code that is no linear layer, or calls none of its own."""
    layouts = {name: layout for name, layout in evidence.layouts.items() if is_inside(name, suspect.where["module"])}
    shape = tuple(suspect.expected.shape)
    vectors = {
        name: evidence.weights_before(step)[name]
        for name, layout in layouts.items()
        if layout.is_replicated and tuple(layout.shape) == shape[-1:] and name in evidence.initial
    }
    before = (activations.by_key.get(source) for source in evidence.reference[step].sources.get(root, ()))
    residuals = {
        each.key.place: each.expected
        for each in before
        if each is not None and each.difference.agrees and each.placed.is_replicated and each.expected.shape == shape
    }
    both = {
        f"{name} and {residual}": tensor + vector
        for residual, tensor in residuals.items()
        for name, vector in vectors.items()
    }
    has_cut_matrices = any(len(layout.shape) > 1 and not layout.is_replicated for layout in layouts.values())
    return replace(suspect, has_cut_matrices=has_cut_matrices, addends={**vectors, **residuals, **both})


def _blocks_read_wrongly(
    evidence: Evidence, step: int, activations: ComparedActivations, wrong: ComparedActivation, scope: str
) -> tuple[str, FusedBlocks] | None:
    """Return the module whose fused blocks a wrong input is read from in another order; None where it is not."""
    if step == 0 and wrong.key in evidence.blocks_read:
        return evidence.blocks_read[wrong.key]
    fused = _fused_before(list(activations.by_key.values()), wrong.key, scope)
    if fused is None or _is_read_in_order(evidence, step, activations, fused.key, wrong):
        return None
    return fused.key.module, FusedBlocks(fused.placed.num_blocks, fused.difference.relative)


def _is_read_in_order(
    evidence: Evidence, step: int, activations: ComparedActivations, fused: TensorKey, wrong: ComparedActivation
) -> bool:
    """Return whether something shows that the blocks of a fused output are read in their order.

    Something else that is computed from them agrees; or what is wrong is right in all features at some positions, or on
    some rank, or but for a factor and an addend at each position, as where a norm or a softmax over all features is one
    over a rank's.
    """
    others = (activations.by_key.get(after) for after in consumers(evidence, step, fused) if after != wrong.key)
    if any(each is not None and each.difference.agrees for each in others):
        return True
    placed, expected = wrong.placed, wrong.expected
    if expected.dim() < 2:
        return False
    limit = wrong.difference.allowed / expected.numel() ** 0.5
    pairs = [(part, placed.expected_part(expected, tp_rank)) for tp_rank, part in enumerate(placed.parts)]
    errors = [subtract(part, right).abs().amax(-1) for part, right in pairs]
    if len({each.shape for each in errors}) == 1 and bool((torch.stack(errors).amax(0) <= limit).any()):
        return True
    if any(bool((each <= limit).all()) for each in errors):
        return True
    return all(part.shape[-1] > _FITTED and _is_affine(part, right, limit) for part, right in pairs)


_FITTED = 3
"""Features that a factor and an addend fit by themselves, and one: what more of them agree is no chance."""


def _is_affine(part: Tensor, right: Tensor, limit: float) -> bool:
    """Return whether each row of `part` is a number times that of `right`, plus a number."""
    part, right = part.double(), right.double()
    centred = right - right.mean(-1, keepdim=True)
    factor = (part * centred).sum(-1, keepdim=True) / (centred**2).sum(-1, keepdim=True).clamp_min(1e-300)
    rest = (part - part.mean(-1, keepdim=True) - factor * centred).abs()
    return bool((rest <= limit * factor.abs().clamp_min(1)).all())


def _fused_before(events: Sequence[ComparedActivation], root: TensorKey, scope: str) -> ComparedActivation | None:
    """Return the last output before `root`, in its parent, that is cut block by block."""
    found = None
    for activation in events:
        key = activation.key
        if key == root:
            break
        if activation.placed.is_fused and key.role == "output" and is_inside(key.module, scope):
            found = activation
    return found


def _unlike_siblings(evidence: Evidence, step: int, module: str) -> SiblingCollectives | None:
    """Return the collectives of a module, or else of the module around it, where they are not those of its siblings."""
    own, around = differs_from_sibling_layers(evidence, step, module), module.rpartition(".")[0]
    return own or (differs_from_sibling_layers(evidence, step, around) if around else None)


def differs_from_sibling_layers(evidence: Evidence, step: int, module: str) -> SiblingCollectives | None:
    """Return a module's collectives where they are not those that most of its sibling layers issued.

    The names of siblings differ in numbers alone. A module without siblings is compared between the ranks, which have
    groups of their own over the same axis.
    """
    by_rank = [
        _by_module(recorded.collectives, evidence.topology, rank)
        for rank, recorded in zip(evidence.tp_group, evidence.candidate[step], strict=True)
    ]
    issued = [collectives.get(module, ()) for collectives in by_rank]
    names = {key.module for key in evidence.reference[step].activations}
    pattern = without_numbers(module)
    siblings = sorted(name for name in names if name != module and without_numbers(name) == pattern)
    votes = Counter(collectives.get(name, ()) for name in siblings for collectives in by_rank)
    expected = (votes or Counter(issued)).most_common(1)[0][0]
    by_global_rank = zip(evidence.tp_group, issued, strict=True)
    rank, different = next((pair for pair in by_global_rank if pair[1] != expected), (0, None))
    if different is None:
        return None
    such = (name for name in siblings if any(collectives.get(name, ()) == expected for collectives in by_rank))
    issued_over, expected_over = (
        tuple((name, evidence.topology.peers(rank, over) if isinstance(over, str) else over) for name, over in side)
        for side in (different, expected)
    )
    return SiblingCollectives(issued_over, expected_over, f"in {next(such)}" if votes else "on the other ranks")


def _by_module(collectives: Sequence[Collective], topology: Topology, rank: int) -> Mapping[str, Issued]:
    """Return what each module issued in the forward pass."""
    axes = {topology.peers(rank, axis): axis for axis in ("dp", "tp")}
    issued: dict[str, Issued] = {}
    for each in collectives:
        if each.phase == "forward" and not each.micro_batch:
            over = axes.get(tuple(sorted(each.ranks)), each.ranks)
            issued[each.module] = (*issued.get(each.module, ()), (each.name, over))
    return issued


def _embedding_facts(evidence: Evidence, step: int, key: TensorKey) -> EmbeddingFacts | None:
    """Return the table of an embedding whose rows are cut over the ranks."""
    name = f"{key.module}.weight"
    layout = evidence.layouts.get(name)
    placement = layout.placement() if layout is not None else None
    table, shards = evidence.weights_before(step).get(name), weight_parts(evidence, step, name)
    if not isinstance(placement, Shard) or placement.dim != 0 or table is None or shards is None:
        return None
    return EmbeddingFacts(table, shards)


def _loss_facts(evidence: Evidence, step: int, activations: ComparedActivations) -> LossFacts:
    """Return the losses, and the logits: the last output, right on all ranks, that is cut along its last dim."""
    expected, actual = evidence.reference[step].loss, tuple(rank.loss for rank in evidence.candidate[step])
    for activation in reversed(list(activations.by_key.values())):
        logits, placement = activation.expected, activation.placed.placement
        is_right_output = activation.key.role == "output" and activation.difference.agrees
        if is_right_output and logits.dim() == 3 and isinstance(placement, Shard) and placement.dim == 2:
            return LossFacts(expected, actual, logits, activation.placed.parts)
    return LossFacts(expected, actual)


def _independent(
    evidence: Evidence, step: int, activations: ComparedActivations, roots: Sequence[TensorKey]
) -> Iterator[Suspect]:
    """Yield the linear and leaf modules with wrong inputs whose outputs are not even what these inputs give."""
    for activation in activations.wrong():
        key, placed = activation.key, activation.placed
        if key in roots:
            continue
        shapes = [part.shape for part in placed.parts]
        terms = recompute_linear(evidence, step, key, activation.difference.allowed)
        of_leaf = evidence.recomputed.get(key) if step == 0 else None
        recomputed = of_leaf if terms is None else parts_of(terms, shapes)
        if recomputed is None or [part.shape for part in recomputed] != shapes:
            continue
        suspect = compare_with_recomputed(
            evidence,
            placed.parts,
            recomputed,
            activation.difference,
            check=_CHECK,
            kind="activation",
            where=_where(key, step, key.module),
            is_replicated=placed.is_replicated,
            terms=() if terms is None else terms.by_rank,
            are_summed_later=partial(is_exchanged_behind, evidence, step, key),
        )
        if suspect is not None:
            collectives = differs_from_sibling_layers(evidence, step, key.module)
            alone = evidence.computed_alone.get(key, ()) if step == 0 and terms is None else ()
            yield replace(suspect, role=key.role, collectives=collectives, linear=terms, computed_alone=alone)


def _compare_loss(evidence: Evidence, step: int, activations: ComparedActivations) -> tuple[float, list[Suspect]]:
    expected = evidence.reference[step].loss
    losses = [rank.loss for rank in evidence.candidate[step]]
    allowed = evidence.tolerance.allowed_scalar((step, evidence.dp_rank, "loss"), expected)
    where = {"phase": "forward", "step": step, "field": "loss"}
    margin, suspect = compare_scalar(
        evidence, "loss", losses, expected, allowed, check=_CHECK, kind="activation", where=where
    )
    if suspect is None:
        return margin, []
    expected_loss, *actual = (torch.tensor(loss, dtype=torch.float64) for loss in (expected, *losses))
    suspect = replace(
        suspect,
        expected=expected_loss,
        actual_parts=tuple(actual),
        expected_parts=(expected_loss,) * len(losses),
        loss=_loss_facts(evidence, step, activations),
        labels=None if evidence.reference[step].micro_gradients else _label_facts(evidence, step, 0),
    )
    if evidence.reference[step].micro_gradients and _returned_losses_agree(activations):
        suspect = replace(suspect, kind="logged", loss=None)  # what adds the micro-batches up is wrong, not the model
    return margin, [suspect]


def _returned_losses_agree(activations: ComparedActivations) -> bool:
    """Return whether the model returns the right loss for every micro-batch."""
    losses = [each for each in activations.by_key.values() if not each.key.module and each.expected.dim() == 0]
    return bool(losses) and all(each.difference.agrees for each in losses)
