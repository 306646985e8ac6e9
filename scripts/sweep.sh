#!/usr/bin/env bash
# A sweep from a YAML file: methods x budgets x tasks, in jobs on this machine or on a SLURM cluster.
#
#   bash scripts/sweep.sh configs/sweeps/table1_mini.yaml               the embedded model, minutes on a laptop
#   bash scripts/sweep.sh configs/sweeps/table1_mini.yaml --dry-run     lists the cells, runs nothing
#   bash scripts/sweep.sh configs/sweeps/table1.yaml --where slurm      partition, GPUs and time from the file
#   LIMIT=50 OUT=/tmp/try bash scripts/sweep.sh ...                     fewer questions, another folder
#
# The same command again goes on where it stopped. More: `mustdrop sweep --help`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

exec python -m mustdrop_command sweep "$@"
