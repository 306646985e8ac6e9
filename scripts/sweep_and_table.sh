#!/usr/bin/env bash
# Sourced by scripts after setup.sh: runs the sweep called $name with the script's arguments, then renders the table of the
# same name. From the environment: OUT, PROCESSES. Ends the script.
configs="$(cd "$(dirname "${BASH_SOURCE[0]}")/../configs" && pwd)"
OUT="${OUT:-results/$name}"
python -m eval.sweep "$configs/sweeps/$name.yaml" --out "$OUT" ${PROCESSES:+--parallel "$PROCESSES"} "$@" &&
    failed=0 || failed=$?
case " $* " in *" --dry-run "* | *" --detach "*) exit "$failed" ;; esac
[ "$failed" -le 1 ] || exit "$failed" # 1: some cells failed, the others make a table all the same

python -m eval.table "$configs/tables/$name.yaml" --results "$OUT"
exit "$failed"
