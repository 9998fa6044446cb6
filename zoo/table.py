"""All rows in the table's order."""

from __future__ import annotations

from zoo import besides, experts, language, plain, vision
from zoo.row import Row

_LISTED = (
    *language.DECODERS,
    *language.ENCODERS,
    *language.ENCODER_DECODERS,
    *vision.VISION,
    *language.STATE_SPACE,
    *experts.EXPERTS,
    *plain.PLAIN,
)
MODELS: dict[str, Row] = {row.name: row for row in _LISTED}
BESIDES: dict[str, Row] = {row.name: row for row in besides.BESIDES_ROWS}
assert len(MODELS) == len(_LISTED)
