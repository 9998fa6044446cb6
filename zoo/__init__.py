"""The zoo: small models of many kinds with random weights, one row each, and what is tried on every one of them.

    from zoo import MODELS
    model = MODELS["llama"].build()
    example = MODELS["llama"].inputs(model)
    loss = model(**example).loss

A model is added by a row in `language`, `vision`, `experts`, `plain` or `besides`. `python -m zoo` runs the rows and writes docs/models.md.
"""

from zoo.row import Row
from zoo.table import BESIDES, MODELS

__all__ = ["BESIDES", "MODELS", "Row"]
