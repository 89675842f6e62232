#!/usr/bin/env bash
# Measure a finished run on a board, then leave the file there and classify an image with it.
#
#     examples/on_a_board.sh runs/my-images pi@board photo.jpg
#
# The board needs Python 3 with venv (Debian: apt install python3-venv) and a login by key. The script creates ~/env there,
# with numpy, onnxruntime and Pillow; the toolkit itself is not needed on the board.
set -euo pipefail
run=${1:?a run folder} board=${2:?user@host} photo=${3:?an image}

# Debian refuses pip outside of a virtual environment
ssh "$board" 'test -x env/bin/python || python3 -m venv env; env/bin/pip install --quiet numpy onnxruntime Pillow'

qkd bench "$run" --on "ssh://$board" --python env/bin/python --int8-baseline
qkd report "$run"

# ssh joins its words and the board's shell splits them again: a fixed name needs no quotes there
name=photo.${photo##*.}
scp "$run"/export/{student.onnx,predict.py} "$board:"
scp "$photo" "$board:$name"
ssh "$board" env/bin/python predict.py "$name" --model student.onnx --top 3
