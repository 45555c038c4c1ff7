#!/usr/bin/env bash
# Stop the run on every worker: SIGTERM, which makes it write a checkpoint: stop.sh [--dry-run]
#
# What is still alive after TPU_STOP_SECONDS (300) is killed. Nothing running is fine.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

main() {
  read_arguments "$@"
  read_settings
  find_workers
  on_workers worker_script "$SCRIPTS/worker/run.sh" stop "$TPU_RUN" "${TPU_STOP_SECONDS:-300}" ||
    die "the run could not be stopped everywhere"
}

main "$@"
