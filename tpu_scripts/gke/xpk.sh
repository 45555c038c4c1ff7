#!/usr/bin/env bash
# Run a command on a GKE cluster by XPK (pip install xpk): gke/xpk.sh [--dry-run] COMMAND ARGUMENT…
#
# Settings: TPU_NAME (the workload), TPU_ZONE, TPU_PROJECT, TPU_TYPE, TPU_CAPACITY, XPK_CLUSTER,
# XPK_IMAGE and XPK_STORAGE (a bucket attached with `xpk storage attach`, mounted where that says).
# Secrets are in XPK_ENV_FILE, of mode 600; only its path is an argument.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

main() {
  COMMAND_FOLLOWS=yes
  read_arguments "$@"
  read_settings
  local flags=() name
  for name in TPU_PROJECT TPU_TYPE XPK_CLUSTER XPK_IMAGE; do
    [[ -n ${!name:-} ]] || die "$name is not set"
  done
  ((${#ARGUMENTS[@]})) || die "no command: gke/xpk.sh python run_distill_flax.py --recipe …"
  refuse_secrets "${XPK_ENV_FILE:-}" "${ARGUMENTS[@]}"
  case ${TPU_CAPACITY:-on-demand} in
    on-demand) flags+=(--on-demand) ;;
    spot) flags+=(--spot) ;;
    *) die "TPU_CAPACITY=$TPU_CAPACITY must be on-demand or spot here" ;;
  esac
  [[ -z ${XPK_STORAGE:-} ]] || flags+=("--storage=$XPK_STORAGE")
  [[ -z ${XPK_ENV_FILE:-} ]] || flags+=("--env-file=$XPK_ENV_FILE")
  local command
  command=$(printf '%q ' "${ARGUMENTS[@]}")
  run xpk workload create --workload="$TPU_NAME" --cluster="$XPK_CLUSTER" \
    --project="$TPU_PROJECT" --zone="$TPU_ZONE" --tpu-type="${TPU_TYPE/#v5e-/v5litepod-}" \
    --docker-image="$XPK_IMAGE" --max-restarts=20 "${flags[@]}" --command="${command% }"
}

main "$@"
