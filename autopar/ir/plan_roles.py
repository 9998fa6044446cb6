"""What the axes of a mesh are used for, in words: batch, sequence, attention heads, features, vocabulary. Read off a plan alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from autopar.ir import folded_names, units
from autopar.ir.folded_names import Names
from autopar.ir.placement import parse
from autopar.ir.plan import OpPlan, ParameterPlan, Plan

GATHER_WORDS = {"never": "", "step": "per step", "use": "per use"}
_ROLE_ORDER = (
    "batch", "sequence", "tokens", "tokens and experts", "experts", "attention heads", "queries", "ring of keys",
    "features of experts", "out features", "in features", "channels", "kernel", "image rows", "image columns", "hidden", "vocabulary",
)  # fmt: skip

# What a split of an operator's first output means, by dim. Operators that hold a weight are told by the weight instead (see `role`).
_DIM_ROLES = {
    "scaled_dot_product_attention": ("batch", "attention heads", "queries"),
    "conv": ("batch", "channels", "image rows", "image columns"),
    "batch_norm": ("batch", "channels", "image rows", "image columns"),
    "native_batch_norm": ("batch", "channels", "image rows", "image columns"),
    "embedding": ("batch", "sequence", "hidden"),
}
# Routed experts, by split; where both are split, tokens travel to their experts.
_EXPERT_ROLES = {"n": "tokens", "e": "experts", "n+e": "tokens and experts", "f": "features of experts"}
_TOKEN_DIMS = ("batch", "sequence")
_HEAVY = (
    "linear",
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "matmul",
    "conv",
    "scaled_dot_product_attention",
    "embedding",
    "cross_entropy",
    "batch_norm",
    "experts",
)


def operator(target: str) -> str:
    """The short name of an operator: `aten.linear.default` is `linear`, `aten.conv2d.default` is `conv2d`."""
    parts = target.split(".")
    return parts[1] if len(parts) > 1 else target


def operator_words(target: str) -> str:
    """`operator`, with `attention` for its long name."""
    return operator(target).replace("scaled_dot_product_attention", "attention")


def family(target: str) -> str:
    """The operator's short name without dimension or underscore: `conv2d` and `convolution` are `conv`."""
    name = operator(target).removeprefix("_")
    return "conv" if name.startswith("conv") else name


def is_heavy(op: OpPlan) -> bool:
    """Whether the operation multiplies, looks up or ends the model: the ones by which a person knows a model's parts."""
    return family(op.target) in _HEAVY


@dataclass(frozen=True, slots=True)
class Roles:
    """What the axes are used for: looks at operations together with the weights of their modules, stage by stage."""

    plan: Plan
    weights: dict[int, dict[str, ParameterPlan]]
    names: dict[int, Names]

    @classmethod
    def of(cls, plan: Plan) -> Roles:
        weights: dict[int, dict[str, ParameterPlan]] = {}
        for item in plan.parameters:
            if item.name.endswith(".weight"):
                weights.setdefault(item.stage, {})[item.name.removesuffix(".weight")] = item
        return cls(plan, weights, {stage: Names(found) for stage, found in weights.items()})

    def role(self, op: OpPlan, axis: str, stage: int = 0) -> str:
        """What `op` of `stage` splits over `axis`, in words; empty where these are not known; `"whole"` where every rank does all of it."""
        if op.split[axis].split("/")[0] == "replicate":  # `replicate/P`: so that gradients are terms of a sum
            return "whole"
        kind = family(op.target)
        output = parse(op.output[axis])
        if kind == "scaled_dot_product_attention" and op.split[axis] == "ring":
            return "ring of keys"
        if kind == "experts":
            return _EXPERT_ROLES.get(op.split[axis].partition(":")[0].partition("/")[0].rstrip("0123456789"), "")
        if kind == "cross_entropy":
            return "tokens" if output.is_partial else "vocabulary"
        if kind == "embedding" and output.is_partial:
            return "vocabulary"
        weight = self._weight(op, stage)
        if weight is not None and (used := parse(weight.used[axis])).is_shard and kind != "embedding":
            transposed = kind in ("mm", "addmm", "matmul")
            return "out features" if (used.dim == 0) != transposed else "in features" if used.dim < 2 else "kernel"
        if output.is_shard:
            words = _DIM_ROLES.get(kind, _TOKEN_DIMS)
            return words[output.dim] if output.dim < len(words) else ""
        return ""

    def _weight(self, op: OpPlan, stage: int) -> ParameterPlan | None:
        if not op.module or stage not in self.names:
            return None
        name = self.names[stage].find(op.module)
        return None if name is None else self.weights[stage][name]

    def axis(self, axis: str, stages: Collection[int] | None = None) -> str:
        """The roles of one axis in `stages` (all that have it): `batch`; `sequence, attention heads, out features, vocabulary`."""
        chosen = [stage for stage in range(self.plan.stage_count) if axis in self.plan.stage_mesh(stage)]
        chosen = [stage for stage in chosen if stages is None or stage in stages]
        found: Counter[str] = Counter()
        for segment in self.plan.segments:
            for op in segment.ops if segment.stage in chosen else ():
                norm = "norm" in op.module.rsplit(".", 1)[-1].lower() and parse(op.output[axis]).is_shard
                if is_heavy(op) or norm:
                    found[self.role(op, axis, segment.stage)] += segment.count
        total = sum(found.values())
        if found["batch"] or found["sequence"]:
            del found["tokens"]
        words = [role for role in _ROLE_ORDER if role in found]
        if sharded := self._sharded_state(axis, chosen):
            return f"{', '.join(words)}; {sharded}" if words else sharded
        if not words:
            return "nothing: every rank does the same work" if total == found["whole"] else "see the operations"
        return ", ".join(words)

    def by_stage(self, axis: str) -> list[tuple[list[int], str]]:
        """The roles of `axis` with the stages that have ranks on it: one entry, unless some split the batch over it and some do not."""
        stages = [stage for stage in range(self.plan.stage_count) if self.plan.stage_mesh(stage).get(axis, 1) > 1]
        found: dict[bool, list[int]] = {}
        for stage in stages:
            # The first stage embeds and the last ends in the vocabulary: only splitting the batch or not tells stages apart.
            words = self.axis(axis, [stage]).split("; ")[0].split(", ")
            found.setdefault("batch" in words or "tokens" in words, []).append(stage)
        return [(group, self.axis(axis, group)) for group in found.values()]

    def _sharded_state(self, axis: str, stages: Collection[int]) -> str:
        """How much of the parameters is stored split but used whole over `axis`."""
        split = total = 0
        gathers: set[str] = set()
        for item in self.plan.parameters:
            if item.stage not in stages:
                continue
            numel = folded_names.count(item.name)
            for length in item.shape:
                numel *= length
            total += numel
            if parse(item.stored[axis]).is_shard and parse(item.used[axis]).is_replicated:
                split += numel
                gathers.add(GATHER_WORDS[item.gather])
        if not split:
            return ""
        share = "all" if split == total else units.percent(split / total)
        return f"{share} of the parameters sharded, gathered {' or '.join(sorted(gathers))}"
