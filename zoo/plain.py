"""Rows: plain PyTorch modules, as people write them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.inputs import SEQUENCE, floats, numbers
from zoo.row import Row, plain


class Translator(nn.Module):
    """`nn.Transformer` between embeddings and a head; the loss, or logits without a target."""

    def __init__(self, vocabulary: int = 96, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.transformer = nn.Transformer(width, 4, layers, layers, 2 * width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, source: Tensor, begun: Tensor, target: Tensor | None = None) -> Any:
        causal = nn.Transformer.generate_square_subsequent_mask(begun.shape[1], dtype=self.head.weight.dtype)
        scores = self.head(self.transformer(self.embed(source), self.embed(begun), tgt_mask=causal, tgt_is_causal=True))
        return scores if target is None else F.cross_entropy(scores.flatten(0, 1), target.flatten())


def _pair(model: nn.Module, batch: int) -> dict[str, Any]:
    return {
        "source": numbers(0, 96, batch, SEQUENCE),
        "begun": numbers(0, 96, batch, 8, seed=2),
        "target": numbers(0, 96, batch, 8, seed=3),
    }


class LstmLanguageModel(nn.Module):
    """Embedding, `nn.LSTM`, head."""

    def __init__(self, vocabulary: int = 96, width: int = 32, layers: int = 2, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True, dropout=dropout)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor, target: Tensor | None = None) -> Any:
        hidden, _ = self.lstm(self.embed(tokens))
        scores = self.head(hidden)
        return scores if target is None else F.cross_entropy(scores.flatten(0, 1), target.flatten())


def _tokens(model: nn.Module, batch: int) -> dict[str, Any]:
    return {"tokens": numbers(0, 96, batch, SEQUENCE), "target": numbers(0, 96, batch, SEQUENCE, seed=2)}


class UNet(nn.Module):
    """Down and up again, each level handed across to the way up; a class for every pixel."""

    def __init__(self, width: int = 8, levels: int = 2, classes: int = 5) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels + 1)]
        pairs = list(pairwise(widths))
        self.stem = self._block(3, width)
        self.down = nn.ModuleList(self._block(narrow, wide) for narrow, wide in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose2d(wide, narrow, 2, stride=2) for narrow, wide in reversed(pairs))
        self.join = nn.ModuleList(self._block(2 * narrow, narrow) for narrow, _ in reversed(pairs))
        self.head = nn.Conv2d(width, classes, 1)

    @staticmethod
    def _block(inside: int, outside: int) -> nn.Module:
        first = (nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU())
        return nn.Sequential(*first, nn.Conv2d(outside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU())

    def forward(self, image: Tensor, target: Tensor | None = None) -> Any:
        x = self.stem(image)
        skips = []
        for block in self.down:
            skips.append(x)
            x = block(F.max_pool2d(x, 2))
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([skips.pop(), up(x)], 1))
        scores = self.head(x)
        return scores if target is None else {"loss": F.cross_entropy(scores, target), "scores": scores}


def _image_and_mask(model: nn.Module, batch: int) -> dict[str, Any]:
    mask = numbers(0, 5, batch, 16, 16)
    mask[0, :5] = -100
    return {"image": floats(batch, 3, 16, 16), "target": mask}


class GraphNetwork(nn.Module):
    """Messages along edges, added up at the node they point to (`index_add`), over a batch of graphs joined into one."""

    def __init__(self, features: int = 8, width: int = 32, layers: int = 2, classes: int = 4) -> None:
        super().__init__()
        self.read = nn.Linear(features, width)
        self.message = nn.ModuleList(nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(layers))
        self.update = nn.ModuleList(nn.GRUCell(width, width) for _ in range(layers))
        self.head = nn.Linear(width, classes)

    def forward(self, nodes: Tensor, edges: Tensor, target: Tensor | None = None) -> Any:
        """`nodes`: `(nodes, features)`; `edges`: `(2, edges)`, from and to; `target`: `(nodes,)`."""
        hidden = torch.relu(self.read(nodes))
        origin, goal = edges
        for message, update in zip(self.message, self.update, strict=True):
            sent = message(torch.cat([hidden[origin], hidden[goal]], -1))
            received = torch.zeros_like(hidden).index_add(0, goal, sent)
            received = received.scatter_reduce(0, goal[:, None].expand_as(sent), sent, "amax", include_self=True)
            hidden = update(received, hidden)
        scores = self.head(hidden)
        return scores if target is None else F.cross_entropy(scores, target)


def _graph(model: nn.Module, batch: int) -> dict[str, Any]:
    nodes, edges = 6 * batch, 17 * batch
    return {"nodes": floats(nodes, 8), "edges": numbers(0, nodes, 2, edges), "target": numbers(0, 4, nodes, seed=2)}


class DLRM(nn.Module):
    """Naumov et al. 2019: a bag of rows from every embedding table, a perceptron for the numbers, products of all pairs, a click."""

    def __init__(self, rows: tuple[int, ...] = (1000, 400, 60), width: int = 16, numeric: int = 13) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(count, width, mode="sum") for count in rows)
        self.bottom = nn.Sequential(nn.Linear(numeric, 32), nn.ReLU(), nn.Linear(32, width), nn.ReLU())
        fields = len(rows) + 1
        self.top = nn.Sequential(nn.Linear(width + fields * (fields - 1) // 2, 32), nn.ReLU(), nn.Linear(32, 1))
        self.pairs: Tensor
        self.register_buffer("pairs", torch.tril_indices(fields, fields, -1), persistent=False)

    def forward(self, numeric: Tensor, categories: Tensor, target: Tensor | None = None) -> Any:
        """`numeric`: `(batch, numbers)`; `categories`: `(batch, tables, lookups)`; `target`: `(batch,)` of 0 and 1."""
        dense = self.bottom(numeric)
        fields = torch.stack([dense, *(table(categories[:, index]) for index, table in enumerate(self.tables))], 1)
        products = fields @ fields.transpose(1, 2)
        score = self.top(torch.cat([dense, products[:, self.pairs[0], self.pairs[1]]], 1)).squeeze(-1)
        return score if target is None else F.binary_cross_entropy_with_logits(score, target)


def _clicks(model: nn.Module, batch: int) -> dict[str, Any]:
    categories = torch.stack([numbers(0, rows, batch, 3, seed=rows) for rows in (1000, 400, 60)], 1)
    return {"numeric": floats(batch, 13), "categories": categories, "target": numbers(0, 2, batch).double()}


class Experts(nn.Module):
    """Experts as one tensor each of three: every token goes to its two best, weighted by the router."""

    def __init__(self, width: int, wide: int, count: int, chosen: int) -> None:
        super().__init__()
        self.chosen = chosen
        self.router = nn.Linear(width, count, bias=False)
        self.up = nn.Parameter(torch.randn(count, width, wide) * width**-0.5)
        self.down = nn.Parameter(torch.randn(count, wide, width) * wide**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.router(x).softmax(-1).topk(self.chosen, -1)
        share = torch.zeros_like(self.router(x)).scatter(-1, index, weights / weights.sum(-1, keepdim=True))
        inner = F.gelu(torch.einsum("bsd,edf->bsef", x, self.up))
        return torch.einsum("bsef,efd,bse->bsd", inner, self.down, share)


class WideNet(nn.Module):
    """Xue et al. 2022, "Go Wider Instead of Deeper": attention and experts are the same for all layers, the norms are not."""

    def __init__(self, vocabulary: int = 96, width: int = 32, layers: int = 3, experts: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.experts = Experts(width, 2 * width, experts, 2)
        self.before, self.between = (nn.ModuleList(nn.LayerNorm(width) for _ in range(layers)) for _ in range(2))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor, target: Tensor | None = None) -> Any:
        x = self.embed(tokens)
        for before, between in zip(self.before, self.between, strict=True):
            y = before(x)
            x = x + self.attention(y, y, y, need_weights=False)[0]
            x = x + self.experts(between(x))
        scores = self.head(x)
        return scores if target is None else F.cross_entropy(scores.flatten(0, 1), target.flatten())


@torch.library.custom_op("zoo::leaky_norm", mutates_args=())
def leaky_norm(x: Tensor, weight: Tensor, slope: float) -> Tensor:
    """A user's kernel: rows `(..., width)` divided by their root mean square, times `weight` `(width,)`, negative numbers times `slope`."""
    y = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
    return torch.where(y > 0, y, slope * y)


@leaky_norm.register_fake
def _leaky_norm_fake(x: Tensor, weight: Tensor, slope: float) -> Tensor:
    return torch.empty_like(x)


def _leaky_norm_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight = ctx.saved_tensors
    scale = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    z = x * scale
    gradient = torch.where(z * weight > 0, gradient, ctx.slope * gradient)
    inner = gradient * weight
    return scale * (inner - z * (inner * z).mean(-1, keepdim=True)), (gradient * z).flatten(0, -2).sum(0), None


def _leaky_norm_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.slope = inputs[2]


leaky_norm.register_autograd(_leaky_norm_backward, setup_context=_leaky_norm_context)


class CustomOperator(nn.Module):
    """A perceptron around an operator of the user's own."""

    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(layers))
        self.scale = nn.ParameterList(torch.rand(2 * width) + 0.5 for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(layers))

    def forward(self, x: Tensor, target: Tensor | None = None) -> Any:
        for up, scale, down in zip(self.up, self.scale, self.down, strict=True):
            x = x + down(leaky_norm(up(x), scale, 0.1))
        return x if target is None else F.mse_loss(x, target)


class Swish(torch.autograd.Function):
    """`x * sigmoid(x)`, keeping `x` alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return gradient * s * (1 + x * (1 - s))


class CustomFunction(nn.Module):
    """A perceptron whose activation is a `torch.autograd.Function` of the user's own."""

    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(layers))

    def forward(self, x: Tensor, target: Tensor | None = None) -> Any:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(Swish.apply(up(x)))  # type: ignore[no-untyped-call]
        return x if target is None else F.mse_loss(x, target)


def _vectors(model: nn.Module, batch: int) -> dict[str, Any]:
    return {"x": floats(batch, SEQUENCE, 32), "target": floats(batch, SEQUENCE, 32, seed=2)}


PLAIN = (
    Row("nn.Transformer", "sequence to sequence", plain(Translator), _pair),
    Row("lstm", "next token", plain(LstmLanguageModel), _tokens),
    Row("unet", "class of every pixel", plain(UNet), _image_and_mask, note="batch norm behind convolutions with a bias", microbatches=1),
    Row("graph network", "class of every node", plain(GraphNetwork), _graph, note="the batch is the nodes of all graphs", microbatches=1),
    Row("dlrm", "click or not", plain(DLRM), _clicks),
    Row("widenet", "next token", plain(WideNet), _tokens, note="one attention and one set of experts for all layers"),
    Row("custom operator", "numbers", plain(CustomOperator), _vectors, note="no rule was written for it"),
    Row("custom autograd.Function", "numbers", plain(CustomFunction), _vectors),
)
