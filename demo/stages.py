"""The curriculum of the base model: what its slips look like, stage by stage.

A stage is a set of options of the slip generator and a training run that starts from the stage before. It is
repeated with new slips until the model reads TARGET of the stage's held-out slips without a mistake.

What holds such a model back is finding a digit, not reading it, and what hides a digit is the paper's grain:
at first every one of the image tokens counts the same, and the grain of all the empty ones together is louder
than the one that carries ink. So the first slips are clean and their entries always at the same places; then
entries move, slips tilt, grain appears and digits are bent, a little more in every stage.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from slips import Form

TARGET = 0.9  # share of held-out slips read without a mistake
CLEAN = Form(hand="printed", jitter=0, rotation=0.0, noise=0.0, vary=0.0)


@dataclass(frozen=True)
class Stage:
    """One stage: the slips, how many of them a round takes, and how fast it learns."""

    name: str
    form: Form
    slips: int
    learning_rate: float = 5e-4
    rounds: int = 3  # at most


STAGES = (
    Stage("clean", CLEAN, 9600),
    Stage("a little", replace(CLEAN, jitter=1, rotation=0.5, noise=2.0, vary=0.3), 9600),
    Stage("whole", Form(hand="printed", jitter=3), 19200),
)
