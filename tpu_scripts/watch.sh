#!/usr/bin/env bash
# Resume a launched run after preemptions until it ends: watch.sh [--dry-run]
#
# A preempted TPU is deleted, requested again and set up at the same commit, and the run is resumed.
# Exit status 0 when all workers have succeeded; 1 when one failed on a TPU that still exists.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

main() {
  read_arguments "$@"
  read_settings
  find_command
  local state verdict='' before unreachable=0
  while true; do
    state=$(node_state) || state=unknown
    [[ $DRY_RUN == no ]] || state=PREEMPTED
    say "$(date +%T) $TPU_NAME: ${state:-gone}"
    before=$verdict verdict=''
    case $state in
      READY) look ;;
      CREATING | STARTING | RESTARTING | REPAIRING | unknown) ;;
      *) replace ;;
    esac
    [[ $DRY_RUN == no ]] || return 0
    # Processes die before their TPU is reported as preempted, so an end must be observed twice.
    if [[ -n $verdict && $verdict == "$before" ]]; then
      case $verdict in
        ended) return 0 ;;
        failed) die "the run failed and the TPU still exists: read the log, then run resume.sh" ;;
        unreachable) ((++unreachable < 3)) || die "workers cannot be reached though $TPU_NAME is READY" ;;
      esac
    else
      unreachable=0
    fi
    sleep "$POLL_SECONDS"
  done
}

# Sets verdict to running, ended, failed or unreachable, by the workers' status.
look() {
  local worker word words=()
  if ! find_workers || ! on_workers worker_script "$SCRIPTS/worker/run.sh" status "$TPU_RUN" \
    >"$SCRATCH/said"; then
    verdict=unreachable
    return
  fi
  for worker in "${WORKERS[@]}"; do
    read -r word _ <"$OUTPUT/$worker"
    words+=("$word")
  done
  case " ${words[*]} " in
    *' failed: '* | *' absent '*) verdict=failed && cat "$SCRATCH/said" ;;
    *' running '*) verdict=running ;;
    *) verdict=ended ;;
  esac
  say "$(date +%T) $TPU_RUN: $verdict"
}

# Recreates the TPU and resumes the run; retries after failures, including another preemption.
replace() {
  local flags=() tries=0
  [[ $DRY_RUN == no ]] || flags=(--dry-run)
  until { [[ $(node_state) == READY ]] || ask_again "${flags[@]}"; } &&
    TPU_KEEP_COMMIT=yes "$SCRIPTS/setup.sh" "${flags[@]}" &&
    "$SCRIPTS/resume.sh" "${flags[@]}"; do
    ((++tries < 5)) || die "the run could not be resumed in $tries attempts"
    sleep "$POLL_SECONDS"
  done
}

ask_again() {
  "$SCRIPTS/teardown.sh" "$@" && "$SCRIPTS/create.sh" "$@"
}

main "$@"
