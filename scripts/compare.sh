#!/usr/bin/env bash
# MustDrop beside its rivals: every method at 192, 128, 64 and 32 vision tokens on the whole suite, then the table, the
# plots of accuracy against tokens, FLOPs and time, and paired confidence intervals, all in the results folder.
#
#   bash scripts/compare.sh                                  the embedded model on the synthetic suite
#   LIMIT=300 PROCESSES=2 OUT=/tmp/try bash scripts/compare.sh
#   bash scripts/compare.sh --dry-run                        lists the cells and what is out of reach, runs nothing
#   bash scripts/compare.sh --any-commit                     methods were added since: only what is missing is run,
#                                                            the table says which commit made which rows
#
# From the environment: MODEL (its thresholds come from configs/methods/MODEL, see mustdrop calibrate), LIMIT (questions
# per task), OUT, PROCESSES, SWEEP (another list of methods). Arguments go to `mustdrop sweep`; the same command
# again goes on where it stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

OUT="${OUT:-results/compare}"
python -m mustdrop_command sweep "${SWEEP:-$root/configs/sweeps/compare.yaml}" --out "$OUT" ${PROCESSES:+--parallel "$PROCESSES"} "$@" &&
    failed=0 || failed=$?
case " $* " in *" --dry-run "* | *" --detach "*) exit "$failed" ;; esac
[ "$failed" -le 1 ] || exit "$failed" # 1: some cells failed, the others make a table all the same

python -m mustdrop_command table "$root/configs/tables/compare.yaml" --results "$OUT" --format all --out "$OUT"
python -m mustdrop_command plots "$OUT" >/dev/null
for reference in mustdrop mustdrop_plus rival; do
    python -m mustdrop_command significance "$OUT" --against "$reference" --format github >"$OUT/against-$reference.md" ||
        rm -f "$OUT/against-$reference.md" # a list of methods without this one
done
echo "table: $OUT/compare.md, plots: $OUT/plots, paired intervals: $OUT/against-*.md" >&2
exit "$failed"
