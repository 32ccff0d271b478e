#!/usr/bin/env bash
# The verbs for TPU machines that gcloud makes: tpu_vm.sh and queued_resource.sh.
#
# A script defines `describe` (prints Google's state), `make` and `remove`. Machines run startup.sh
# when they boot. It takes the job from BUCKET/launch/NAME/job.env, and leaves the exit code there.

# shellcheck source=launch/lib.sh
source "$LAUNCH/lib.sh"

DEFINITE="INVALID_ARGUMENT|PERMISSION_DENIED|UNAUTHENTICATED|NOT_FOUND|FAILED_PRECONDITION|Quota"

# missing, ready, coming, gone (to be deleted and made anew) or unknown (no answer).
state() {
  local words
  if words=$(describe 2>&1); then
    case $words in
      *READY* | *ACTIVE*) echo ready ;;
      *PREEMPTED* | *TERMINATED* | *STOPPED* | *SUSPEND* | *FAILED*) echo gone ;;
      *NOT_FOUND*) echo missing ;;
      *) echo coming ;;
    esac
  elif [[ $words == *NOT_FOUND* ]]; then
    echo missing
  else
    say "no answer about $NAME: ${words##*$'\n'}"
    echo unknown
  fi
}

create() {
  local now
  now=$(state)
  case $now in
    missing) make ;;
    unknown) return 1 ;;
    *) say "$NAME is $now already" ;;
  esac
}

# Hands the job to the machines, which begin it within seconds, now or when they boot.
run_job() {
  run gcloud storage rm --quiet "$PLACE/exit_code" 2>/dev/null || say "there is no earlier exit code"
  [[ $PRINT == yes || $(exit_code) == none ]] || fail "$PLACE/exit_code of an earlier run cannot be removed."
  run gcloud storage cp --quiet "$JOB" "$PLACE/job.env"
}

logs() {
  run gcloud storage cat --display-url --range=-20000 "$PLACE/logs/*w-0.txt"
}

status() {
  say "$NAME: machines $(state), exit code $(exit_code)"
}

# The job's exit code; "none" while it has not ended.
exit_code() {
  local code
  code=$(ask none gcloud storage cat "$PLACE/exit_code" 2>/dev/null) || code=none
  echo "${code:-none}"
}

# Makes machines that were taken away anew. The job goes on from its last checkpoint by itself.
resume() {
  case $(state) in
    gone) remove && make ;;
    missing) make ;;
    ready | coming) say "$NAME is there" ;;
    unknown) return 1 ;;
  esac
}

# Resumes until the job ends, then deletes all machines. Exits with the job's exit code.
watch() {
  local code=none
  run gcloud storage cat "$PLACE/job.env" >/dev/null ||
    fail "$PLACE/job.env: there is no job yet. Hand it over first: $0 run $JOB"
  while code=$(exit_code) && [[ $code == none ]]; do
    resume_or_stop
    [[ $PRINT == no ]] || break
    pause
  done
  delete
  say "$NAME ended with exit code $code"
  [[ $PRINT == yes ]] || return "$code"
}

# Resumes. A refusal for want of machines is tried again; any other ends the watch.
resume_or_stop() {
  local words
  words=$(resume 2>&1) && return
  say "$words"
  [[ $words =~ $DEFINITE ]] || return 0
  delete
  fail "$NAME cannot be made. Mend the job file or the project, then watch again."
}

# Deletes all machines, and looks until none is left. Checkpoints and logs stay in the bucket.
delete() {
  if [[ $PRINT == yes ]]; then
    remove
    return
  fi
  until [[ $(state) == missing ]]; do
    remove || say "not deleted yet"
    [[ $(state) == missing ]] || pause
  done
}
