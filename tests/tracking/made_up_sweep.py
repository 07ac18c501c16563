"""A small synthetic sweep shared by the tests of tracking, report and dashboards."""

from __future__ import annotations

from nipq_search.records import CurvePoint, TrialRecord

START = 1_700_000_000.0


def curve(trial: int, epochs: int = 3, *, late: float = 0.0) -> list[CurvePoint]:
    """Return the epochs of a trial; `late` shifts the timestamps, as after a repeated epoch."""
    return [
        CurvePoint(
            epoch=epoch,
            step=10 * epoch,
            phase="noise" if epoch == 1 else "tuning",
            timestamp=START + 100 * trial + epoch + late,
            metrics={"train_loss": 2.0 / epoch, "validation_accuracy": 0.5 + 0.1 * epoch},
        )
        for epoch in range(1, epochs + 1)
    ]


def complete(number: int, *, bits: float = 4, front: bool = False) -> TrialRecord:
    """Return a finished trial with the budget `bops: uniform <bits>`."""
    validation = 0.9 - 0.3 / bits**2 - 0.002 * number
    return TrialRecord(
        trial=number,
        state="COMPLETE",
        budget_label=f"bops: uniform {bits:g}",
        budget={"bops": 1e6 * bits**2},
        params={"lr": 0.01 * (number + 1), "lambda": 10, "noise_proxy": "uniform"},
        validation=validation,
        test=validation - 0.01 if front else None,
        metrics={"accuracy": validation, "loss": 1 - validation},
        cost={"bops": 0.98e6 * bits**2, "weight_bytes": 500.0 * bits},
        on_front=front,
        samples=1000,
        seconds=12.5,
        parent=0 if number else None,
        attempts=1,
        seed=1234 + number,
        started=START + 100 * number,
        ended=START + 100 * number + 50,
        strategy="ladder",
        folder=f"trials/{number}/attempt-1",
    )


def running(number: int) -> TrialRecord:
    """Return a running trial."""
    return TrialRecord(
        trial=number,
        state="RUNNING",
        budget_label="bops: uniform 3",
        params={"lr": 0.02, "lambda": 3},
        attempts=1,
        started=START + 100 * number,
        strategy="ladder",
    )


def failed(number: int, reason: str = "loss became NaN at step 7") -> TrialRecord:
    """Return a failed trial."""
    return TrialRecord(
        trial=number,
        state="FAIL",
        reason=reason,
        budget_label="bops: uniform 2.5",
        params={"lr": 0.9, "lambda": 100},
        attempts=2,
        started=START + 100 * number,
        ended=START + 100 * number + 5,
        strategy="ladder",
    )


def layers(number: int) -> list[dict[str, object]]:
    """Return the layers of a trial, as in `show --json`; the last one is in floating point."""
    names = ["stem.conv", "block1.conv1", "block1.conv2", "head"]
    return [
        {
            "name": name,
            "kind": "Linear" if name == "head" else "Conv2d",
            "macs": 1000 * (index + 1),
            "weight_bits": None if name == "head" else 2 + (number + index) % 5,
            "activation_bits": None if name == "head" else 3 + (number + index) % 4,
            "bops": 16_000 * (index + 1),
            "weight_bytes": 100.0 * (index + 1),
        }
        for index, name in enumerate(names)
    ]
