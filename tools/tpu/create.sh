#!/usr/bin/env bash
# Create a TPU VM: one host, or a slice of several.
#
#   TPU_NAME=zoom ZONE=us-west4-a ACCELERATOR=v5litepod-16 tools/tpu/create.sh
#
# TPU_NAME     its name
# ZONE         where; it must have such TPUs
# ACCELERATOR  kind and size, such as v5litepod-16, v6e-8, v4-8
# RUNTIME      image of the hosts; default: the one for the kind
# SPOT         1: cheaper, and taken away at any moment; the run goes on after create, setup and run
# PROJECT      default: that of gcloud
set -euo pipefail
# shellcheck source=tools/tpu/settings.sh
. "$(dirname "$0")/settings.sh"

ACCELERATOR=${ACCELERATOR:-}
case $ACCELERATOR in
    v6e-*) image=v2-alpha-tpuv6e ;;
    v5litepod-*) image=v2-alpha-tpuv5-lite ;;
    v5p-*) image=v2-alpha-tpuv5 ;;
    v[234]-*) image=tpu-ubuntu2204-base ;;
    *) image= ;;
esac
RUNTIME=${RUNTIME:-$image}
if [[ -z $ACCELERATOR || -z $RUNTIME ]]; then
    echo "error: ACCELERATOR='$ACCELERATOR' is none that this script knows; set RUNTIME too" >&2
    exit 2
fi
spot=()
if [[ ${SPOT:-} == 1 ]]; then
    spot=(--spot)
fi
"${TPU_VM[@]}" create "$TPU_NAME" "${PLACE[@]}" \
    --accelerator-type="$ACCELERATOR" --version="$RUNTIME" "${spot[@]}"
