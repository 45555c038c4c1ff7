#!/usr/bin/env bash
# Stop the remaining processes of a run and launch its command again: resume.sh [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

main() {
  read_arguments "$@"
  read_settings
  find_command
  local flags=()
  [[ $DRY_RUN == no ]] || flags=(--dry-run)
  "$SCRIPTS/stop.sh" "${flags[@]}"
  "$SCRIPTS/launch.sh" "${flags[@]}" "${COMMAND[@]}"
}

main "$@"
