#!/usr/bin/env bash
# Stands for gcloud, xpk, sky, docker and others in tests/test_launch.py, by the name it is called by.
#
# FAKE is the folder of its state: calls (every command line), bucket/, machines/, clusters/, and
# runs (how often a training began). The first PREEMPTIONS trainings lose their machine.

set -uo pipefail
tool=${0##*/}
printf -v line '%q ' "$tool" "$@"
printf '%s\n' "$line" >>"$FAKE/calls" # One write, because several machines write.

value() { # FLAG ARGUMENTS...: the value of --FLAG=VALUE.
  local name=$1 argument
  shift
  for argument in "$@"; do
    [[ $argument == --$name=* ]] && printf '%s\n' "${argument#--"$name"=}"
  done
}

path() { printf '%s\n' "$FAKE/bucket/${1#gs://}"; }

storage() {
  local verb=$1 operands=() argument
  shift
  for argument in "$@"; do
    [[ $argument == --* ]] || operands+=("$argument")
  done
  local last=${operands[-1]}
  case $verb in
    cp) mkdir -p "$(dirname "$(path "$last")")" && cat "${operands[0]}" >"$(path "$last")" ;;
    cat) # The operand may be a pattern.
      # shellcheck disable=SC2046
      cat $(path "$last") ;;
    rm) rm "$(path "$last")" ;;
  esac
}

machine() { # KIND VERB NAME FLAGS...
  local kind=$1 verb=$2 home=$FAKE/machines/$3
  shift 3
  case $verb in
    create)
      [[ ! -e $home ]] || { echo "ALREADY_EXISTS" >&2 && exit 1; }
      if [[ -e $FAKE/refusals ]]; then
        words=$(head -n 1 "$FAKE/refusals")
        sed -i 1d "$FAKE/refusals"
        [[ -z $words ]] || { echo "$words" >&2 && exit 1; }
      fi
      mkdir "$home"
      if [[ $kind == tpu-vm ]]; then echo READY; else echo ACTIVE; fi >"$home/state"
      value metadata "$@" | sed s/cogvideox-place=// >"$FAKE/place"
      set -m # Its own process group, which goes with the machine.
      bash "$(value metadata-from-file "$@" | sed s/startup-script=//)" >>"$FAKE/machine.log" 2>&1 3>&- &
      echo $! | tee "$home/pid" >"$FAKE/pid"
      ;;
    describe) cat "$home/state" 2>/dev/null || { echo "ERROR: NOT_FOUND" >&2 && exit 1; } ;;
    delete)
      kill -KILL -- "-$(cat "$home/pid")" 2>/dev/null
      rm -r "$home"
      ;;
  esac
}

preempted() { # Takes the machine away from a training, which saves and leaves with 83.
  local state
  trap 'exit 83' TERM
  for state in "$FAKE"/machines/*/state; do
    [[ ! -e $state ]] || echo "$GONE" >"$state"
  done
  kill -TERM "$(cat "$FAKE/pid")"
  while true; do "$SLEEP" 0.01; done
}

training() {
  local runs=$(($(cat "$FAKE/runs" 2>/dev/null || echo 0) + 1))
  [[ " $* " == *" cogvideox_jax.preflight "* ]] && exit "${PREFLIGHT_CODE:-0}"
  echo "$runs" >"$FAKE/runs"
  ((runs > ${PREEMPTIONS:-0})) || preempted
  exit "$(sed -n "${runs}p" "$FAKE/codes" 2>/dev/null | grep . || echo 0)"
}

jobset() { # Restarts as JobSet does, until the workload ends. Prints nothing.
  local command code left
  command=$(cat "$FAKE/machines/workload")
  for ((left = $(cat "$FAKE/restarts"); left >= 0; left--)); do
    env MAX_RESTARTS=0 bash -c "$command" >>"$FAKE/machine.log" 2>&1
    code=$?
    [[ $code == 0 ]] && exit 0
    [[ $code =~ ^(42|8[345]|12[789]|1[3-9][0-9])$ ]] || exit 125
  done
  exit 125
}

xpk_tool() {
  case "$1 $2" in
    "cluster create") mkdir -p "$FAKE/machines/$(value cluster "$@")" ;;
    "cluster delete") rm -r "$FAKE/machines/$(value cluster "$@")" ;;
    "workload create")
      value command "$@" >"$FAKE/machines/workload"
      value max-restarts "$@" >"$FAKE/restarts"
      [[ $(value restart-on-exit-codes "$@") == 83-85 ]]
      ;;
    "workload delete") rm "$FAKE/machines/workload" ;;
    "workload list") jobset ;;
  esac
}

sky_tool() {
  local task code setting
  case "$1 $2" in
    "jobs launch")
      mkdir "$FAKE/machines/sky"
      printf '%s\n' "${!#}" >"$FAKE/task"
      value env "$@" >"$FAKE/env"
      echo RUNNING >"$FAKE/state"
      ;;
    "jobs queue")
      if grep -q "RUNNING\|RECOVERING" "$FAKE/state"; then
        task=$(sed '1,/^run: |/d; s/^  //' "$(cat "$FAKE/task")")
        mapfile -t setting <"$FAKE/env"
        env "${setting[@]}" MAX_RESTARTS=3 bash -c "$task" >>"$FAKE/machine.log" 2>&1
        code=$?
        case $code in
          0) echo SUCCEEDED ;;
          83 | 84 | 85) echo RECOVERING ;;
          *) echo FAILED ;;
        esac >"$FAKE/state"
        [[ $code =~ 8[345] ]] || rmdir "$FAKE/machines/sky"
      fi
      printf '[{"job_id": 1, "job_name": "stage1", "status": "FAILED"},
        {"job_id": 2, "job_name": "stage1", "status": "%s"},
        {"job_id": 3, "job_name": "stage1-b", "status": "FAILED"}]' "$(cat "$FAKE/state")"
      ;;
    "jobs cancel") rmdir "$FAKE/machines/sky" ;;
  esac
}

case $tool in
  gcloud)
    case "$1 $2" in
      "storage "*) storage "${@:2}" ;;
      "compute tpus") machine "${@:3}" ;;
      "container clusters") [[ $3 != list ]] || ls "$FAKE/machines" ;;
    esac
    ;;
  xpk) xpk_tool "$@" ;;
  sky) sky_tool "$@" ;;
  docker) [[ $1 == rm ]] || training "$@" ;;
  python)
    echo "$PPID" >"$FAKE/pid"
    training "$@"
    ;;
  sudo)
    echo $$ >"$FAKE/pid"
    exec "${@:2}"
    ;;
  curl) cat "$FAKE/place" ;;
  hostname) echo t1v-n-1-w-0 ;;
  sleep) exec "$SLEEP" 0.02 ;;
esac
