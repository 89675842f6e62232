"""The cost of a search beside the published one's."""

from __future__ import annotations

from pathlib import Path

from qkd.files import write_bytes
from qkd.search import Journal, Score, cost_report, published_cost
from qkd.search.cost import cost_of_setting, ours_at_published


def test_the_published_search_reads_what_the_sheet_says() -> None:
    cost = published_cost()
    assert cost.trained_images == 16 * 200 * 31 * 128 == 12_697_600
    assert cost.validated_images == 16 * 200 * 45_952 == 147_046_400


def test_ours_validates_at_least_three_times_less_for_the_same_setting() -> None:
    ours = ours_at_published()
    assert ours.validated_images == (66 * 16 + 4) * 46_000
    assert published_cost().validated_images / ours.validated_images >= 3
    assert ours.trained_images == (198 * 16 + 2 * 4) * 31 * 128 <= published_cost().trained_images


def test_a_run_is_counted_as_it_was(tmp_path: Path) -> None:
    journal = Journal(tmp_path, role="teacher", seed=0, members=4, epochs=7, interval_epochs=3, fingerprint={})
    while turns := journal.turns():
        for turn in turns:
            sha256 = write_bytes(turn.result, b"state")
            journal.record(turn.member, Score(0.1 * turn.member, False, sha256, turn.epochs * 48, 20, 0.25))
    report = cost_report(journal, 20)
    setting = cost_of_setting(
        members=4, epochs=7, interval_epochs=3, train_images=50, val_images=20, batch_size=16
    )  # fmt: skip
    assert report.run == setting and setting.validated_images == 9 * 20 and setting.trained_images == 25 * 48
    assert report.seconds == 9 * 0.25
    assert report.run_every_epoch.validated_images == 25 * 20
    assert report.to_json()["run_validates_less_by"] == 25 / 9
    assert "scoring every epoch, as published, would have validated 2.78 times as many" in report.to_text()
