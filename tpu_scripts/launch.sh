#!/usr/bin/env bash
# Start a command on every worker, detached: launch.sh [--dry-run] COMMAND ARGUMENT…
#
# It runs in the checkout with its environment; output goes to ~/flax-distil-runs/$TPU_RUN/log.
# Workers on which the run is already active are skipped. Include the flag that resumes the command
# (--run.resume auto): resume.sh and watch.sh start the same command again.
#
# With TPU_RAY=yes the workers form a Ray cluster, and worker 0 alone runs the command in it:
# pseudo-label … --engine ray (TPU_EXTRAS must include ray).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

main() {
  COMMAND_FOLLOWS=yes
  read_arguments "$@"
  read_settings
  ((${#ARGUMENTS[@]})) || die "no command: launch.sh python run_distill_flax.py --recipe …"
  refuse_secrets '' "${ARGUMENTS[@]}"
  if [[ ${ARGUMENTS[*]} == *distill* && ${ARGUMENTS[*]} != *resume* ]]; then
    say "note: without --run.resume auto this cannot resume after a preemption"
  fi
  if [[ $DRY_RUN == no ]]; then
    mkdir -p "$STATE"
    printf '%s\0' "${ARGUMENTS[@]}" >"$STATE/$TPU_RUN.command"
  fi
  find_workers
  [[ ${TPU_RAY:-no} == no ]] || find_head
  on_workers worker_starts || die "some workers did not start, and the others wait for them: see above, then run resume.sh"
  say "launched; attach.sh shows the log, watch.sh resumes the run after preemptions"
}

# Sets HEAD to the address of worker 0 inside the TPU's network.
find_head() {
  HEAD=$(run gcloud compute tpus tpu-vm describe "$TPU_NAME" "${PLACE[@]}" \
    --format='value(networkEndpoints[0].ipAddress)')
  [[ $DRY_RUN == no ]] || HEAD=HEAD
  [[ -n $HEAD ]] || die "the address of worker 0 of $TPU_NAME is not known"
}

worker_starts() {
  local command=("${ARGUMENTS[@]}")
  [[ ${TPU_RAY:-no} == no ]] || command=(bash tpu_scripts/worker/ray.sh "$1" "$HEAD" "${command[@]}")
  worker_script "$1" "$SCRIPTS/worker/run.sh" start "$TPU_RUN" "${command[@]}"
}

main "$@"
