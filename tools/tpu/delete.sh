#!/usr/bin/env bash
# Delete a TPU VM, and with it all that lies on its hosts' own disks. gcloud asks before.
#
#   TPU_NAME=zoom ZONE=us-west4-a tools/tpu/delete.sh
#
# TPU_NAME  its name
# ZONE      where it is
# YES       1: do not ask
# PROJECT   default: that of gcloud
set -euo pipefail
# shellcheck source=tools/tpu/settings.sh
. "$(dirname "$0")/settings.sh"

quiet=()
if [[ ${YES:-} == 1 ]]; then
    quiet=(--quiet)
fi
"${TPU_VM[@]}" delete "$TPU_NAME" "${PLACE[@]}" "${quiet[@]}"
