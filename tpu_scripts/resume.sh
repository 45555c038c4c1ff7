#!/usr/bin/env bash
# Stop what is left of a run and launch its command again: resume.sh [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

main() {
  read_arguments "$@"
  read_settings
  local command flags=()
  [[ -f $STATE/$TPU_RUN.command ]] || die "$TPU_RUN was never launched on $TPU_NAME: run launch.sh"
  [[ $DRY_RUN == no ]] || flags=(--dry-run)
  mapfile -d '' -t command <"$STATE/$TPU_RUN.command"
  "$SCRIPTS/stop.sh" "${flags[@]}"
  "$SCRIPTS/launch.sh" "${flags[@]}" "${command[@]}"
}

main "$@"
