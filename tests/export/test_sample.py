"""Samples: written and read whole, checked, filled with what this machine computes."""

from __future__ import annotations

import numpy as np
import pytest

from export import ExportError, Sample, expect, read_sample, sample_size, write_sample, write_view
from export.runtime import open_session
from export.sample import sample_bytes

IMAGES = np.random.default_rng(0).standard_normal((20, 3, 15, 15), dtype=np.float32)


def test_round_trip(tmp_path):
    sample = Sample(IMAGES, np.arange(20), {"run/student": IMAGES[:, 0, 0, :5]})
    back = read_sample(write_sample(tmp_path / "s.npz", sample))
    np.testing.assert_array_equal(back.images, IMAGES)
    np.testing.assert_array_equal(back.labels, np.arange(20))
    assert list(back.logits) == ["run/student"]
    assert sample_bytes(back) == sample_bytes(sample) == (tmp_path / "s.npz").read_bytes()
    assert read_sample(write_sample(tmp_path / "s.npz", Sample(IMAGES))).labels is None


def test_a_sample_stays_small():
    assert sample_size((1, 8, 8)) == 256 and sample_size((1, 8, 8), 10) == 10
    assert sample_size((3, 224, 224)) == 27
    assert sample_size((3, 4096, 4096)) == 1


def test_expected_logits_are_computed_where_they_are_missing(residual, tmp_path):
    path = write_view(residual, [(1, 3, 15, 15)], tmp_path / "n.onnx").path
    given = np.zeros((20, 5), np.float32)
    sample = expect(Sample(IMAGES, None, {"known": given, "other": given}), {"known": path, "new": path})
    want = open_session(path, optimize=False).run(None, {"images": IMAGES})[0]
    np.testing.assert_array_equal(sample.logits["new"], want)
    assert set(sample.logits) == {"known", "new"} and sample.logits["known"] is given
    with pytest.raises(ValueError, match=r"n\.onnx: it takes .* but the sample's images are \(20, 3, 15, 14\)"):
        expect(Sample(np.ascontiguousarray(IMAGES[..., 1:])), {"new": path})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"images": IMAGES.astype(np.float64)}, "images must be float32"),
        ({"images": IMAGES[:0]}, "images must be float32"),
        ({"images": np.full_like(IMAGES, np.nan)}, "not finite"),
        ({"images": IMAGES, "labels": np.arange(3)}, "labels must be 20 integers"),
        ({"images": IMAGES, "labels": np.ones(20)}, "labels must be 20 integers"),
        ({"images": IMAGES, "logits.a": np.ones((3, 2), np.float32)}, r"logits of a must be float \[20, classes\]"),
        ({"images": IMAGES, "prepared": "a\nb"}, "prepared must be a line"),
        ({"images": IMAGES, "prepared": "a" * 2001}, "prepared must be a line of at most 2,000 characters"),
        ({"pictures": IMAGES}, "it has no array `images`, only pictures"),
        ({"images": np.array([{}], object)}, "not an npz file of plain arrays"),
    ],
)
def test_samples_that_do_not_fit(tmp_path, values, message):
    np.savez(tmp_path / "s.npz", **values)
    with pytest.raises(ValueError, match=f"s.npz: .*{message}"):
        read_sample(tmp_path / "s.npz")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04broken", b"\x80\x04pickle", b"text"])
def test_what_is_no_npz_file(tmp_path, content):
    (tmp_path / "s.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"s\.npz: not an npz file of plain arrays"):
        read_sample(tmp_path / "s.npz")


def test_a_single_array_is_no_sample(tmp_path):
    with (tmp_path / "s.npz").open("wb") as stream:
        np.save(stream, IMAGES)
    with pytest.raises(ValueError, match=r"not an npz file of plain arrays"):
        read_sample(tmp_path / "s.npz")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no sample file at"):
        read_sample(tmp_path / "none.npz")
    with pytest.raises(ExportError, match="does not exist"):
        write_sample(tmp_path / "none" / "s.npz", Sample(IMAGES))
