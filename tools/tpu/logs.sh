#!/usr/bin/env bash
# Show what a run on a TPU VM prints, as it comes. The first host speaks; errors come from all.
#
#   TPU_NAME=zoom ZONE=us-west4-a tools/tpu/logs.sh
#
# TPU_NAME  its name
# ZONE      where it is
# WORKER    number of the host, or all: then the last lines of each, once; default: 0
# LINES     how many to begin with; default: 50
# PROJECT   default: that of gcloud
set -euo pipefail
# shellcheck source=tools/tpu/settings.sh
. "$(dirname "$0")/settings.sh"

WORKER=${WORKER:-0}
follow=-f
if [[ $WORKER == all ]]; then
    follow=
fi
on_hosts "$WORKER" "tail -n ${LINES:-50} $follow $FOLDER/run.log"
