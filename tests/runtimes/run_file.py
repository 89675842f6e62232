"""Run files of the judge with numpy and whatever onnxruntime this Python finds; prints a JSON line a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

for path in sorted(Path(sys.argv[1]).glob("*.onnx")):
    given = np.load(path.with_suffix(".npz"))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    apart = []
    for size in (1, len(given["images"])):
        batches = np.split(given["images"], len(given["images"]) // size)
        found = np.concatenate([session.run(["logits"], {"images": batch})[0] for batch in batches])
        apart.append(float(np.abs(found - given["logits"]).max()))
    print(json.dumps({"name": path.stem, "apart": max(apart), "version": onnxruntime.__version__}), flush=True)
