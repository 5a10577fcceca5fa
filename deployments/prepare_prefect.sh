#!/usr/bin/env bash
# Makes the work pools where they are missing and deploys everything. Run it as often as you like, from the checkout:
#
#   CHARM_GPU_RUNS=2 deployments/prepare_prefect.sh
#
# prefect.yaml cannot make pools. CHARM_GPU_RUNS is how many flow runs may use GPUs at once, over all workers of the pool
# gpu: one per machine where a run takes all GPUs, one per GPU where every worker sees one (default: 1).
set -euo pipefail
cd "$(dirname "$0")/.."
export CHARM_CHECKOUT="${CHARM_CHECKOUT:-$PWD}"

for pool in cpu gpu shards; do
    prefect work-pool inspect "$pool" >/dev/null 2>&1 || prefect work-pool create "$pool" --type process
done
prefect work-pool set-concurrency-limit gpu "${CHARM_GPU_RUNS:-1}"
prefect --no-prompt deploy --all
