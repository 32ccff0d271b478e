#!/usr/bin/env bash
# A job on a GKE cluster, as a JobSet that XPK makes: launch/xpk.sh VERB JOB.env [--print].
# See launch/README.md. Google's JobSet restarts the job after 83, 84 and 85, and after a preemption.

LAUNCH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$LAUNCH/lib.sh"
RESTARTS=100

# The job's cluster: that of the job file, or one of its own with its name.
cluster() { printf '%s\n' "${CLUSTER:-$NAME}"; }

on_cluster() {
  run xpk "$@" --cluster="$(cluster)" --project="$PROJECT" --zone="$ZONE"
}

# Makes the job's own cluster, with the TPUs. XPK leaves one that exists as it is.
create() {
  local capacity=--on-demand
  if [[ -n $CLUSTER ]]; then
    say "the cluster $CLUSTER stays as it is"
    return
  fi
  [[ $SPOT == no ]] || capacity=--spot
  on_cluster cluster create --tpu-type="$ACCELERATOR" --num-slices="$SLICES" "$capacity"
}

run_job() {
  local words
  read -ra words <<<"$FLAGS"
  on_cluster workload create --workload="$NAME" --tpu-type="$ACCELERATOR" --num-slices="$SLICES" \
    --docker-image="$IMAGE" --max-restarts="$RESTARTS" --restart-on-exit-codes=83-85 \
    --termination-grace-period-seconds=120 --env=MAX_RESTARTS=0 --env=TOPOLOGY="$TOPOLOGY" \
    --env=PREFLIGHT="$PREFLIGHT" \
    --command="exec bash launch/startup.sh $COMMAND ${words[*]@Q}"
}

logs() {
  run gcloud container clusters get-credentials "$(cluster)" --project="$PROJECT" --location="${ZONE%-*}"
  run kubectl logs --selector="xpk.google.com/workload=$NAME" --all-containers --prefix --timestamps --tail=100
}

status() { on_cluster workload list --filter-by-job="$NAME"; }

# Makes a workload whose restarts are used up anew. The job goes on from its last checkpoint.
resume() {
  on_cluster workload delete --workload="$NAME" --force || say "there was no workload $NAME"
  run_job
}

# Waits until the job ends, then deletes it. Exits with 0, or 1 if it failed.
watch() {
  local code=1
  while [[ $code != 0 && $code != 125 ]]; do # 125: the workload failed. Others: XPK had no answer.
    code=0
    on_cluster workload list --wait-for-job-completion="$NAME" || code=$?
    [[ $code == 0 || $code == 125 ]] || pause
  done
  delete
  say "$NAME ended: $([[ $code == 0 ]] && echo complete || echo failed)"
  [[ $code == 0 ]]
}

# Deletes the workload, and the cluster if it is the job's own. Checkpoints stay in the bucket.
delete() {
  on_cluster workload delete --workload="$NAME" --force || say "there was no workload $NAME"
  [[ -z $CLUSTER ]] || return 0
  on_cluster cluster delete --force || say "the cluster is not deleted yet"
  until [[ $PRINT == yes ]] || is_gone; do
    pause
    on_cluster cluster delete --force || say "the cluster is not deleted yet"
  done
}

is_gone() {
  local found
  found=$(gcloud container clusters list --project="$PROJECT" --filter="name=$NAME" --format="value(name)") &&
    [[ -z $found ]]
}

main "$@"
