"""Compile each file of a folder with hls4ml and run its C simulation; prints a JSON line a file.

python run_hls4ml.py FOLDER     NAME.onnx, and NAME.npz with images and logits
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import hls4ml
import numpy as np
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.transformation.channels_last import ConvertToChannelsLastAndClean
from qonnx.util.cleanup import cleanup_model

PRECISION = "fixed<48,16>"  # of the images alone: every other type is written in the file


def compiled(path: Path, folder: str) -> Any:
    model = cleanup_model(ModelWrapper(str(path)))
    model = cleanup_model(model.transform(ConvertToChannelsLastAndClean()))
    config = hls4ml.utils.config_from_onnx_model(
        model, granularity="name", backend="Vitis", default_precision=PRECISION
    )
    found = hls4ml.converters.convert_from_onnx_model(
        model, output_dir=folder, io_type="io_stream", backend="Vitis", hls_config=config
    )
    found.compile()
    return found


def apart(path: Path) -> float:
    """Return how far logits are from the student's, for all images at once and for each alone."""
    given = np.load(path.with_suffix(".npz"))
    images = given["images"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        model = compiled(path, folder)
        if tuple(model.get_input_variables()[0].shape) != images.shape[1:]:
            images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))  # it wants channels last
        together = model.predict(images)
        alone = np.stack([model.predict(images[n : n + 1]).reshape(-1) for n in range(len(images))])
    return max(float(np.abs(found - given["logits"]).max()) for found in (together, alone))


warnings.simplefilter("ignore")
for file in sorted(Path(sys.argv[1]).glob("*.onnx")):
    said = {"name": file.stem, "apart": apart(file), "version": hls4ml.__version__}
    print(json.dumps(said), flush=True)
