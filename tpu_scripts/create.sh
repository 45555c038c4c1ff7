#!/usr/bin/env bash
# Request a TPU by a queued resource and wait until it is ready: create.sh [--dry-run]
#
# Can be interrupted; when run again it continues to wait. TPU_CAPACITY is on-demand, spot or
# reserved.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

main() {
  read_arguments "$@"
  read_settings
  local state
  state=$(queue_state)
  case $state in
    '') request ;;
    SUSPEND* | FAILED) die "the queued resource $TPU_NAME is $state: run teardown.sh, then create.sh" ;;
    *) say "$TPU_NAME exists: $state" ;;
  esac
  until [[ $state == ACTIVE || $DRY_RUN == yes ]]; do
    state=$(queue_state)
    case $state in
      ACTIVE) ;;
      '' | SUSPEND* | FAILED) die "the request for $TPU_NAME ended: ${state:-deleted}" ;;
      *) say "$(date +%T) $TPU_NAME: $state" && sleep "$POLL_SECONDS" ;;
    esac
  done
  say "$TPU_NAME is ready: run setup.sh next"
}

request() {
  local type=${TPU_TYPE:-} flags=()
  [[ -n $type ]] || die "TPU_TYPE is not set, such as v4-8 or v5e-16"
  case ${TPU_CAPACITY:-on-demand} in
    on-demand) ;;
    spot) flags+=(--spot) ;;
    reserved) flags+=(--reserved) ;;
    *) die "TPU_CAPACITY=$TPU_CAPACITY must be on-demand, spot or reserved" ;;
  esac
  [[ -z ${TPU_VALID_UNTIL:-} ]] || flags+=("--valid-until-duration=$TPU_VALID_UNTIL")
  [[ -z ${TPU_NETWORK:-} ]] || flags+=("--network=$TPU_NETWORK")
  [[ -z ${TPU_SUBNETWORK:-} ]] || flags+=("--subnetwork=$TPU_SUBNETWORK")
  [[ -z ${TPU_SERVICE_ACCOUNT:-} ]] || flags+=("--service-account=$TPU_SERVICE_ACCOUNT")
  [[ ${TPU_INTERNAL_IP:-no} == no ]] || flags+=(--internal-ips)
  run gcloud compute tpus queued-resources create "$TPU_NAME" "${PLACE[@]}" --quiet \
    --node-id="$TPU_NAME" --accelerator-type="${type/#v5e-/v5litepod-}" \
    --runtime-version="${TPU_RUNTIME:-$(image "$type")}" "${flags[@]}"
}

# Google's recommended image for a type.
image() {
  case $1 in
    v5e-* | v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

main "$@"
