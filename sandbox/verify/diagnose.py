"""From the pattern of differences to the kind of bug, in words.

What is looked at first is what happens first: initial values, data, gradients of the first step, their norm, the
parameters after it, later steps. Within the gradients, one ratio everywhere with cosine 1 is a wrong scale, one ratio
on a class of parameters a reduction that this class missed or got twice, ranks that disagree a reduction that did not
happen (unless the loss is wrong too: then they computed apart), and a cosine below 1 wrong weights or wrong data. If
the loss is right and gradients are up to some layer, and wrong from there down, backward went wrong in that layer; and
where it never came, they are zero.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sandbox.config import Config
from sandbox.verdict import Difference

__all__ = ["Findings", "diagnose"]


@dataclass(frozen=True)
class Findings:
    """All that was compared. Lists go by step; differences come worst first."""

    config: Config
    tolerance: float
    losses: Sequence[float]  # relative errors
    norms: Sequence[float]  # ratios to the reference's
    rates: Sequence[float]  # ratios of learning rates
    gradients: Sequence[Sequence[Difference]]
    parameters: Sequence[Sequence[Difference]]  # one more: the first values
    rows: str  # what is wrong with the rows that ranks saw; empty if nothing
    weights: str  # which wrong weighting explains the ranks' losses; empty if none
    amounts: str  # which bytes are not as predicted; empty if none
    buffers: Sequence[Sequence[Difference]] = ()  # after each step

    def wrong(self, found: Sequence[Difference]) -> list[Difference]:
        """Those beyond the tolerance."""
        return [d for d in found if not max(d.error, d.drift) <= self.tolerance]


def diagnose(found: Findings) -> str:
    """Name the kind of cause, then what was seen: `scale: every gradient is 2.0000 times ... (mesh.dp.degree)`."""
    checks: list[Callable[[Findings], str]] = [
        _coverage, _start, lambda f: f.rows and f"data: {f.rows}", _gradients, _norm, _step, _state,
        _later, _reported,
    ]  # fmt: skip
    return next((cause for check in checks if (cause := check(found))), "") or found.amounts


def _coverage(found: Findings) -> str:
    lost = [d.tensor for step in (*found.gradients, *found.parameters) for d in step if math.isinf(d.error)]
    return f"partition: no rank holds all of {_names(lost)}, or some of it is not a number." if lost else ""


def _start(found: Findings) -> str:
    wrong = found.wrong(found.parameters[0])
    if not wrong:
        return ""
    who = (
        "ranks start from different values" if any(d.drift > found.tolerance for d in wrong) else "first values differ"
    )
    return f"initialisation: {who} of {_names(d.tensor for d in wrong)}."


def _gradients(found: Findings) -> str:
    all_, wrong = found.gradients[0], found.wrong(found.gradients[0])
    if not wrong:
        return ""
    drifting = [d for d in wrong if d.drift > found.tolerance]
    if drifting and found.losses[0] > found.tolerance:
        return (
            f"forward: the loss itself differs by {found.losses[0]:.1e}, and ranks that should compute the same, and "
            f"hold the same gradient of {_names(d.tensor for d in drifting)}, disagree: other dropout masks or data."
        )
    if drifting:
        return (
            f"reduction: ranks that should hold the same gradient of {_names(d.tensor for d in drifting)} disagree: "
            "it was not summed over them, or not all of it."
        )
    return _pattern(found, wrong, all_) or _weights(found, wrong)


def _pattern(found: Findings, wrong: Sequence[Difference], all_: Sequence[Difference]) -> str:
    if all(d.ratio == d.cos == 0 for d in wrong) and len(wrong) < len(all_):
        return (
            f"backward: the gradients of {_class(wrong, all_)} ({len(wrong)} of {len(all_)}) are zero: nothing reached "
            "them, or it was never computed."
        )
    close = all(0 < d.error < 2**-4 and d.cos > 1 - 2**-10 for d in wrong) and _middle(d.error for d in wrong) < 2**-6
    if close and _middle(abs(d.ratio - 1) for d in wrong) < 2**-8 and len(wrong) > len(all_) / 2:
        return (
            f"precision: {len(wrong)} of {len(all_)} gradients are off by up to {wrong[0].error:.0e}, in no direction: "
            "they were rounded to a narrower type on the way."
        )
    straight = all(d.cos > 1 - 1e-9 for d in wrong)
    ratio = wrong[0].ratio
    if straight and all(abs(d.ratio - ratio) <= 1e-6 * abs(ratio) for d in wrong):
        which = "every gradient is" if len(wrong) == len(all_) else f"the gradients of {_class(wrong, all_)} are"
        kind = "scale" if len(wrong) == len(all_) else "reduction"
        return f"{kind}: {which} {ratio:.4f} times the reference{_factor(ratio, found.config)}."
    if found.losses[0] <= found.tolerance and (layer := _cut_short(wrong, all_)):
        return (
            f"backward: the loss is right, and so are the gradients that backward meets before it leaves {layer}; all "
            "that come after are wrong. What is computed there has a wrong derivative, or some of it was not passed on."
            f"{_again(found.config)}"
        )
    if len(wrong) < len(all_):
        return (
            f"reduction: only {_class(wrong, all_)} differ ({len(wrong)} of {len(all_)}); worst ratio {ratio:.4f}, "
            f"cos {wrong[0].cos:.4f}: they miss the share of some ranks or microbatches, or hold another's."
            f"{_again(found.config)}"
        )
    return ""


def _again(config: Config) -> str:
    what = {"none": "", "selective": "attention", "full": "a block"}[config.train.recompute]
    return f" Or {what} was not the same when it was computed again (train.recompute)." if what else ""


def _cut_short(wrong: Sequence[Difference], all_: Sequence[Difference]) -> str:
    """The layer in which backward goes wrong, if most gradients are: all before it in the model, none behind it."""
    names, every = {d.tensor for d in wrong}, {d.tensor for d in all_}
    last = max(map(_depth, names))
    split = names >= {n for n in every if _depth(n) < last} and names < every
    if not split or len(names) <= len(every) / 2:
        return ""
    parts = min(name for name in names if _depth(name) == last).split(".")
    return ".".join(parts[: 2 if parts[0] == "blocks" else 1])


def _depth(name: str) -> int:
    """Place of a parameter's layer in the model: the embedding, the blocks, the norm, the head."""
    first, *rest = name.split(".")
    return int(rest[0]) + 1 if first == "blocks" else {"embed": 0, "norm": 2**30, "head": 2**30 + 1}.get(first, 0)


def _middle(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def _weights(found: Findings, wrong: Sequence[Difference]) -> str:
    if found.losses[0] > found.tolerance and found.weights:
        return f"weighting: {found.weights}: every gradient differs (worst cos {wrong[-1].cos:.4f})."
    if found.losses[0] <= found.tolerance:
        return (
            f"weighting: the loss is right, but no gradient points where it should (worst cos {wrong[0].cos:.4f}): "
            "rows are weighted by where they lie (a mean of means), or some ranks' or microbatches' share is lost "
            "or counted twice."
        )
    return (
        f"forward: the loss itself differs by {found.losses[0]:.1e} and all gradients with it: "
        "other dropout masks, positions, visibility or weights of rows."
    )


def _norm(found: Findings) -> str:
    ratio = found.norms[0]
    if abs(ratio - 1) <= found.tolerance:
        return ""
    return (
        f"norm: all gradients are right, but their global norm is {ratio:.4f} times the reference's"
        f"{_factor(ratio, found.config)}: some elements were counted more or less than once. Clipping follows it."
    )


def _step(found: Findings) -> str:
    if abs(found.rates[0] - 1) > 1e-12:
        return f"learning rate: it is {found.rates[0]:.4f} times the reference's at the first step."
    all_ = found.parameters[1] if len(found.parameters) > 1 else ()  # AdamW's are not judged
    wrong = found.wrong(all_)
    if not wrong:
        return ""
    if any(d.drift > found.tolerance for d in wrong):
        return (
            f"optimizer: gradients agree, but after the step ranks hold different values of "
            f"{_names(d.tensor for d in wrong)}: a part was not gathered, or was clipped or stepped alone."
        )
    return (
        f"optimizer: gradients and their norm agree, but {_class(wrong, all_)} ({len(wrong)} of {len(all_)}) step "
        "elsewhere: weight decay, clipping factor, or a part updated with another's gradient."
    )


def _state(found: Findings) -> str:
    for step, buffers in enumerate(found.buffers, 1):
        if found.wrong(found.gradients[step - 1]):
            break
        if not (wrong := found.wrong(buffers)):
            continue
        drifting = any(d.drift > found.tolerance for d in wrong)
        who = "ranks hold different values" if drifting else "all ranks hold those of one of them"
        return (
            f"buffer: after step {step}, values of {_names(d.tensor for d in wrong)} differ from the unsharded run's, "
            f"and {who}: each rank updates them from the rows that it sees. Sum over the ranks first, or keep no such "
            "state."
        )
    return ""


def _later(found: Findings) -> str:
    for step in range(1, len(found.gradients)):
        if abs(found.rates[step] - 1) > 1e-12:
            return f"learning rate: it is {found.rates[step]:.4f} times the reference's at step {step + 1}."
        for what, differences in (("gradients", found.gradients[step]), ("parameters", found.parameters[step + 1])):
            wrong = found.wrong(differences)
            if wrong:
                return (
                    f"state: all is right up to step {step}, then the {what} of {_class(wrong, differences)} differ "
                    f"(ratio {wrong[0].ratio:.4f}, cos {wrong[0].cos:.4f}): something of an earlier step was kept, "
                    "or dropped: gradients not zeroed, a stale copy of weights, or momentum."
                )
        if not abs(found.norms[step] - 1) <= found.tolerance:
            return f"norm: from step {step + 1} on it is {found.norms[step]:.4f} times the reference's."
    return ""


def _reported(found: Findings) -> str:
    for step, error in enumerate(found.losses, 1):
        if not error <= found.tolerance:
            return f"loss: gradients and parameters are right, but what step {step} reports is off by {error:.1e}."
    return ""


def _factor(ratio: float, config: Config) -> str:
    """The setting that a ratio reminds of, if any."""
    dp, replicas = config.mesh.dp.degree, config.mesh.dp.replicas
    settings: Mapping[str, float] = {
        "mesh.dp.degree": dp,
        "mesh.dp.replicas": replicas,
        "mesh.dp.degree / replicas": dp / replicas,
        "mesh.ep.degree": config.mesh.ep.degree,
        "mesh.cp.degree": config.mesh.cp.degree,
        "mesh.tp.degree": config.mesh.tp.degree,
        "train.microbatches": config.train.microbatches,
        "the number of ranks": config.mesh.world,
    }
    for power, words in ((1, "{}"), (-1, "1 / ({})"), (0.5, "the root of {}"), (-0.5, "1 / the root of {}")):
        for name, value in settings.items():
            if value > 1 and abs(ratio - value**power) < 1e-4 * ratio:
                return f" ({words.format(f'{name} = {value:g}')}: a sum for a mean, or a mean for a sum)"
    return ""


def _class(some: Sequence[Difference], all_: Sequence[Difference]) -> str:
    """What the names have in common."""
    names, every = {d.tensor for d in some}, {d.tensor for d in all_}
    classes: dict[str, Callable[[str], bool]] = {
        "all biases": lambda n: n.endswith("bias"),
        "all norms": lambda n: "norm" in n,
        "all biases and norms": lambda n: n.endswith("bias") or "norm" in n,
        "all experts": lambda n: ".experts." in n,
        "all routers": lambda n: ".router." in n,
        "all matrices": lambda n: n.endswith("weight") and "norm" not in n,
        "the embedding": lambda n: n.startswith("embed"),
        "the embedding and the head": lambda n: n.startswith(("embed", "head")),
    }
    for block in dict.fromkeys(n.split(".")[1] for n in every if n.startswith("blocks.")):
        classes[f"block {block}"] = lambda n, block=block: n.startswith(f"blocks.{block}.")  # type: ignore[misc]
    return next((text for text, test in classes.items() if names == {n for n in every if test(n)}), _names(names))


def _names(names: object) -> str:
    unique = sorted(dict.fromkeys(names))  # type: ignore[call-overload]
    more = f" and {len(unique) - 2} more" if len(unique) > 2 else ""
    return ", ".join(unique[:2]) + more
