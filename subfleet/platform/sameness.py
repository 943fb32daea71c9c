"""Which settings may differ between two runs that give the same bits."""

from __future__ import annotations

# What may differ between two runs that must give the same bits...
NOT_OF_THE_RESULT = frozenset(
    {
        *("run.hosts", "run.stream", "run.max_seconds"),
        *("run.checkpoint_every", "run.keep_checkpoints"),
    }
)
# ... and what only says when a run ends, not what its rounds are.
WHEN_TO_STOP = frozenset({"run.rounds", "run.target_accuracy"})
