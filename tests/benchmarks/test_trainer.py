"""`python -m benchmarks --case trainer`: what it measures is one loss, and another one gives no
numbers."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
from benchmarks.measure.isolated import MeasurementError
from benchmarks.suites import trainer

pytestmark = pytest.mark.trainers
SIZES = {"B": 1, "T": 16, "d": 16, "L": 2, "V": 64}


def test_a_case_has_times_ratios_and_peaks_of_all_three():
    case = trainer.measure_case(SIZES, "float32", 1, 2)
    assert list(case["rows"]) == [trainer.PLAIN, "ntp", "ntp + nitp"]
    for row in case["rows"].values():
        assert row["milliseconds"]["median"] > 0 and row["rounds"] == 2 and row["peak_bytes"] >= 0
    assert case["rows"][trainer.PLAIN]["times_plain"]["median"] == 1
    assert "ntp + nitp" in trainer.table(case)


def test_another_loss_gives_no_numbers(monkeypatch):
    monkeypatch.setitem(trainer.SPECS, "ntp", "2*ntp")
    with pytest.raises(MeasurementError, match="NTP is"):
        trainer.measure_case(SIZES, "float32", 1, 1)
