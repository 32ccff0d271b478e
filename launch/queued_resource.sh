#!/usr/bin/env bash
# A job on TPUs that are asked for in a queue, on one slice or several:
# launch/queued_resource.sh VERB JOB.env [--print]. See launch/README.md.

LAUNCH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/machines.sh
source "$LAUNCH/machines.sh"
REQUIRED+=" RUNTIME"

describe() {
  ask NOT_FOUND gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" \
    --format="value(state.state)"
}

make() {
  local flags=()
  if [[ $SLICES == 1 ]]; then flags+=(--node-id="$NAME"); else flags+=(--node-count="$SLICES"); fi
  [[ $SPOT == no ]] || flags+=(--spot)
  [[ -z $SERVICE_ACCOUNT ]] || flags+=(--service-account="$SERVICE_ACCOUNT")
  run gcloud compute tpus queued-resources create "$NAME" --project="$PROJECT" --zone="$ZONE" --quiet \
    --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" --scopes=cloud-platform \
    --metadata=cogvideox-place="$PLACE" --metadata-from-file=startup-script="$LAUNCH/startup.sh" \
    "${flags[@]}"
}

remove() {
  run gcloud compute tpus queued-resources delete "$NAME" --project="$PROJECT" --zone="$ZONE" --force --quiet
}

main "$@"
