#!/usr/bin/env bash
# A run on a SLURM cluster. Nothing is submitted here: --dry-run shows the batch script, also where there is no SLURM.
#
#   bash examples/slurm.sh [FOLDER]        FOLDER: where examples/train.sh has left its shards
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
longhaul() { "$python" "$root/launch/cli.py" "$@"; }
folder=${1:-$root/runs/examples/train}
test -d "$folder/shards" || { echo "$folder/shards is not there: run examples/train.sh first" >&2; exit 2; }
cd "$folder"

echo "== four ranks on two nodes; on GPUs: --gpus-per-node 8 instead of 0 and --tasks-per-node"
longhaul submit mine.yaml run.dir=on-the-cluster train.micro_batch_size=4 --nodes 2 --gpus-per-node 0 --tasks-per-node 2 --time 12:00:00 \
  --dry-run > submit.sbatch

echo "== then, without --dry-run, the job requeues itself until the run is done:"
echo "longhaul submit --status on-the-cluster      how it stands"
echo "longhaul submit --cancel on-the-cluster      save and stop; submitted again, it goes on"

echo "== how the run of examples/train.sh stands"
longhaul submit --status run
echo "made in $folder: submit.sbatch ($(grep -c '^#SBATCH' submit.sbatch) options of SLURM, and the script)"
