"""A vocabulary that is split over the ranks: no collective of the rank program, forward or backward, is of the size of the logits.

The plans are those that the search finds where bytes between ranks are what costs. Every rank program runs, and what its collectives
send is added up.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import autopar
from autopar.ir.assignment import expand_stages
from autopar.ir.cluster import Cluster, Link
from autopar.ir.plan import Plan
from autopar.ir.tracing.trace import split_example, trace
from autopar.runtime.module import ParallelModule
from autopar.runtime.operators.dropout import without_dropout
from autopar.runtime.state.checkpoint import whole_tensor
from autopar.runtime.state.materialize import local_state
from autopar.runtime.verification.launch import RankPool
from tests.runtime.counted import Sent, counted
from tests.runtime.simulated import simulate
from tests.zoo import ZOO

VOCABULARY = 2003  # a prime: no number of ranks divides it
BATCH, SEQUENCE = 2, 8
LOGITS_BYTES = BATCH * SEQUENCE * VOCABULARY * 4


def far_apart(ranks: int) -> Cluster:
    """Slow ranks, between which every byte counts and no message does: all work is split, so that least is sent."""
    link, cluster = Link("far", latency_s=0.0, bytes_per_s=1e9), Cluster.from_name(f"cpu:{ranks}")
    device = replace(cluster.device, flops_per_s=(("float32", 1e9),), memory_bytes_per_s=1e12, launch_s=0.0)
    return replace(cluster, name=f"far:{ranks}", device=device, intra=link, inter=link)


class Head(nn.Module):
    """Tokens, one layer, logits, and a loss of them."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Any], tied: bool = False) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, VOCABULARY, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight
        self.loss = loss

    def forward(self, tokens: Tensor, target: Tensor) -> Any:
        return self.loss(self.head(self.layer(self.embed(tokens)).tanh()), target)


def flat(loss: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor, Tensor], Any]:
    return lambda x, t: loss(x.flatten(0, -2), t.flatten())


def picked(x: Tensor, target: Tensor) -> Tensor:
    return x.gather(-1, target.unsqueeze(-1)).squeeze(-1)


def by_hand(x: Tensor, target: Tensor) -> Tensor:
    largest = x.max(-1, keepdim=True).values.detach()
    return ((x - largest).exp().sum(-1).log() + largest.squeeze(-1) - picked(x, target)).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "cross entropy": flat(F.cross_entropy),
    "smoothed": flat(lambda x, t: F.cross_entropy(x, t, label_smoothing=0.1)),
    "each row": flat(lambda x, t: (F.cross_entropy(x, t, reduction="none") * torch.arange(1.0, 1 + len(t))).sum()),
    "class weights": flat(lambda x, t: F.cross_entropy(x, t, weight=torch.linspace(1, 2, VOCABULARY), label_smoothing=0.1)),
    "classes first": lambda x, t: F.cross_entropy(x.transpose(1, 2), t, ignore_index=3),
    "log-softmax and nll": flat(lambda x, t: F.nll_loss(x.log_softmax(-1), t)),
    "log-softmax and gather": lambda x, t: -picked(x.log_softmax(-1), t).mean(),
    "probabilities": lambda x, t: -picked(x.softmax(-1), t).log().mean(),
    "z-loss": lambda x, t: F.cross_entropy(x.flatten(0, 1), t.flatten()) + 1e-2 * x.logsumexp(-1).square().mean(),
    "by hand": by_hand,
    "amax": lambda x, t: (x.amax(-1) - picked(x, t)).mean(),
    "entropy": lambda x, t: F.cross_entropy(x.flatten(0, 1), t.flatten()) - 0.1 * (x.softmax(-1) * x.log_softmax(-1)).sum(-1).mean(),
    "accuracy": lambda x, t: (F.cross_entropy(x.flatten(0, 1), t.flatten()), (x.argmax(-1) == t).float().mean()),
    "shifted": lambda x, t: F.cross_entropy(x[:, :-1].float().flatten(0, 1), t[:, 1:].flatten()),
    "capped and scaled": lambda x, t: F.cross_entropy((30 * torch.tanh(x * 0.25 / 30)).flatten(0, 1), t.flatten()),
    "with logits": lambda x, t: {"loss": F.cross_entropy(x.flatten(0, 1), t.flatten()), "logits": x},
}  # fmt: skip


def tokens(rows: int = BATCH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randint(VOCABULARY, (rows, SEQUENCE), generator=generator) for name in ("tokens", "target")}


def text(rows: int = BATCH) -> dict[str, Tensor]:
    ids = tokens(rows)["tokens"]
    return {"input_ids": ids, "labels": ids.masked_fill(ids % 5 == 0, -100)}


def loss_of(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result["loss"] if isinstance(result, Mapping) else result[0]


def stepped(module: nn.Module, example: dict[str, Tensor], plan: Plan) -> float:
    """A forward and a backward pass; the loss."""
    if plan.pipeline or plan.microbatches > 1:
        return float(module.step(**example))
    loss = loss_of(module(**example))
    loss.backward()
    return float(loss)


def error_of(model: nn.Module, example: dict[str, Tensor], loss: float, gradients: dict[str, Tensor]) -> float:
    """How far loss and gradients are from those of one device, relative to their norms."""
    one = copy.deepcopy(model)
    with without_dropout(one):
        exact = loss_of(one(**example))
    exact.backward()
    error = abs(loss - exact.item()) / abs(exact.item())
    wanted = {name: parameter.grad for name, parameter in one.named_parameters()}
    return max(error, *(float((found - wanted[name]).norm() / (wanted[name].norm() + 1e-6)) for name, found in gradients.items()))


def most_sent_on_tp(model: nn.Module, example: dict[str, Tensor], plan: Plan) -> tuple[int, int]:
    """Of a step under `plan` on simulated ranks, whose numbers must be those of one device: the bytes that a rank sends over its `tp`
    axis at most, and those of its largest message there."""
    args, kwargs = split_example(example)
    traced = trace(model, args, kwargs)
    expanded = expand_stages(plan, traced.graph)
    (assignment,) = expanded.assignments
    stored = {name: item.stored for name, item in assignment.storage.items()}

    def rank(device_mesh: DeviceMesh) -> tuple[float, dict[str, Tensor], list[Sent]]:
        state = local_state(model, traced.graph, stored, device_mesh, torch.device("cpu"), sync_module_states=False)
        module = ParallelModule(traced, plan, device_mesh, state, assignment=assignment, batched=expanded.microbatched)
        mine = sent.setdefault(dist.get_rank(), [])
        before = len(mine)
        with without_dropout(module):
            loss = stepped(module, example, plan)
        group = tuple(dist.get_process_group_ranks(device_mesh.get_group("tp")))
        messages = [item for item in mine[before:] if item.group == group]
        return loss, {name: whole_tensor(parameter.grad) for name, parameter in module.named_parameters()}, messages

    with counted() as sent:
        found = simulate((plan.mesh["dp"], plan.mesh["tp"]), rank)
    for loss, gradients, _ in found:
        assert error_of(model, example, loss, gradients) < 1e-5
    sizes = [[item.bytes for item in messages] for *_, messages in found]
    return max(map(sum, sizes)), max(map(max, sizes))


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_over_a_split_vocabulary_send_no_logits(loss: str) -> None:
    torch.manual_seed(0)
    model = Head(LOSSES[loss], tied=loss == "smoothed")
    plan = autopar.plan(model, tokens(), far_apart(2), mesh={"dp": 1, "tp": 2})
    in_all, largest = most_sent_on_tp(model, tokens(), plan)
    assert largest <= LOGITS_BYTES / 64 and in_all < LOGITS_BYTES / 16, (in_all, largest)


def test_returned_logits_stay_in_parts() -> None:
    plan = autopar.plan(Head(LOSSES["with logits"]), tokens(), far_apart(2), mesh={"dp": 1, "tp": 2})
    assert [item.placement["tp"] for item in plan.outputs if item.path == "logits"] == ["S(2)"]


CAUSAL = {
    "llama": {"hidden_size": 32, "intermediate_size": 64, "tie_word_embeddings": True},
    "gemma2": {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8},
    "cohere": {"hidden_size": 32, "intermediate_size": 64},
    "bert": {"hidden_size": 32, "intermediate_size": 64},
}
"""Label shift and a float32 loss, soft-capped logits, scaled ones, tied embeddings, and a decoder with a bias."""


def language_model(name: str, layers: int = 1) -> nn.Module:
    sizes = CAUSAL[name] | {"vocab_size": VOCABULARY}
    torch.manual_seed(0)
    if name in ZOO:
        return ZOO[name].build(layers=layers, **sizes)
    return HELD_OUT[name](layers, **sizes)


def _hf(model_class: str, config_class: str) -> Callable[..., nn.Module]:
    def build(layers: int, **sizes: Any) -> nn.Module:
        import transformers

        config = getattr(transformers, config_class)(
            num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32, **sizes
        )
        return getattr(transformers, model_class)(config).train()

    return build


HELD_OUT = {"gemma2": _hf("Gemma2ForCausalLM", "Gemma2Config"), "cohere": _hf("CohereForCausalLM", "CohereConfig")}


@pytest.mark.parametrize("name", CAUSAL)
def test_language_models_send_no_logits(name: str) -> None:
    model = language_model(name)
    plan = autopar.plan(model, text(), far_apart(2), mesh={"dp": 1, "tp": 2})
    in_all, largest = most_sent_on_tp(model, text(), plan)
    assert largest <= LOGITS_BYTES / 16 and in_all < LOGITS_BYTES / 2, (in_all, largest)


def test_microbatches_on_two_axes_send_no_logits() -> None:
    model = Head(LOSSES["smoothed"])
    plan = autopar.plan(model, tokens(8), far_apart(4), mesh={"dp": 2, "tp": 2}, microbatches=2)
    in_all, largest = most_sent_on_tp(model, tokens(8), plan)
    # The head's weight, stored as the embedding's is, is exchanged once a step; a microbatch's logits are as large as `LOGITS_BYTES`.
    weight_bytes = VOCABULARY * 16 * 4
    assert largest <= weight_bytes / 4 + 64 and in_all < 2 * weight_bytes, (in_all, largest)


def on_a_rank(plan: Plan) -> tuple[float, dict[str, Tensor], list[Sent]]:
    model = ZOO["gpt2"].build(layers=2, n_embd=32, n_head=4, vocab_size=VOCABULARY)
    module = autopar.parallelize(model, text(4), plan=plan)
    with counted() as sent, without_dropout(module):
        loss = stepped(module, text(4), plan)
        mine = list(sent[dist.get_rank()])
    return loss, {name: whole_tensor(parameter.grad) for name, parameter in module.named_parameters()}, mine


@pytest.mark.processes
def test_pipelines_send_no_logits(ranks4: RankPool) -> None:
    model = ZOO["gpt2"].build(layers=2, n_embd=32, n_head=4, vocab_size=VOCABULARY)
    plan = autopar.plan(model, text(4), far_apart(4), mesh={"pp": 2, "dp": 1, "tp": 2}, microbatches=2, schedule="1f1b")
    for loss, gradients, sent in ranks4.run(on_a_rank, plan):
        assert error_of(model, text(4), loss, gradients) < 1e-5
        # Between the groups goes the gradient of the tied table, half of it from each rank.
        inside = [item.bytes for item in sent if item.kind not in ("send", "isend") and len(item.group) == 2]
        assert max(inside) <= LOGITS_BYTES / 16, sorted(sent, key=lambda item: -item.bytes)[:3]


def test_a_large_vocabulary_is_split_where_tensor_parallelism_is() -> None:
    """One sequence on eight devices: gathering the head's weight would take longer than anything of the loss."""
    import transformers

    config = transformers.LlamaConfig(
        num_hidden_layers=1, vocab_size=128256, hidden_size=2048, num_attention_heads=16, intermediate_size=8192
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).bfloat16().train()
    ids = torch.zeros(1, 2048, dtype=torch.long, device="meta")
    plan = autopar.plan(model, {"input_ids": ids, "labels": ids}, "h100x8", mesh={"dp": 1, "tp": 8})
    losses = [op.split["tp"] for segment in plan.segments for op in segment.ops if op.target == "autopar.cross_entropy"]
    assert losses == ["v"]
    logits_bytes = 2048 * 128256 * 2
    assert max(item.bytes for item in plan.collectives) < logits_bytes / 8
