#!/usr/bin/env bash
# Runs on a worker: run.sh start RUN COMMAND… | stop RUN SECONDS | status RUN
#
# ~/flax-distil-runs/RUN holds log, process (its group and the boot it belongs to) and status.
set -euo pipefail

main() {
  local verb=$1 folder=$HOME/flax-distil-runs/$2
  mkdir -p "$folder"
  case $verb in
    start) start "$folder" "${@:3}" ;;
    stop) stop "$folder" "$3" ;;
    status) status "$folder" ;;
  esac
}

boot() { cat /proc/sys/kernel/random/boot_id; }

# Whether the run's process group is alive and its command has not ended; sets group.
alive() {
  local born
  [[ ! -f $1/status ]] || return 1
  read -r group born 2>/dev/null <"$1/process" || return 1
  [[ $born == "$(boot)" ]] && kill -0 -- "-$group" 2>/dev/null
}

start() {
  local folder=$1 group
  if alive "$folder"; then
    echo "already running (process group $group)"
    return
  fi
  rm -f "$folder/status"
  cd "$HOME/flax-distil"
  # A new session, so that it survives the connection. The trap keeps this shell alive through a
  # SIGTERM to the group, to record the exit status; the command does not inherit it.
  # shellcheck disable=SC2016
  setsid bash -c '
    trap : TERM
    [[ ! -f $HOME/.flax-distil-secrets ]] || source "$HOME/.flax-distil-secrets"
    # Worker 0 writes compiled programs and all workers read them, also on a new TPU.
    [[ ! -d $HOME/bucket ]] || export JAX_COMPILATION_CACHE_DIR=$HOME/bucket/programs
    PATH=$HOME/flax-distil/.venv/bin:$PATH PYTHONUNBUFFERED=1 "$@"
    echo $? >"$0/status"' "$folder" "${@:2}" >>"$folder/log" 2>&1 </dev/null &
  echo "$! $(boot)" >"$folder/process"
  echo "started (process group $!)"
}

stop() {
  local folder=$1 group second
  [[ $2 =~ ^[0-9]+$ ]] || { echo "seconds must be a number, not $2" >&2 && return 2; }
  if ! alive "$folder"; then
    echo "not running"
    return
  fi
  kill -TERM -- "-$group"
  for ((second = 0; second < $2; second++)); do
    if ! alive "$folder"; then
      echo "stopped"
      return
    fi
    sleep 1
  done
  kill -KILL -- "-$group"
  echo "killed after $2 s"
}

status() {
  local folder=$1 group code
  if alive "$folder"; then
    echo running
  elif [[ ! -f $folder/process ]]; then
    echo absent
  elif [[ ! -f $folder/status ]]; then
    echo "failed: killed by another process"
  elif read -r code <"$folder/status" && [[ $code == 0 ]]; then
    echo ended
  else
    echo "failed: status $code; end of the log:"
    tail -n 5 "$folder/log"
  fi
}

main "$@"
