#!/usr/bin/env bash
# A job on a TPU VM, on one slice: launch/tpu_vm.sh VERB JOB.env [--print]. See launch/README.md.

LAUNCH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/machines.sh
source "$LAUNCH/machines.sh"
REQUIRED+=" RUNTIME"

describe() {
  ask NOT_FOUND gcloud compute tpus tpu-vm describe "$NAME" --project="$PROJECT" --zone="$ZONE" --format="value(state)"
}

make() {
  [[ $SLICES == 1 ]] || fail "$JOB: SLICES=$SLICES: a TPU VM is one slice. Use queued_resource.sh."
  local flags=()
  [[ $SPOT == no ]] || flags+=(--spot)
  [[ -z $SERVICE_ACCOUNT ]] || flags+=(--service-account="$SERVICE_ACCOUNT")
  run gcloud compute tpus tpu-vm create "$NAME" --project="$PROJECT" --zone="$ZONE" --quiet \
    --accelerator-type="$ACCELERATOR" --version="$RUNTIME" --scopes=cloud-platform \
    --metadata=cogvideox-place="$PLACE" --metadata-from-file=startup-script="$LAUNCH/startup.sh" \
    ${flags[@]+"${flags[@]}"}
}

remove() {
  run gcloud compute tpus tpu-vm delete "$NAME" --project="$PROJECT" --zone="$ZONE" --quiet
}

main "$@"
