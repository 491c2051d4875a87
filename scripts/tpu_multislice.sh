#!/usr/bin/env bash
# Runs `mila train` or `mila prepare` on several slices of a GKE cluster that XPK made (https://github.com/AI-Hypercomputer/xpk), any command on
# one slice with one worker.
#   bash scripts/tpu_multislice.sh create NAME --cluster=CLUSTER --type=v5p-256 --slices=4 [options] -- train --config=configs/xl128.py \
#     --config.data.dir=gs://BUCKET/latents --config.train.dir=gs://BUCKET/run --config.train.batch=256
# create  submits the workload NAME. Without --image, XPK puts the commit that is checked out here on top of --base-image, and each
#         container installs its requirements when it starts
# wait NAME      until it is finished: exit code 0 if it succeeded, 125 if not (XPK's)
# list           the workloads of the cluster (NAME: those whose name starts so)
# delete NAME
#
# --cluster=NAME               an XPK cluster; xpk cluster create makes one
# --project=ID, --zone=ZONE    default: CLOUDSDK_CORE_PROJECT and CLOUDSDK_COMPUTE_ZONE, else gcloud's configuration
# --type=TYPE, --slices=N      of each slice; their number (default 1). mesh.dcn_data of the config follows it by itself
# --image=IMAGE                used as it is: its working directory is this repository, its python3 has the requirements and jax[tpu]
# --base-image=IMAGE           what the commit is put on (default python:3.12; XPK's own default is too old)
# --restarts=N                 of the whole workload after a pre-emption or lost machines, XPK's --max-restarts (default 100)
# --tries=N                    failures one after another until a container gives up, and with it the workload (default 5)
# --grace=SECONDS              that a container has for its last save when it is asked to go (default 300)
# --create-flag=FLAG           more for `xpk workload create`, such as --create-flag=--priority=high; as often as needed
# --spot                       spot capacity, on clusters with autoprovisioning
# --ignore-changes             take the commit although files have been changed since
# --dry-run                    prints the commands that would be run, one a line, and does nothing; needs neither xpk nor a project
#
# Exit code 75 of `mila train` (pre-empted after a save) restarts the workload, which goes on from that save. Logs: XPK prints where.
# shellcheck source=scripts/tpu_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu_common.sh"

# shellcheck disable=SC2034  # slices: tpu_common.sh asks
cluster="" slices=1 image="" base_image="" restarts=100 grace=300
switch() { return 1; }
option() {
  case "$1" in
    --cluster) cluster="$2" ;;
    --slices) slices="$2" ;;
    --image) image="$2" ;;
    --base-image) base_image="$2" ;;
    --restarts) restarts="$2" ;;
    --grace) grace="$2" ;;
    *) return 1 ;;
  esac
}

place=()
create() {
  local extra=() flags=() inside folder
  if [ -n "$image" ]; then
    flags+=("--docker-image=$image")
    extra+=(--python=python3)
  else
    folder="$root/runs/launcher/mila_jax-$commit"
    run mkdir -p "$folder"
    run git -C "$root" archive --format=tar "--output=$folder.tar" "$commit"
    run tar -xf "$folder.tar" -C "$folder"
    flags+=("--base-docker-image=${base_image:-python:3.12}" "--script-dir=$folder")
    while IFS= read -r line; do extra+=("$line"); done < <(extras)
  fi
  if [ "$spot" = yes ]; then flags+=(--spot); fi
  # exec: XPK sends SIGTERM to the shell that it starts this in, and mila has to get it.
  inside="exec $(quoted bash "scripts/$worker_script" run "--tries=$tries" "${extra[@]}" -- "${mila[@]}")"
  run xpk workload create "--workload=$name" "${place[@]}" "--tpu-type=$type" "--num-slices=$slices" "${flags[@]}" \
    "--max-restarts=$restarts" --restart-on-exit-codes=75 "--termination-grace-period-seconds=$grace" \
    ${create_flags[@]+"${create_flags[@]}"} "--command=$inside"
}

parse "$@"
case "$command" in create|wait|list|delete) ;; *) fail "unknown command '$command'; bash scripts/tpu_multislice.sh --help" ;; esac
if [ -n "$name" ]; then check_name name "$name"; elif [ "$command" != list ]; then fail "$command needs the name of the workload"; fi
[ -n "$cluster" ] || fail "no cluster; pass --cluster=NAME (xpk cluster list shows them)"
check_name --cluster "$cluster"
if [ "$command" = create ]; then
  [ -n "$type" ] || fail "no TPU type; pass --type=TYPE, such as v5p-256"
  if ! is_number "$slices" || [ "$slices" = 0 ]; then fail "--slices takes a number of at least 1, not '$slices'"; fi
  is_number "$restarts" || fail "--restarts takes a number, not '$restarts'"
  is_number "$grace" || fail "--grace takes seconds, not '$grace'"
  [ -z "$image" ] || [ -z "$base_image" ] || fail "--image and --base-image cannot go together"
  need_command
  need_command_for_all "pass --slices=1 and a --type with one worker"
  case "${mila[*]}" in *$'\n'*) fail "XPK takes a command of one line only; put longer settings into a config file" ;; esac
  train_as_one
  warn_of_local_runs
  [ -n "$image" ] || find_commit
fi
need_tool xpk "pip install xpk"
if [ -z "$project" ] || [ -z "$zone" ]; then need_tool gcloud "https://cloud.google.com/sdk/docs/install"; fi
find_project
place=("--cluster=$cluster" "--project=$project" "--zone=$zone")
case "$command" in
  create) create ;;
  wait) run xpk workload list "${place[@]}" "--wait-for-job-completion=$name" ;;
  list) run xpk workload list "${place[@]}" ${name:+"--filter-by-job=$name"} ;;
  delete) run xpk workload delete "${place[@]}" "--workload=$name" ;;
esac
