#!/usr/bin/env bash
# Runs a job on a TPU host, again and again until it ends.
#
# startup.sh                    what a TPU machine runs when it boots: takes jobs from the bucket
# startup.sh COMMAND FLAGS...   runs python -m cogvideox_jax.COMMAND FLAGS and leaves with its code
#
# Exit codes of the package: 83 preempted after a save, 84 a peer died, 85 hung and ended by the
# watchdog. After these, and after a signal or a fault of Docker, the same command goes on from the
# last checkpoint. Any other code ends the job.
#
# Environment of the second form: IMAGE (runs in this container; empty: here), TOPOLOGY (what preflight
# expects), PREFLIGHT (its other flags), MAX_RESTARTS (without an attempt of LONG seconds in between),
# BACKOFF (seconds before the first restart).

set -uo pipefail
export HOME=${HOME:-/root}

IMAGE=${IMAGE:-} TOPOLOGY=${TOPOLOGY:-} PREFLIGHT=${PREFLIGHT:-}
MAX_RESTARTS=${MAX_RESTARTS:-20} LONG=${LONG:-600} BACKOFF=${BACKOFF:-5}
POLL=${LAUNCH_POLL:-10} LOG=${LAUNCH_LOG:-/var/log/cogvideox.log}
METADATA=http://metadata.google.internal/computeMetadata/v1/instance/attributes
PLACE="" # The job's folder in the bucket; empty in the second form.
AGAIN=" 83 84 85 125 129 134 137 139 143 " # 125: Docker's fault. Others: 128 + a signal.

child="" stopped=no
trap 'stopped=yes; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null' TERM INT

say() { printf '%s startup: %s\n' "$(date -u +%FT%TZ)" "$*"; }

# Runs a command, and hands it SIGTERM, so that it saves before the machine goes.
supervise() {
  local code
  "$@" &
  child=$!
  [[ $stopped == no ]] || kill -TERM "$child" # A signal came before the child had a number.
  wait "$child"
  code=$?
  while kill -0 "$child" 2>/dev/null; do # A signal had ended the wait, not the command.
    wait "$child"
    code=$?
  done
  child=""
  return "$code"
}

# The package's command, here or in the container.
package() {
  local verb=$1
  shift
  if [[ -z $IMAGE ]]; then
    supervise python -m "cogvideox_jax.$verb" "$@"
  else
    docker rm --force cogvideox >/dev/null 2>&1
    supervise docker run --rm --init --name=cogvideox --privileged --network=host --shm-size=16g \
      "$IMAGE" python -m "cogvideox_jax.$verb" "$@"
  fi
}

# Whether another host has ended the job. Prints its exit code.
ended_elsewhere() {
  [[ -n $PLACE ]] && gcloud storage cat "$PLACE/exit_code" 2>/dev/null
}

# Runs a command of the package until it ends with a code that another attempt does not change.
attempts() {
  local left=$MAX_RESTARTS pause=$BACKOFF code began other
  while true; do
    began=$SECONDS
    package "$@"
    code=$?
    say "$1 ended with exit code $code after $((SECONDS - began)) s"
    [[ $stopped == no && $AGAIN == *" $code "* ]] || return "$code"
    other=$(ended_elsewhere) && return "$other"
    if ((SECONDS - began >= LONG)); then left=$MAX_RESTARTS pause=$BACKOFF; fi
    ((left-- > 0)) || return "$code"
    say "begins again in $pause s; $left more attempts"
    sleep "$pause"
    [[ $stopped == no ]] || return 83
    pause=$((pause * 2 < 300 ? pause * 2 : 300))
  done
}

# Checks the machine before a training, then runs the job.
work() {
  local verb=$1 checks
  shift
  read -ra checks <<<"${TOPOLOGY:+--topology=$TOPOLOGY} $PREFLIGHT"
  if [[ $verb == train || $verb == train_vae ]]; then
    attempts preflight "$@" ${checks[@]+"${checks[@]}"} || return
  fi
  attempts "$verb" "$@"
}

# A value of the job file; no line is executed.
value() { sed -n "s/^$1=//p" "$2" | tail -n 1 | tr -d '\r'; }

# Runs the job of a file, and leaves its exit code in the bucket unless the machine goes.
job() {
  local words code
  IMAGE=$(value IMAGE "$1") TOPOLOGY=$(value TOPOLOGY "$1") PREFLIGHT=$(value PREFLIGHT "$1")
  [[ $IMAGE != *.pkg.dev/* ]] || gcloud auth configure-docker --quiet "${IMAGE%%/*}"
  read -ra words <<<"$(value COMMAND "$1") $(value FLAGS "$1")"
  say "begins: ${words[*]}"
  work "${words[@]}"
  code=$?
  [[ $stopped == no ]] || return
  say "the job ended with exit code $code"
  # Whoever sees the exit code deletes the machine.
  logged "the job ended with exit code $code"
  keep_log
  [[ $code != 0 || -z $(ended_elsewhere) ]] || return
  until printf '%s\n' "$code" | gcloud storage cp --quiet - "$PLACE/exit_code"; do sleep "$POLL"; done
}

# Waits until the log, which another process writes, has a line that was just printed.
logged() {
  local left=10
  until tail -n 3 "$LOG" | grep -qF "$1" || ((left-- == 0)); do sleep 1; done
}

keep_log() {
  tail -c 1000000 "$LOG" >"$LOG.end" && gcloud storage cp --quiet "$LOG.end" "$PLACE/logs/$(hostname).txt"
}

# Takes jobs from the bucket, one after another, until the machine is deleted.
serve() {
  local file
  PLACE=$(curl -fsS -H Metadata-Flavor:Google "$METADATA/cogvideox-place") || return
  file=$(mktemp)
  while sleep 60; do keep_log >/dev/null 2>&1; done &
  # shellcheck disable=SC2064 # The number of the process is that of now.
  trap "kill $! 2>/dev/null" EXIT
  while [[ $stopped == no ]]; do
    if [[ -z $(ended_elsewhere) ]] && gcloud storage cat "$PLACE/job.env" >"$file" 2>/dev/null; then
      job "$file"
      keep_log
    fi
    sleep "$POLL"
  done
}

if (($#)); then
  work "$@"
else
  exec > >(tee -a "$LOG") 2>&1
  serve
fi
