#!/usr/bin/env bash
# Runs metajax on this machine; every argument but -n is one of `python -m metajax.main`:
#
#   launch/local.sh --config=configs/maml_omniglot.py          one process that uses all GPUs
#   launch/local.sh -n 4 --config=configs/maml_omniglot.py     four processes, the GPUs dealt out to them
#
# Without a GPU a process has JAX_NUM_CPU_DEVICES devices, one by default. The exit status is that of the first process,
# in their order, that did not end well.
set -uo pipefail

processes=1
if [[ ${1:-} == -n ]]; then
  processes=${2:-}
  shift 2 || shift
fi
if [[ ! $processes =~ ^[1-9][0-9]*$ ]]; then
  echo "local.sh: -n takes a number of processes, not '$processes'" >&2
  exit 2
fi
python=${PYTHON:-python}
if ((processes == 1)); then
  exec "$python" -m metajax.main "$@"
fi

gpus=()
if [[ ${JAX_PLATFORMS:-} != cpu ]]; then
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    [[ $CUDA_VISIBLE_DEVICES == -1 ]] || IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
  elif command -v nvidia-smi >/dev/null; then
    mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | grep -x '[0-9]*')
  fi
fi
if ((${#gpus[@]} % processes)); then
  echo "local.sh: ${#gpus[@]} GPUs cannot be dealt evenly to $processes processes" >&2
  exit 2
fi
share=$((${#gpus[@]} / processes))
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])') || exit

pids=()
forward() {
  kill "-$1" "${pids[@]}" 2>/dev/null
}
trap 'forward TERM' TERM HUP
trap 'forward INT' INT
set -m # else bash has what runs in the background ignore SIGINT
for ((k = 0; k < processes; k++)); do
  if ((share)); then
    visible=$(IFS=, && echo "${gpus[*]:k*share:share}")
    export CUDA_VISIBLE_DEVICES=$visible
  fi
  "$python" -m metajax.main "$@" --coordinator="127.0.0.1:$port" --num_processes="$processes" --process_id="$k" &
  pids+=($!)
done

# When a process dies the others notice, say so and end, so that all there is to do is to wait.
status=0
for pid in "${pids[@]}"; do
  wait "$pid"
  while kill -0 "$pid" 2>/dev/null; do # a signal ended the wait, not the process
    wait "$pid"
  done
  wait "$pid" # the shell remembers: whatever came between, this is the status of the process
  ended=$?
  ((status)) || status=$ended
done
exit "$status"
