#!/usr/bin/env bash
# The sweep of configs/sweeps called $name, then the table of the same name. Sourced by scripts that set it; ends them.
#
# From the environment: OUT, PROCESSES. Arguments go to `mustdrop sweep`.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
configs="$(dirname "${BASH_SOURCE[0]}")/../configs"

OUT="${OUT:-results/$name}"
python -m mustdrop_command sweep "$configs/sweeps/$name.yaml" --out "$OUT" ${PROCESSES:+--parallel "$PROCESSES"} "$@" &&
    failed=0 || failed=$?
case " $* " in *" --dry-run "* | *" --detach "*) exit "$failed" ;; esac
[ "$failed" -le 1 ] || exit "$failed" # 1: some cells failed, the others make a table all the same

python -m mustdrop_command table "$configs/tables/$name.yaml" --results "$OUT"
exit "$failed"
