#!/usr/bin/env bash
# Delete the TPU and its queued resource: teardown.sh [--dry-run]
#
# Everything on the workers' disks is lost: run collect.sh first. It is not an error if there is none.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

main() {
  read_arguments "$@"
  read_settings
  local state
  state=$(queue_state)
  [[ $DRY_RUN == no ]] || state=ACTIVE
  if [[ -z $state ]]; then
    say "there is no queued resource $TPU_NAME in $TPU_ZONE: nothing to delete"
    return
  fi
  run gcloud compute tpus queued-resources delete "$TPU_NAME" "${PLACE[@]}" --force --quiet
  say "deleted $TPU_NAME, which was $state"
}

main "$@"
