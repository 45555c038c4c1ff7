#!/usr/bin/env bash
# Put the checked-out commit, its environment and the secrets on every worker: setup.sh [--dry-run]
#
# Run it again after each new commit. Uncommitted changes are not copied.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

main() {
  read_arguments "$@"
  read_settings
  local root ref=refs/tpu/$TPU_NAME commit pack=$SCRATCH/flax-distil.pack
  root=$(git -C "$SCRIPTS" rev-parse --show-toplevel)
  # watch.sh sets up a new TPU at the old one's commit, even if there are newer commits.
  if [[ ${TPU_KEEP_COMMIT:-no} == no ]] || ! commit=$(git -C "$root" rev-parse -q --verify "$ref"); then
    commit=$(git -C "$root" rev-parse HEAD)
    run git -C "$root" update-ref "$ref" "$commit"
    [[ -z $(git -C "$root" status --porcelain) ]] || say "note: uncommitted changes are not copied"
  fi
  # The commit without history: small, and all that a shallow clone has.
  run bash -c 'git -C "$0" rev-list --objects --no-walk "$1" | git -C "$0" pack-objects -q --stdout' \
    "$root" "$commit" >"$pack"

  find_workers
  # Once, before the parallel calls: the first may create the ssh key and add it to the metadata.
  worker_command 0 true >/dev/null
  on_workers worker_receives "$pack" || die "the project could not be copied"
  on_workers worker_script "$SCRIPTS/worker/setup.sh" \
    "$commit" "${TPU_PYTHON:-3.12}" "${TPU_EXTRAS:-tpu}" "${TPU_BUCKET:-}" ||
    die "the environment could not be created"
  send_secrets
  say "$TPU_NAME is set up at ${commit:0:12}: run launch.sh next"
}

send_secrets() {
  local name names=()
  for name in "${SECRETS[@]}"; do
    [[ -z ${!name:-} ]] || names+=("$name")
  done
  ((${#names[@]})) || return 0
  [[ $DRY_RUN == no ]] || printf '# standard input: the values of %s\n' "${names[*]}"
  on_workers worker_keeps_secrets "${names[@]}" || die "the secrets could not be stored"
}

# Writes them atomically to a file that only the user can read. printf is a shell builtin, so no
# process has a secret among its arguments.
worker_keeps_secrets() {
  local file=.flax-distil-secrets name lines='# end'
  for name in "${@:2}"; do printf -v lines 'export %s=%q\n%s' "$name" "${!name}" "$lines"; done
  # Not a pipe, which would break in a dry run, where nothing reads it.
  worker_command "$1" \
    "umask 077; cat >$file.part && tail -n 1 $file.part | grep -qx '# end' && mv $file.part $file" \
    <<<"$lines"
}

main "$@"
