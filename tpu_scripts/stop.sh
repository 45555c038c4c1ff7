#!/usr/bin/env bash
# Stop the run on every worker: SIGTERM, on which it writes a checkpoint: stop.sh [--dry-run]
#
# Processes still running after TPU_STOP_SECONDS (300) are killed. It is not an error if none runs.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

main() {
  read_arguments "$@"
  read_settings
  find_workers
  on_workers worker_script "$SCRIPTS/worker/run.sh" stop "$TPU_RUN" "${TPU_STOP_SECONDS:-300}" ||
    die "the run could not be stopped everywhere"
}

main "$@"
