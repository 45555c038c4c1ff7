#!/usr/bin/env bash
# Runs on a worker, as the command of a run: ray.sh WORKER HEAD COMMAND…
#
# Worker 0 starts a Ray cluster at the address HEAD and runs COMMAND in it; the others join, and
# leave when it ends.
set -euo pipefail

main() {
  local worker=$1 address=$2:6379 tries=0
  export RAY_USAGE_STATS_ENABLED=0
  trap 'ray stop >/dev/null' EXIT
  trap 'exit 143' TERM
  if [[ $worker == 0 ]]; then
    ray start --head --node-ip-address="$2" --port=6379 --include-dashboard=false
    RAY_ADDRESS=$address "${@:3}"
    return
  fi
  until ray start --address="$address"; do
    ((++tries < 60)) || return 1
    sleep "${RAY_POLL_SECONDS:-5}"
  done
  while ray status --address="$address" >/dev/null 2>&1; do
    sleep "${RAY_POLL_SECONDS:-5}"
  done
}

main "$@"
