#!/usr/bin/env bash
# Measure a finished run on a board, then leave the file there and classify an image with it.
#
#     examples/on_a_board.sh runs/my-images pi@board photo.jpg [env/bin/python]
#
# The board needs a Python with numpy and onnxruntime (and Pillow for image files), and nothing of this toolkit: the fourth
# word, python3 without it. On Debian: python3 -m venv env && env/bin/pip install numpy onnxruntime pillow
set -euo pipefail
run=${1:?a run folder} board=${2:?user@host} photo=${3:?an image} python=${4:-python3}

qkd bench "$run" --on "ssh://$board" --python "$python" --int8-baseline
qkd report "$run"

scp "$run"/export/{student.onnx,predict.py,labels.txt,preprocess.json} "$photo" "$board:"
ssh "$board" "$python" predict.py "$(basename "$photo")" --model student.onnx --top 3
