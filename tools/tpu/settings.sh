# Read by the scripts of this folder: their help, where the TPU is, and how its hosts are reached.
# shellcheck shell=bash

# --help prints the comment at the head of the script that is run.
if [[ ${1:-} == --help ]]; then
    sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"
    exit 0
fi
for name in TPU_NAME ZONE; do
    if [[ -z ${!name:-} ]]; then
        echo "error: $name is not set; see $0 --help" >&2
        exit 2
    fi
done
if ! command -v gcloud >/dev/null; then
    echo "error: gcloud is not installed; see https://cloud.google.com/sdk/docs/install" >&2
    exit 2
fi

TPU_VM=(gcloud compute tpus tpu-vm)
PLACE=(--zone="$ZONE")
if [[ -n ${PROJECT:-} ]]; then
    PLACE+=(--project="$PROJECT")
fi
# Folder of the checkout on each host, below the home.
FOLDER=attnzoom_jax

# on_hosts WORKER COMMAND: run a command line on one host, or on "all".
on_hosts() {
    "${TPU_VM[@]}" ssh "$TPU_NAME" "${PLACE[@]}" --worker="$1" --command="$2"
}
