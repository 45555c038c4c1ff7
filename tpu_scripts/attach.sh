#!/usr/bin/env bash
# Follow the log of one worker: attach.sh [--dry-run] [WORKER]
#
# Default: worker 0, the only one that logs every step. Ctrl-C does not stop the run.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

main() {
  read_arguments "$@"
  read_settings
  local worker=${ARGUMENTS[0]:-0}
  [[ $worker =~ ^[0-9]+$ ]] || die "worker $worker must be a number, from 0"
  worker_command "$worker" "tail -n 100 -F flax-distil-runs/$TPU_RUN/log"
}

main "$@"
