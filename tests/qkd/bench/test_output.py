"""`qkd bench --output`: where the result cannot be written, nothing is measured."""

from __future__ import annotations

from argparse import Namespace

import pytest

from qkd.bench.measuring import bench_models
from qkd.failures import UsageError


@pytest.mark.parametrize(("end", "words"), [("missing/n.json", "missing does not exist; create"), ("", "is a folder")])
def test_an_output_that_cannot_be_written_is_refused_before_measuring(tmp_path, end, words):
    with pytest.raises(UsageError, match=words):
        # Nothing else of the arguments is read.
        bench_models(Namespace(output=tmp_path / end), progress=None, calibration=None)
