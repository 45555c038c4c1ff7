#!/usr/bin/env bash
# Fetch every worker's log, and results from worker 0: collect.sh [--dry-run] FOLDER [PATH…]
#
# Logs go to FOLDER/worker-<n>/. A PATH is relative to the checkout on worker 0 (runs/distill);
# files in the bucket are not fetched.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

main() {
  read_arguments "$@"
  read_settings
  local folder=${ARGUMENTS[0]:-} path
  [[ -n $folder ]] || die "no folder: collect.sh FOLDER [PATH…]"
  find_workers
  on_workers worker_sends_log "$folder" || die "not all logs could be fetched"
  for path in "${ARGUMENTS[@]:1}"; do
    run gcloud compute tpus tpu-vm scp "$TPU_NAME:flax-distil/$path" "$folder" \
      "${REACH[@]}" --worker=0 --recurse
  done
}

worker_sends_log() {
  run mkdir -p "$2/worker-$1"
  run gcloud compute tpus tpu-vm scp "$TPU_NAME:flax-distil-runs/$TPU_RUN" "$2/worker-$1" \
    "${REACH[@]}" --worker="$1" --recurse
}

main "$@"
