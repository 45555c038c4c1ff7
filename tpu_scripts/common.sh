# shellcheck shell=bash disable=SC2034
# Sourced by every script: settings, --dry-run, and functions that run commands on all workers.
#
# Settings are environment variables, or lines NAME=value of the file that TPU_ENV names (tpu.env in
# the current folder); the environment takes precedence. tpu.env.example explains each. The file
# is data: it can set no other variable, and values cannot contain characters special to a shell.

set -euo pipefail
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "bash ${BASH_VERSION} is too old: 4.4 or later is needed (macOS: brew install bash)" >&2
  exit 2
fi

SCRIPTS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SECRETS=(HF_TOKEN WANDB_API_KEY)
# Patterns of valid values. Numbers are used in (( )), which would execute a command in them, and have
# no leading zero, which would mean octal.
WORD='[A-Za-z0-9][-A-Za-z0-9_.]*' NUMBER='0|[1-9][0-9]{0,5}' NAMES='[A-Za-z0-9][-A-Za-z0-9_./:@]*'
declare -A FORMS=(
  [TPU_NAME]='[a-z][-a-z0-9]*' [TPU_ZONE]=$WORD [TPU_PROJECT]=$NAMES [TPU_TYPE]=$WORD
  [TPU_CAPACITY]='[a-z-]+' [TPU_RUNTIME]=$WORD [TPU_VALID_UNTIL]=$WORD [TPU_NETWORK]=$NAMES
  [TPU_SUBNETWORK]=$NAMES [TPU_SERVICE_ACCOUNT]=$NAMES [TPU_INTERNAL_IP]='yes|no'
  [TPU_BUCKET]=$WORD [TPU_PYTHON]='/?'$NAMES [TPU_EXTRAS]='[a-z0-9][-a-z0-9_,]*' [TPU_RUN]=$WORD
  [TPU_POLL_SECONDS]="($NUMBER)(\\.[0-9]+)?" [TPU_PARALLEL]='[1-9][0-9]{0,5}'
  [TPU_STOP_SECONDS]=$NUMBER [TPU_STATE]='[^-].*' [TPU_KEEP_COMMIT]='yes|no'
  [TPU_RAY]='yes|no'
  [XPK_CLUSTER]=$WORD [XPK_IMAGE]=$NAMES [XPK_STORAGE]=$WORD [XPK_ENV_FILE]='[^-].*'
  [HF_TOKEN]='.*' [WANDB_API_KEY]='.*'
)
DRY_RUN=no
exec 3>&1 # so that a dry run's output is not captured by $(…)
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT

say() {
  [[ $DRY_RUN == no ]] || set -- "(dry run)" "$@"
  printf '%s\n' "$*" >&2
}
die() {
  say "${0##*/}: $*"
  exit 1
}

# Handles --dry-run and --help; the other arguments are in ARGUMENTS. With COMMAND_FOLLOWS, options
# after the first word belong to that command.
read_arguments() {
  ARGUMENTS=()
  while (($#)); do
    case $1 in
      --dry-run) DRY_RUN=yes ;;
      -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 0 ;;
      -*) die "unknown option $1; use --dry-run or --help" ;;
      *)
        if [[ ${COMMAND_FOLLOWS:-no} == yes ]]; then
          ARGUMENTS=("$@")
          return
        fi
        ARGUMENTS+=("$1")
        ;;
    esac
    shift
  done
}

read_settings() {
  local file=${TPU_ENV:-tpu.env} name
  if [[ -f $file ]]; then
    read_file "$file"
  elif [[ -n ${TPU_ENV:-} ]]; then
    die "TPU_ENV names $file, which does not exist"
  fi
  for name in TPU_NAME TPU_ZONE; do
    [[ -n ${!name:-} ]] || die "$name is not set: see tpu_scripts/tpu.env.example"
  done
  for name in "${!FORMS[@]}"; do
    [[ -z ${!name:-} || ${!name} =~ ^(${FORMS[$name]})$ ]] ||
      die "$name=${!name} must match ${FORMS[$name]}: see tpu_scripts/tpu.env.example"
  done
  TPU_RUN=${TPU_RUN:-run}
  POLL_SECONDS=${TPU_POLL_SECONDS:-60}
  PLACE=("--zone=$TPU_ZONE")
  [[ -z ${TPU_PROJECT:-} ]] || PLACE+=("--project=$TPU_PROJECT")
  REACH=("${PLACE[@]}" --quiet)
  [[ ${TPU_INTERNAL_IP:-no} == no ]] || REACH+=(--internal-ip)
  STATE=${TPU_STATE:-runs/tpu}/$TPU_NAME # state for the next script
}

# Exports the lines NAME=value of a file whose NAME is not set in the environment.
read_file() {
  local line name number=0
  while read -r line || [[ -n $line ]]; do
    ((++number))
    line=${line%$'\r'} name=${line%%=*}
    [[ -n $line && $line != '#'* ]] || continue
    # The message omits the value, which may be a secret.
    [[ $line == *=* && $name =~ ^[A-Z_]+$ ]] || die "$1, line $number is not NAME=value"
    [[ -v FORMS[$name] ]] || die "$1, line $number: unknown setting $name"
    [[ -v $name ]] || export "$name=${line#*=}"
  done <"$1"
}

# Fails if a word of the command contains the value of a secret, from the environment or a file of
# NAME=value lines: commands are visible in process tables, logs and the cluster.
refuse_secrets() {
  local file=$1 name line secret argument values=()
  shift
  for name in "${SECRETS[@]}"; do
    values+=("$name=${!name:-}")
  done
  if [[ -n $file ]]; then
    [[ -f $file ]] || die "$file does not exist"
    while read -r line || [[ -n $line ]]; do values+=("${line%$'\r'}"); done <"$file"
  fi
  for line in "${values[@]}"; do
    name=${line%%=*} secret=${line#*=}
    [[ $line == *=* && -n $secret && $name =~ (TOKEN|KEY|SECRET|PASSWORD)$ ]] || continue
    for argument in "$@"; do
      [[ $argument != *"$secret"* ]] ||
        die "the command contains the value of $name, which is sent to workers separately: remove it"
    done
  done
}

# Runs a command, or prints it quoted for a shell.
run() {
  if [[ $DRY_RUN == yes ]]; then
    { printf '+' && printf ' %q' "$@" && printf '\n'; } >&3
  else
    "$@"
  fi
}

# State of the queued resource (ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, …), empty if there is
# none. Uses a list with a filter, because `describe` fails the same way without a resource and without permission.
queue_state() {
  run gcloud compute tpus queued-resources list "${PLACE[@]}" \
    --filter="name~/queuedResources/$TPU_NAME\$" --format='value(state.state)'
}

# State of the TPU (READY, PREEMPTED, …), empty if there is none.
node_state() {
  run gcloud compute tpus tpu-vm list "${PLACE[@]}" \
    --filter="name~/nodes/$TPU_NAME\$" --format='value(state)'
}

# Sets COMMAND to the command given to launch.sh; optional in a dry run.
find_command() {
  COMMAND=(COMMAND)
  if [[ -f $STATE/$TPU_RUN.command ]]; then
    mapfile -d '' -t COMMAND <"$STATE/$TPU_RUN.command"
  elif [[ $DRY_RUN == no ]]; then
    die "$TPU_RUN was never launched on $TPU_NAME: run launch.sh"
  fi
}

# Sets WORKERS to their numbers, or to `all` in a dry run, which makes no requests.
find_workers() {
  local count
  count=$(run gcloud compute tpus tpu-vm describe "$TPU_NAME" "${PLACE[@]}" \
    --format='value(networkEndpoints.len())') || count=0
  if [[ $DRY_RUN == yes ]]; then
    WORKERS=(all)
  elif [[ $count =~ ^[1-9][0-9]*$ ]]; then
    mapfile -t WORKERS < <(seq 0 $((count - 1)))
  else
    say "the workers of $TPU_NAME in $TPU_ZONE cannot be listed: does it exist? Run create.sh to create it"
    return 1
  fi
}

# on_workers FUNCTION ARGUMENT…: calls FUNCTION WORKER ARGUMENT… for each worker, up to TPU_PARALLEL
# at a time. One gcloud call per worker: --worker=all does not report which failed, and sends stdin to
# one only. Prints each worker's output after its number, keeps it in OUTPUT/<worker>, and names the
# workers that failed.
on_workers() {
  if [[ $DRY_RUN == yes ]]; then
    "$1" all "${@:2}"
    return
  fi
  OUTPUT=$(mktemp -d "$SCRATCH/XXXX")
  local worker failed=() jobs=0
  for worker in "${WORKERS[@]}"; do
    { "$1" "$worker" "${@:2}" && : >"$OUTPUT/$worker.done"; } \
      >"$OUTPUT/$worker" 2>"$OUTPUT/$worker.errors" </dev/null &
    ((++jobs % ${TPU_PARALLEL:-16})) || wait
  done
  wait
  for worker in "${WORKERS[@]}"; do
    sed "s/^/[worker $worker] /" "$OUTPUT/$worker"
    [[ -f $OUTPUT/$worker.done ]] && continue
    failed+=("$worker")
    tail -n 20 "$OUTPUT/$worker.errors" | sed "s/^/[worker $worker] /" >&2
  done
  ((${#failed[@]} == 0)) || say "failed on worker ${failed[*]} of ${#WORKERS[@]}: see their output above"
  ((${#failed[@]} == 0))
}

# The following are called by on_workers, with the worker's number first.

# Runs a command line in the worker's shell.
worker_command() {
  run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${REACH[@]}" --worker="$1" --command="$2"
}

# Runs a script of worker/ on a worker. It is sent over stdin, so that nothing is quoted twice. gcloud
# retries broken connections with empty stdin, hence the check of the first line.
worker_script() {
  local arguments
  arguments=$(printf ' %q' "${@:3}")
  # shellcheck disable=SC2016 # for the worker's shell to expand
  local receive='script=$(cat); case $script in "#!"*) ;; *) echo no script received >&2; exit 97 ;; esac; bash -c "$script"'
  [[ $DRY_RUN == no ]] || printf '# standard input: %s\n' "$2" >&3
  worker_command "$1" "$receive ${2##*/}$arguments" <"$2"
}

# Copies a file to the worker's home folder.
worker_receives() {
  run gcloud compute tpus tpu-vm scp "$2" "$TPU_NAME:" "${REACH[@]}" --worker="$1"
}
