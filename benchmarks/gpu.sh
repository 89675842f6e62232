#!/usr/bin/env bash
# Checks the toolkit on a GPU, measures a training step there, and trains ladders on real images, within a time budget.
#
#   benchmarks/gpu.sh --data FOLDER                  # everything, at most 9 minutes; results in benchmarks/results
#   benchmarks/gpu.sh --steps "check measure"        # needs no images
#   benchmarks/gpu.sh --device cpu --tiny            # tries the script itself, with made-up images
#
#   --budget S      seconds in all (default 530)
#   --data FOLDER   train and test as .npz or .packed.npz
#   --pieces GLOB   instead: a tar file of them in pieces (split -b 45M), put together in --scratch
#   --wheels FOLDER installs what is missing from wheels, without a network
#   --out FOLDER    where records go: gpu_checks.json, gpu_steps.json, gpu_runs.json, gpu_ladder_SET.json and .safetensors
#   --scratch FOLDER  images, packages and compiled code (default /tmp/qkd-gpu)
#   --steps LIST    of check, runs (whole runs: alone, NCCL, two processes on one GPU), warm (compiles the steps of the
#                   ladder on made-up images, for a later call), measure, ladder
#   --set NAME      of the ladder: cifar10 (default) or fashion-mnist
#   --floats FILE   weights of a former ladder, whose float nets are not trained again
#   --no-test       do not read the test set: `python benchmarks/gpu/score.py` scores the weights, later and elsewhere
#   --seeds LIST    of the ladder (default "0 1 2"), trained side by side
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

budget=530 data= pieces= wheels= floats= set=cifar10 no_test= out=benchmarks/results scratch=/tmp/qkd-gpu steps="check measure ladder" seeds="0 1 2"
device=cuda tiny= eager=
while [ $# -gt 0 ]; do
    case $1 in
        --budget | --data | --pieces | --set | --floats | --wheels | --out | --scratch | --steps | --seeds | --device)
            [ $# -gt 1 ] || { echo "gpu.sh: $1 needs a value" >&2; exit 2; }
            printf -v "${1#--}" %s "$2"; shift 2 ;;
        --tiny) tiny=--tiny; shift ;;
        --no-test) no_test=--no-test; shift ;;
        --eager) eager=--eager; shift ;;
        *) echo "gpu.sh: unknown option $1; the head of this file lists them" >&2; exit 2 ;;
    esac
done
end=$((SECONDS + budget))
left() { echo $((end - SECONDS)); }
mkdir -p "$out" "$scratch"

python=${PYTHON:-python3}
[ -z "${PYTHON:-}" ] && [ -z "$wheels" ] && [ -x .venv/bin/python ] && python=.venv/bin/python
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export TORCHINDUCTOR_CACHE_DIR=$scratch/inductor  # a second call finds what the first compiled
if [ -n "$wheels" ]; then
    [ -e "$scratch/site/.done" ] || {
        $python -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
            --target "$scratch/site" "$wheels"/*.whl && touch "$scratch/site/.done"
    } || exit 1
    PYTHONPATH=$PWD:$scratch/site
fi
[ -n "$tiny" ] && eager=--eager && export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

status=0
for step in $steps; do
    case $step in
        check)
            timeout "$(left)" $python benchmarks/gpu/check.py --device "$device" --out "$out" $eager || status=1 ;;
        runs)
            timeout "$(left)" $python benchmarks/gpu/whole_runs.py --device "$device" --out "$out" || status=1 ;;
        warm)
            timeout "$(left)" $python benchmarks/gpu/ladder.py --device "$device" --out "$scratch/warm" --set "$set" \
                --budget-s 600 --made-up 2000 --most-epochs 1 --seeds 0 ${floats:+--floats "$floats"} $eager || status=1 ;;
        measure)
            share=$(($(left) / 3)); [ "$steps" = "${steps/ladder/}" ] && share=$(($(left) - 10))
            timeout "$(left)" $python benchmarks/gpu/measure.py --device "$device" --out "$out" \
                --budget-s "$share" $eager $tiny || status=1 ;;
        ladder)
            if [ -n "$pieces" ]; then
                # shellcheck disable=SC2086 - the pieces are a pattern
                cat $pieces | tar -xf - -C "$scratch" || exit 1
                data=$(dirname "$(find "$scratch" -path "*$set*" -name 'train*.npz' | head -n 1)")
            fi
            timeout "$(left)" $python benchmarks/gpu/ladder.py --device "$device" --out "$out" \
                --budget-s "$(($(left) - 8))" --seeds $seeds --set "$set" ${data:+--data "$data"} \
                ${floats:+--floats "$floats"} $no_test $eager $tiny || status=1 ;;
        *) echo "gpu.sh: unknown step $step; there are check, runs, warm, measure and ladder" >&2; exit 2 ;;
    esac
done
exit $status
