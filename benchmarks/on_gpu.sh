#!/usr/bin/env bash
# Everything of this project that needs a GPU, the most telling first, in at most twenty minutes:
#
#     bash benchmarks/on_gpu.sh [FOLDER]
#
# Each part has a time limit and writes its output into FOLDER (default: runs/on_gpu) as soon as it ends, so a machine
# that is taken away in the middle costs one part. A part that fails does not stop the others; the summary says which
# did. Copy the folders of results that are worth keeping to docs/results.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
folder=${1:-runs/on_gpu}
device=${DEVICE:-cuda}
mkdir -p "$folder"
: > "$folder/summary.txt"

part() {  # part NAME SECONDS COMMAND...: run one part, keep its output, note how it ended
    local name=$1 limit=$2 begin=$SECONDS
    shift 2
    echo "==> $name: $*"
    timeout "$limit" "$@" > "$folder/$name.log" 2>&1
    local status=$?
    echo "$name: exit $status after $((SECONDS - begin)) s" | tee -a "$folder/summary.txt"
}

part machine 60 "$python" -c "from benchmarks.machine import describe; print(describe('$device'))"
part tests 300 "$python" -m pytest -q -m gpu -p no:cacheprovider
part pass 240 "$python" -m benchmarks.spectral_pass --device "$device" --times 3 --out "$folder/pass"
part epoch 150 "$python" -m benchmarks.epoch --device "$device" --rounds 3 --out "$folder/epoch"
part step 120 "$python" -m benchmarks.step --device "$device" --times 11 --out "$folder/step"
part accuracy 240 "$python" -m benchmarks.accuracy --device "$device" --epochs 2 --out "$folder/accuracy"
for model in .real/smollm2-*; do  # what `make real` brings
    if [ -d "$model" ]; then
        part smollm2 90 "$python" -m farms_tb.cli analyze "$model" --device "$device" --no-full
    fi
done
echo "==> Results in $folder"
grep -v "exit 0" "$folder/summary.txt" && exit 1
exit 0
