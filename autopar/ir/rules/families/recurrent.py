"""Recurrent layers and cells: every step reads all of the state, so the batch is what splits."""

from __future__ import annotations

from autopar.ir.rules.nest import Call, Nest, Term


def layers(call: Call) -> Nest | None:
    """`lstm(x, (h, c), weights, has_biases, num_layers, dropout, train, bidirectional, batch_first) -> y, h, c`; `gru`, `rnn_tanh` and
    `rnn_relu` have one state and its result. `x`, `y`: `(steps, batch, ...)`, or `(batch, steps, ...)` with `batch_first`; states:
    `(layers, batch, ...)`. Without a batch, and of packed sequences, there is no rule."""
    x = call.operands[0].shape
    states = len(call.outputs) - 1
    if len(x) != 3 or any(len(value.shape) != 3 for value in (*call.operands[1 : 1 + states], *call.outputs)):
        return None
    sequence: Term = (("b",), (), ()) if call.op.arg(8, "batch_first", False) else ((), ("b",), ())
    state: Term = ((), ("b",), ())
    weights = tuple(((),) * len(value.shape) for value in call.operands[1 + states :])
    batch = x[0] if sequence[0] else x[1]
    return Nest({"b": batch}, (sequence, *(state,) * states, *weights), (sequence, *(state,) * states))


def cell(call: Call) -> Nest | None:
    """`lstm_cell(x, (h, c), weights ...) -> h, c`; `gru_cell`, `rnn_tanh_cell`, `rnn_relu_cell` have one state. `x`, states:
    `(batch, ...)`."""
    states = len(call.outputs)
    if any(len(value.shape) != 2 for value in call.operands[: 1 + states]):
        return None
    row: Term = (("b",), ())
    weights = tuple(((),) * len(value.shape) for value in call.operands[1 + states :])
    return Nest({"b": call.operands[0].shape[0]}, ((row,) * (1 + states) + weights), (row,) * states)
