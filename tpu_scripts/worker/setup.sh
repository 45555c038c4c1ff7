#!/usr/bin/env bash
# Runs on a worker: setup.sh COMMIT PYTHON EXTRAS BUCKET. The pack is in the home folder.
set -euo pipefail

main() {
  local commit=$1 python=$2 extras=$3 bucket=$4
  local project=$HOME/flax-distil
  export PATH=$HOME/.local/bin:$PATH

  [[ -d $project/.git ]] || git init --quiet "$project"
  git -C "$project" index-pack --stdin <"$HOME/flax-distil.pack" >/dev/null
  echo "$commit" >"$project/.git/shallow" # its parents are not included
  git -C "$project" checkout --quiet --force --detach "$commit"

  # The images have Python 3.10, which is too old; uv installs a newer one.
  command -v uv >/dev/null || PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
  uv venv --quiet --allow-existing --python "$python" "$project/.venv"
  local pinned=$project/constraints-$python.txt
  [[ -f $pinned ]] || pinned=/dev/null # another Python: the newest versions
  uv pip install --quiet --python "$project/.venv/bin/python" --constraint "$pinned" \
    --editable "${project}[$extras]"

  if [[ -n $bucket ]]; then
    mount_bucket "$bucket"
    keep_in_bucket "$project/runs"
    keep_in_bucket "$project/data"
  fi
  echo "ready at ${commit:0:12}"
}

mount_bucket() {
  local folder=$HOME/bucket apt=(sudo apt-get --quiet --yes -o DPkg::Lock::Timeout=600)
  mkdir -p "$folder"
  ! mountpoint --quiet "$folder" || return 0
  if ! command -v gcsfuse >/dev/null; then
    local source=https://packages.cloud.google.com/apt key=/usr/share/keyrings/gcsfuse.asc
    curl --fail --silent --show-error "$source/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $source gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    "${apt[@]}" update
    "${apt[@]}" install gcsfuse
  fi
  gcsfuse --implicit-dirs "$1" "$folder"
}

# Relative paths in recipes are then the same files on every worker, and survive the TPU.
keep_in_bucket() {
  local kept=$HOME/bucket/${1##*/}
  [[ ! -L $1 ]] || return 0
  if [[ -e $1 ]]; then
    echo "$1 is on this disk, which a preemption deletes: move it to $kept and run setup.sh again" >&2
    return 1
  fi
  mkdir -p "$kept"
  ln -s "$kept" "$1"
}

main "$@"
