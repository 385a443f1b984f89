"""The measurement of a case: errors, memory and times of its contenders. Its state can be read at any time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from harness import measure
from harness.case import Case
from harness.measure import Contender

QUICK = 1.0  # seconds: a faster variant is timed twice before the fastest of its family is chosen
FIELDS = ("op", "size", "exponentials", "workload", "positions", "batch", "elements", "unit", "tolerance")


class Measurement:
    """The results of a case up to now: a row for each contender that had its turn, and the seconds of its rounds.

    An exception of a contender ends this contender alone. The others are measured.
    """

    def __init__(self, case: Case, device: str):
        self.case, self.device = case, device
        self.expected = case.expected()
        self.rows: dict[str, dict[str, Any]] = {}
        self.samples: dict[str, dict[str, list[float]]] = {}
        self.trials: dict[str, float] = {}  # seconds of contenders that have a family

    def contenders(self, *, compiled: bool) -> list[Contender]:
        """Contenders that are not compiled, or compiled ones, if any, together with corrmatch."""
        wanted = [c for c in self.case.contenders if c.compiles == compiled]
        ours = [c for c in self.case.contenders if c.ours]
        return [*ours, *wanted] if compiled and wanted else wanted

    def measure(self, contenders: Sequence[Contender], seconds: float) -> Iterator[None]:
        """Compares new contenders with the oracle, then measures memory and times. Yields after each step."""
        for contender in contenders:
            if contender.name not in self.rows:
                self._verify(contender)
                yield
        for contender in self._sound(contenders):
            if "peak_extra_bytes" not in self.rows[contender.name]:
                self._attempt(contender, lambda contender=contender: self._prepare(contender))
                yield
        racing = self._sound(contenders)
        for i, outcome in measure.race(racing, seconds, self.device):
            name = racing[i].name
            if isinstance(outcome, Exception):
                self._failed(racing[i], outcome)
                continue
            for timed, taken in outcome.items():
                self.samples.setdefault(name, {}).setdefault(timed, []).append(taken)
            yield

    def result(self) -> dict[str, Any]:
        """The case in the form of the JSON. Contenders that are right and were not timed yet are "untimed"."""
        rows = [dict(row) for row in self.rows.values()]
        for row in rows:
            if row["status"] == "ok" and row["name"] in self.samples:
                samples = self.samples[row["name"]]
                row["times"] = {timed: measure.summary(seconds) for timed, seconds in samples.items()}
            elif row["status"] == "ok":
                row["status"] = "untimed"
        return {name: getattr(self.case, name) for name in FIELDS} | {"contenders": rows}

    def _sound(self, contenders: Sequence[Contender]) -> list[Contender]:
        return [contender for contender in contenders if self.rows[contender.name]["status"] == "ok"]

    def _verify(self, contender: Contender) -> None:
        """Compares a contender with the oracle. Only the fastest of a family stays."""
        row: dict[str, Any] = {"name": contender.name, "ours": contender.ours, "family": contender.family}
        row["status"] = "ok"
        self.rows[contender.name] = row
        if contender.missing is not None:
            row["status"] = contender.missing
            return
        trial = self._attempt(contender, lambda: self._trial(contender, row))
        if trial is None or contender.family is None or row["status"] != "ok":
            return
        self.trials[contender.name] = trial
        family = [r for r in self.rows.values() if r["family"] == row["family"] and r["status"] == "ok"]
        for slower in sorted(family, key=lambda r: self.trials[r["name"]])[1:]:
            slower["status"] = "slower variant"

    def _trial(self, contender: Contender, row: dict[str, Any]) -> float:
        start = measure.now(self.device)
        answer = contender.both() if contender.answer is None else contender.answer()
        trial = measure.now(self.device) - start
        row["error"] = self.case.error(answer, self.expected)
        if not row["error"] <= self.case.tolerance:  # NaN is not
            row["status"] = "wrong"
        elif contender.family is not None and trial < QUICK:
            start = measure.now(self.device)
            contender.both()
            trial = min(trial, measure.now(self.device) - start)
        return trial

    def _prepare(self, contender: Contender) -> None:
        row = self.rows[contender.name]
        peak: dict[str, int | None] = {}
        with torch.no_grad():
            peak["forward"] = measure.peak_extra_bytes(contender.forward, self.device)
        if contender.leaves:
            peak["both"] = measure.peak_extra_bytes(contender.both, self.device)
        if self.device == "cuda" and not contender.on_host:
            try:
                contender.capture()
            except Exception as error:  # noqa: BLE001 - a peer may do what a graph cannot hold
                contender.graphs.clear()
                row["no_graph"] = first_line(error)
        row["peak_extra_bytes"] = peak

    def _attempt(self, contender: Contender, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # noqa: BLE001 - out of memory, no code for this device, a compiler's error
            self._failed(contender, error)
            return None

    def _failed(self, contender: Contender, error: Exception) -> None:
        self.rows[contender.name] |= {"status": "failed", "reason": first_line(error)}


def first_line(error: Exception) -> str:
    """The type and the first line of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
