"""Training on the labelled images alone, the baseline of all methods."""

from __future__ import annotations

from collections.abc import Mapping

from corrmatch.data.streams import LABELED, Stream
from corrmatch.methods.base import Batch, Method, Progress, Step


class Supervised(Method):
    """Cross-entropy on labelled images."""

    needs_unlabeled = False
    pseudo_labels = False

    def streams(self) -> Mapping[str, Stream]:
        """Labelled images."""
        return {"labeled": LABELED}

    def forward(self, batch: Batch, progress: Progress) -> Step:
        """Cross-entropy, and that of the propagated logits if there is a correlation head."""
        return self.learn_labels(batch["labeled"])
