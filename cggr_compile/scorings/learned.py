"""``scoring="learned"``."""

from __future__ import annotations

from cggr_compile.scorings.record import Scoring

SCORING = Scoring(
    name="learned",
    doc="‖p - onehot(label)‖ of the model's final p, as a small network predicts it from the hidden state at "
    "`router_layers` and the label's row of the head; it is trained beside the model, at every step, on the rows that "
    "carry loss",
    formula=None,
    predicted=True,
)
