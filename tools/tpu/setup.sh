#!/usr/bin/env bash
# Copy this checkout to every host of a TPU VM, install it, and look whether JAX sees all chips.
#
#   TPU_NAME=zoom ZONE=us-west4-a NFS=10.0.0.2:/share tools/tpu/setup.sh
#
# Only what is committed is copied.
#
# TPU_NAME  its name
# ZONE      where it is
# NFS       server:/path to mount on every host as ~/shared, for data sets and workdirs; default: none
# PYTHON    to run with, 3.11 or newer; is installed where it is missing; default: python3.11
# PROJECT   default: that of gcloud
set -euo pipefail
# shellcheck source=tools/tpu/settings.sh
. "$(dirname "$0")/settings.sh"

PYTHON=${PYTHON:-python3.11}
packed=$(mktemp -d)
trap 'rm -rf "$packed"' EXIT
git -C "$(dirname "$0")/../.." archive --format=tar.gz --output="$packed/$FOLDER.tar.gz" HEAD
"${TPU_VM[@]}" scp "$packed/$FOLDER.tar.gz" "$TPU_NAME:$FOLDER.tar.gz" "${PLACE[@]}" --worker=all

if [[ -n ${NFS:-} ]]; then
    on_hosts all "set -e
        sudo apt-get install -y -qq nfs-common
        mkdir -p ~/shared
        mountpoint -q ~/shared || sudo mount -t nfs '$NFS' ~/shared"
fi
on_hosts all "set -e
    command -v $PYTHON || { sudo apt-get update -qq; sudo apt-get install -y -qq $PYTHON $PYTHON-venv; }
    mkdir -p $FOLDER
    tar -xzf $FOLDER.tar.gz -C $FOLDER
    cd $FOLDER
    $PYTHON -m venv .venv
    .venv/bin/pip install --quiet --editable '.[tpu]'"
on_hosts all "cd $FOLDER && .venv/bin/python -c \"from attnzoom_jax import cli; cli.start_devices('tpu', many=True)\""
