"""A plan as the search would make one for a small Llama, built by hand: tensor parallelism on `tp`, sharded state on `dp`."""

from __future__ import annotations

import math

from autopar.ir import folded_names
from autopar.ir.plan import (
    Alternative,
    ClusterInfo,
    CollectivePlan,
    InputPlan,
    ModelInfo,
    OpPlan,
    OutputPlan,
    ParameterPlan,
    Plan,
    Predicted,
    SegmentPlan,
)  # fmt: skip

GIB = 2**30

# target, module, what is split on dp and on tp, output on dp and on tp
_BEFORE = [
    ("aten.embedding.default", "model.embed_tokens", "b", "v", "S(0)", "P(sum)"),
    ("autopar.reshard", "model.embed_tokens", "S(0)", "S(1)", "S(0)", "S(1)"),
]
_LAYER = [
    ("aten.pow.Tensor_Scalar", "model.layers.0.input_layernorm", "0", "1", "S(0)", "S(1)"),
    ("aten.mean.dim", "model.layers.0.input_layernorm", "0", "1", "S(0)", "S(1)"),
    ("aten.rsqrt.default", "model.layers.0.input_layernorm", "0", "1", "S(0)", "S(1)"),
    ("aten.mul.Tensor", "model.layers.0.input_layernorm", "0", "1", "S(0)", "S(1)"),
    ("autopar.reshard", "model.layers.0.self_attn", "S(0)", "R/P", "S(0)", "R/P"),
    ("aten.linear.default", "model.layers.0.self_attn.q_proj", "a", "n", "S(0)", "S(2)"),
    ("aten.linear.default", "model.layers.0.self_attn.k_proj", "a", "n", "S(0)", "S(2)"),
    ("aten.linear.default", "model.layers.0.self_attn.v_proj", "a", "n", "S(0)", "S(2)"),
    ("aten.view.default", "model.layers.0.self_attn", "0", "2", "S(0)", "S(2)"),
    ("aten.transpose.int", "model.layers.0.self_attn", "0", "2", "S(0)", "S(1)"),
    ("aten.scaled_dot_product_attention.default", "model.layers.0.self_attn", "batch", "heads", "S(0)", "S(1)"),
    ("aten.linear.default", "model.layers.0.self_attn.o_proj", "a", "k", "S(0)", "P(sum)"),
    ("aten.add.Tensor", "model.layers.0", "0", "1", "S(0)", "S(1)"),
    ("aten.linear.default", "model.layers.0.mlp.up_proj", "a", "n", "S(0)", "S(2)"),
    ("aten.silu.default", "model.layers.0.mlp", "0", "2", "S(0)", "S(2)"),
    ("aten.linear.default", "model.layers.0.mlp.down_proj", "a", "k", "S(0)", "P(sum)"),
    ("aten.add.Tensor", "model.layers.0", "0", "1", "S(0)", "S(1)"),
]
_AFTER = [
    ("aten.linear.default", "lm_head", "a", "n", "S(0)", "S(2)"),
    ("aten.view.default", "", "0", "2", "S(0)", "S(1)"),
    ("autopar.cross_entropy", "", "m", "v", "P(sum)", "R"),
    ("aten.div.Tensor", "", "replicate", "replicate", "R", "R"),
]

# name, shape, stored on dp and on tp, used on dp and on tp
_PARAMETERS = [
    ("model.embed_tokens.weight", (32000, 4096), "R", "S(0)", "R/P", "S(0)"),
    ("model.layers.{layers}.input_layernorm.weight", (4096,), "R", "R", "R/P", "R/P"),
    ("model.layers.{layers}.self_attn.q_proj.weight", (4096, 4096), "S(1)", "S(0)", "R/P", "S(0)"),
    ("model.layers.{layers}.self_attn.k_proj.weight", (1024, 4096), "S(1)", "S(0)", "R/P", "S(0)"),
    ("model.layers.{layers}.self_attn.v_proj.weight", (1024, 4096), "S(1)", "S(0)", "R/P", "S(0)"),
    ("model.layers.{layers}.self_attn.o_proj.weight", (4096, 4096), "S(0)", "S(1)", "R/P", "S(1)"),
    ("model.layers.{layers}.mlp.up_proj.weight", (14336, 4096), "S(1)", "S(0)", "R/P", "S(0)"),
    ("model.layers.{layers}.mlp.down_proj.weight", (4096, 14336), "S(0)", "S(1)", "R/P", "S(1)"),
    ("lm_head.weight", (32000, 4096), "S(1)", "S(0)", "R/P", "S(0)"),
]


def sample_plan(layers: int = 32, *, name: str = "searched", fits: bool = True) -> Plan:
    """A sound plan for `layers` layers on a (2, 4) mesh."""
    numbers = iter(range(10_000))

    def axes(dp: str, tp: str) -> dict[str, str]:
        return {"dp": dp, "tp": tp}

    def ops(rows: list[tuple[str, str, str, str, str, str]]) -> tuple[OpPlan, ...]:
        return tuple(
            OpPlan(name=f"{target.split('.')[1]}_{next(numbers)}", target=target, module=module, split=axes(a, b), output=axes(c, d))
            for target, module, a, b, c, d in rows
        )

    count = "{" + f"0-{layers - 1}" + "}" if layers > 1 else "0"
    parameters = []
    for template, shape, *places in _PARAMETERS:
        stored, used = axes(*places[:2]), axes(*places[2:])
        alternatives: tuple[Alternative, ...] = ()
        if "up_proj" in template:
            alternatives = (
                Alternative(stored=axes("R", "S(0)"), cost_s=0.81, memory_bytes=70 * GIB),
                Alternative(stored=axes("R", "S(1)"), why="no split of `linear` reads its weight as S(1) and writes S(2)"),
            )
        parameters.append(
            ParameterPlan(
                name=template.replace("{layers}", count),
                shape=shape,
                dtype="bfloat16",
                trainable=True,
                stored=stored,
                gather="use" if stored["dp"] != "R" else "never",
                used=used,
                alternatives=alternatives,
            )
        )
    segments = (
        SegmentPlan(name="before", start=0, length=len(_BEFORE), count=1, ops=ops(_BEFORE)),
        SegmentPlan(name=f"model.layers.{count}", start=len(_BEFORE), length=len(_LAYER), count=layers, ops=ops(_LAYER)),
        SegmentPlan(name="after", start=len(_BEFORE) + len(_LAYER) * layers, length=len(_AFTER), count=1, ops=ops(_AFTER)),
    )
    total = segments[-1].start + len(_AFTER)

    def collective(
        kind: str, axis: str, phase: str, value: str, op: str, size: int, times: int, time_s: float, exposed_s: float
    ) -> CollectivePlan:
        return CollectivePlan(
            kind=kind, axis=axis, phase=phase, value=value, op=op, bytes=size, count=times, time_s=time_s, exposed_s=exposed_s
        )

    collectives = (
        collective("all_gather", "tp", "forward", "mul_5", "reshard_6", 128 * 2**20, layers * 2, 4e-4, 4e-4),
        collective("reduce_scatter", "tp", "forward", "linear_13", "add_14", 128 * 2**20, layers * 2, 4e-4, 4e-4),
        collective("all_gather", "tp", "backward", "linear_13", "add_14", 128 * 2**20, layers * 2, 4e-4, 4e-4),
        *(
            collective(
                "reduce_scatter",
                "dp",
                "gradient",
                p.name,
                p.name,
                2 * p.shape[0] * p.shape[-1] // 4,
                layers if "{" in p.name else 1,
                2e-4,
                1e-5,
            )
            for p in parameters
            if p.gather == "use"
        ),
    )
    numel = sum(folded_names.count(item.name) * math.prod(item.shape) for item in parameters)
    memory = {"parameters": 2 * GIB, "gradients": 2 * GIB, "optimizer": 8 * GIB, "activations": 40 * GIB, "buffers": GIB}
    return Plan(
        name=name,
        model=ModelInfo(
            name="LlamaForCausalLM",
            fingerprint="0123456789abcdef",
            training=True,
            parameters=numel,
            operations=total,
        ),
        cluster=ClusterInfo(name="h100x8", device="H100", devices_per_node=8, nodes=1, memory_bytes=80 * GIB),
        mesh={"dp": 2, "tp": 4},
        inputs=(InputPlan(path="input_ids", shape=(16, 8192), dtype="int64", placement=axes("S(0)", "R")),),
        outputs=(
            OutputPlan(path="loss", shape=(), dtype="float32", placement=axes("R", "R")),
            OutputPlan(path="logits", shape=(16, 8192, 32000), dtype="bfloat16", placement=axes("S(0)", "S(2)")),
        ),
        pins={"model.layers.*.mlp.up_proj.weight": "S(0)@tp"},
        predicted=Predicted(
            cost_s=0.8,
            lower_bound_s=0.7968,
            compute_s=0.7,
            communication_s=0.1,
            memory_bytes=memory,
            memory_limit_bytes=(72 if fits else 40) * GIB,
            fits=fits,
            optimizer="adamw",
            effort="fast",
        ),
        replicated=("aten.div.Tensor",),
        notes=("rotary tables are computed on every rank",),
        parameters=tuple(parameters),
        segments=segments,
        collectives=collectives,
    )
