#!/usr/bin/env bash
# A job on machines that SkyPilot finds and replaces: launch/sky.sh VERB JOB.env [--print].
# See launch/README.md. The task is sky.yaml; the job file says the rest.

LAUNCH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$LAUNCH/lib.sh"

# SkyPilot makes machines when the job is handed over; here it only looks whether it may.
create() { run sky check gcp; }

run_job() {
  local spot=--no-use-spot
  [[ $SPOT == no ]] || spot=--use-spot
  [[ $SLICES == 1 ]] || fail "$JOB: SLICES=$SLICES: SkyPilot's TPUs are one slice. Use queued_resource.sh."
  run sky jobs launch --yes --detach-run --name="$NAME" --infra="gcp/${ZONE%-*}/$ZONE" \
    --gpus="tpu-$ACCELERATOR" "$spot" --workdir="$(dirname "$LAUNCH")" \
    --env=IMAGE="$IMAGE" --env=TOPOLOGY="$TOPOLOGY" --env=PREFLIGHT="$PREFLIGHT" \
    --env=COMMAND="$COMMAND" --env=FLAGS="$FLAGS" "$LAUNCH/sky.yaml"
}

logs() { run sky jobs logs --no-follow --name="$NAME"; }

status() { say "$NAME is $(state)"; }

# The state of the newest job of this name; "none" if there is no such job.
state() {
  local jobs
  jobs=$(ask '[]' sky jobs queue --all --output=json) || return
  python3 "$LAUNCH/sky_state.py" "$NAME" <<<"$jobs"
}

# SkyPilot resumes by itself. This hands a job over again that it gave up.
resume() {
  local now
  now=$(state) || fail "SkyPilot did not answer. Try again."
  case $now in
    none | CANCELLED | FAILED*) run_job ;;
    *) say "$NAME is $now" ;;
  esac
}

# Waits until the job ends. SkyPilot has deleted its machines then. Exits with 0, or 1 if it failed.
watch() {
  local now=none
  while true; do
    now=$(state) || now="without an answer"
    case $now in
      none | SUCCEEDED | CANCELLED | FAILED*) break ;;
      *) pause ;;
    esac
  done
  say "$NAME is $now"
  [[ $PRINT == yes || $now == SUCCEEDED ]]
}

# Cancels the job, which deletes its machines. Checkpoints stay in the bucket.
delete() { run sky jobs cancel --yes --name="$NAME"; }

main "$@"
