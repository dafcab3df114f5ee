#!/usr/bin/env bash
# Start the same command on every host of a TPU VM; it goes on when the connection ends.
#
#   TPU_NAME=zoom ZONE=us-west4-a tools/tpu/run.sh train.py \
#       --config=configs/cifar100_resnet18.py --workdir=../shared/runs/cifar100
#   TPU_NAME=zoom ZONE=us-west4-a tools/tpu/run.sh --stop
#
# The workdir must be a folder that all hosts share, such as what setup.sh mounts. Paths are those of
# the hosts, from the checkout there on. --stop ends the run as a preemption would: it saves, and goes
# on when it is started again. One run at a time.
#
# TPU_NAME  its name
# ZONE      where it is
# PROJECT   default: that of gcloud
set -euo pipefail
# shellcheck source=tools/tpu/settings.sh
. "$(dirname "$0")/settings.sh"

is_running="[ -e run.pid ] && kill -0 \$(cat run.pid) 2>/dev/null"
if [[ ${1:-} == --stop ]]; then
    on_hosts all "cd $FOLDER && if $is_running; then kill \$(cat run.pid); fi"
    exit 0
fi
if [[ $# -eq 0 ]]; then
    echo "error: no programme; see $0 --help" >&2
    exit 2
fi
words=$(printf ' %q' "$@")
on_hosts all "cd $FOLDER
    if $is_running; then echo 'error: a run is going on; see run.sh --stop' >&2; exit 1; fi
    nohup .venv/bin/python -u$words >run.log 2>&1 </dev/null &
    echo \$! >run.pid"
echo "started on every host of $TPU_NAME; see tools/tpu/logs.sh"
