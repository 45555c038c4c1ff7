#!/usr/bin/env bash
# Follow the log of one worker: attach.sh [--dry-run] [WORKER]
#
# Worker 0 without a number: only it logs every step. Ctrl-C leaves the run alone.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

main() {
  read_arguments "$@"
  read_settings
  local worker=${ARGUMENTS[0]:-0}
  [[ $worker =~ ^[0-9]+$ ]] || die "worker $worker must be a number, from 0"
  worker_command "$worker" "tail -n 100 -F flax-distil-runs/$TPU_RUN/log"
}

main "$@"
