#!/usr/bin/env bash
# What the launch scripts share: the job file, and commands that are run or only printed.
#
# A script defines the verbs create, run_job, logs, status, resume, watch and delete, and ends with
# `main "$@"`. LAUNCH_POLL is the number of seconds between two looks at a job.

set -euo pipefail

LAUNCH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PRINT=no
POLL=${LAUNCH_POLL:-60}
# shellcheck disable=SC2034 # The scripts that source this file use these.
PLACE="" JOB="" PROJECT="" ZONE="" ACCELERATOR="" TOPOLOGY="" RUNTIME="" IMAGE="" FLAGS="" PREFLIGHT="" \
  CLUSTER="" SERVICE_ACCOUNT=""
NAME="" SPOT="" SLICES="" BUCKET="" COMMAND=""
REQUIRED="NAME PROJECT ZONE ACCELERATOR BUCKET IMAGE COMMAND"
OPTIONAL="TOPOLOGY RUNTIME SPOT SLICES FLAGS PREFLIGHT CLUSTER SERVICE_ACCOUNT"

exec 3>&1 # Commands are shown here, also by functions whose output is captured.

say() { printf '%s %s\n' "$(date -u +%FT%TZ)" "$*" >&2; }

fail() {
  printf '%s\n' "$*" >&2
  exit 2
}

# Shows a command, quoted so that a shell would take it.
show() {
  local line
  printf -v line '%q ' "$@"
  printf '%s\n' "${line% }" >&3
}

# Runs a command; with --print only shows it.
run() {
  show "$@"
  [[ $PRINT == yes ]] || "$@"
}

# Prints what a command says; with --print shows the command and prints the first argument.
ask() {
  local assumed=$1
  shift
  if [[ $PRINT == yes ]]; then
    show "$@"
    printf '%s\n' "$assumed"
  else
    "$@"
  fi
}

pause() { [[ $PRINT == yes ]] || sleep "$POLL"; }

main() {
  local arguments=() argument
  for argument in "$@"; do
    if [[ $argument == --print ]]; then PRINT=yes; else arguments+=("$argument"); fi
  done
  [[ ${#arguments[@]} == 2 ]] || fail "Usage: $0 VERB JOB.env [--print]
Verbs: create run logs status resume watch delete. --print shows the commands and runs none."
  read_job "${arguments[1]}"
  case ${arguments[0]} in
    run) run_job ;;
    create | logs | status | resume | watch | delete) "${arguments[0]}" ;;
    *) fail "${arguments[0]}: there is no such verb. Verbs: create run logs status resume watch delete" ;;
  esac
}

# Takes the lines of a job file as variables. No line is executed.
read_job() {
  local line key number=0
  [[ -f $1 ]] || fail "$1: there is no such file. Copy $LAUNCH/example.env and change it."
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    line=${line%$'\r'}
    [[ -n $line && $line != \#* ]] || continue
    key=${line%%=*}
    if is_secret "$line"; then
      fail "$1, line $number: this looks like a secret. A job needs none; grant the service account instead."
    fi
    [[ $line == *=* && " $REQUIRED $OPTIONAL " == *" $key "* ]] ||
      fail "$1, line $number: wanted KEY=VALUE, where KEY is one of: $REQUIRED $OPTIONAL"
    printf -v "$key" '%s' "${line#*=}"
  done <"$1"
  JOB=$1
  check_job "$1"
}

is_secret() {
  local pattern='(token|password|passwd|secret|api_?key|private_?key|credentials)[a-z_]*='
  [[ ${1,,} =~ $pattern ]]
}

check_job() {
  local key
  for key in $REQUIRED; do
    [[ -n ${!key} ]] || fail "$1: $key is empty."
  done
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,26}[a-z0-9])?$ ]] ||
    fail "$1: NAME=$NAME: wanted at most 28 small letters, digits and hyphens, a letter first."
  [[ $BUCKET =~ ^gs://[^/]+(/.*[^/])?$ ]] || fail "$1: BUCKET=$BUCKET: wanted gs://NAME or gs://NAME/FOLDER."
  [[ ${SLICES:=1} =~ ^[1-9][0-9]*$ ]] || fail "$1: SLICES=$SLICES: wanted a number from 1."
  [[ ${SPOT:=no} =~ ^(yes|no)$ ]] || fail "$1: SPOT=$SPOT: wanted yes or no."
  [[ $COMMAND =~ ^[a-z_]+$ ]] || fail "$1: COMMAND=$COMMAND: wanted the name of a command, such as train."
  # shellcheck disable=SC2034
  PLACE=$BUCKET/launch/$NAME
}

need() {
  local key
  for key in "$@"; do
    [[ -n ${!key} ]] || fail "$JOB: $key is empty, and this script needs it."
  done
}
