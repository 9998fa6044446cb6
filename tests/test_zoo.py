"""The table of models: its rows, its page, and a few of its plans on real processes. `make zoo` runs them all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autopar.runtime.verification.launch import RankPool
from zoo import BESIDES, MODELS, Row
from zoo.page import line, replaced, summary, table
from zoo.run import WAYS, Found, Trial, run, workshop

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "models.md").read_text("utf-8")
NAMES = """gpt2 gpt_neox opt bloom falcon llama mistral qwen2 qwen3 gemma2 gemma3 phi3 olmo2 cohere starcoder2 bert roberta electra albert
distilbert deberta_v2 t5 bart vit swin convnext resnet efficientnet segformer clip siglip whisper mamba mamba2 rwkv mixtral qwen2_moe
qwen3_moe olmoe deepseek_v3 gpt_oss"""
LISTED = NAMES.split()
BY_TITLE = {way.title: way for way in WAYS}
SAMPLE = {
    "lstm": "batch on 2",
    "unet": "2 stages",
    "mamba2": "evaluation on 2",
    "graph network": "searched on 4",
    "dlrm": "searched on 4",
    "olmoe": "searched on 4",
    "custom operator": "searched on 4",
}


@pytest.mark.processes
@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample(ranks2: RankPool, ranks4: RankPool, name: str) -> None:
    way = BY_TITLE[SAMPLE[name]]
    found = run(MODELS[name], {2: ranks2, 4: ranks4}.__getitem__, (way,))
    (trial,) = found.trials
    assert found.ok and trial.worst < 1e-10, trial
    assert trial.share < 1.2 / way.ranks or name == "lstm"


def test_the_list_is_there_in_its_order() -> None:
    names = list(MODELS)
    assert names[: len(LISTED)] == LISTED
    assert len(names) >= len(LISTED) + 8 and not set(MODELS) & set(BESIDES)


def names(part: str) -> list[str]:
    """The models in a table."""
    lines = [text for text in part.split("-->")[1].splitlines() if text.startswith("| ")]
    return [text.split(" | ")[0].removeprefix("| ") for text in lines[2:]]


def test_the_page_has_every_row_in_its_order() -> None:
    models, besides = PAGE.split("## Tried besides")
    assert names(models) == list(MODELS) and "**" not in models.split("-->")[1]
    assert names(besides) == [name for name in BESIDES if name in names(besides)]
    assert "/site-packages/" not in PAGE


class Simple(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        y = self.layer(x)
        return y if target is None else (y - target).square().mean()


ROW = Row("simple", "numbers", lambda: Simple().train(), lambda model, batch: {"x": torch.ones(batch, 4), "target": torch.ones(batch, 4)})


def test_a_row_asks_with_a_loss_and_without() -> None:
    model = ROW.build().double()
    assert {name: item.dtype for name, item in ROW.inputs(model).items()} == {"x": torch.float64, "target": torch.float64}
    assert set(ROW.questions(model)) == {"x"}


def test_a_row_that_fails_shows_its_error() -> None:
    def wrong(model: nn.Module, batch: int) -> dict[str, Tensor]:
        return {"x": torch.ones(batch, 3)}

    told: list[Trial] = []
    found = run(replace(ROW, example=wrong), {}.__getitem__, WAYS[:2], told.append)
    assert not found.ok and len(told) == 2
    text = table([found])
    assert text.count("**error**") == 2 and "batch on 2, features on 2: TraceError: " in text
    assert "0 of 1 models are right in every column, 0 of 2 plans" in summary([found], 60)


def test_errors_stand_in_one_cell_without_paths() -> None:
    trial = Trial(BY_TITLE["batch on 2"], error="TraceError: /a/lib/b.py:3 `if x | y:` (in `l.0`)\n  Remedy: none")
    assert line(Found(ROW, trials=(trial,))).endswith("| batch on 2: TraceError: b.py:3 `if x \\| y:` (in `l.0`) |")


def test_cells() -> None:
    trials = (
        Trial(BY_TITLE["batch on 2"], ok=True, worst=3e-16, share=0.5, axes={"dp": "batch"}),
        Trial(BY_TITLE["features on 2"], ok=False, worst=0.2, where="gradient layer.weight", share=0.75, whole=(("lstm", 0.5),)),
        Trial(
            BY_TITLE["searched on 4"],
            ok=True,
            worst=0.0,
            share=0.25,
            axes={"dp": "batch", "tp": "out features, in features"},
            unruled=("a.b",),
        ),
    )
    text = table([Found(replace(ROW, note="a note"), 12, ("2 x 5 ops",), trials)])
    assert text.splitlines()[-1] == (
        "| simple | 12 | 2 x 5 ops | 3e-16, 50% | **2e-01** | 0, 25% |  |  |  | dp: batch; tp: features "
        "| no rule: `a.b`; features on 2: `lstm` 50% | a note; features on 2: off by 2.0e-01 in gradient layer.weight |"
    )


def test_a_part_of_the_page_is_replaced() -> None:
    page = "a\n<!-- begin x -->\n\nold\n<!-- end x -->\nb\n"
    assert replaced(page, "x", "new\n") == "a\n<!-- begin x -->\n\nnew\n\n<!-- end x -->\nb\n"


def test_the_workshop_has_as_many_ranks() -> None:
    assert [workshop(ranks).world_size for ranks in (1, 2, 4, 8)] == [1, 2, 4, 8]
