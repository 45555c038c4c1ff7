#!/usr/bin/env bash
# Start a command on every worker, detached: launch.sh [--dry-run] COMMAND ARGUMENT…
#
# It runs in the checkout with its environment; output goes to ~/flax-distil-runs/$TPU_RUN/log.
# Workers on which the run is alive are left alone. Give what makes the command go on where it was
# stopped at once (--run.resume auto): resume.sh and watch.sh start the very same command.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

main() {
  COMMAND_FOLLOWS=yes
  read_arguments "$@"
  read_settings
  ((${#ARGUMENTS[@]})) || die "what shall run? launch.sh python run_distill_flax.py --recipe …"
  refuse_secrets '' "${ARGUMENTS[@]}"
  if [[ ${ARGUMENTS[*]} == *distill* && ${ARGUMENTS[*]} != *resume* ]]; then
    say "note: without --run.resume auto this cannot go on after a preemption"
  fi
  if [[ $DRY_RUN == no ]]; then
    mkdir -p "$STATE"
    printf '%s\0' "${ARGUMENTS[@]}" >"$STATE/$TPU_RUN.command"
  fi
  find_workers
  on_workers worker_script "$SCRIPTS/worker/run.sh" start "$TPU_RUN" "${ARGUMENTS[@]}" ||
    die "not all workers run, and the others wait for them: see above, then resume.sh"
  say "launched; attach.sh shows the log, watch.sh sees it through preemptions"
}

main "$@"
