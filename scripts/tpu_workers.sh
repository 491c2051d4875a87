#!/usr/bin/env bash
# Commands to the workers of a Cloud TPU by ssh; sourced by tpu_vm.sh and tpu_pod.sh after tpu_common.sh, not to be run.
# `workers` is 0 or all.
# shellcheck disable=SC2154

lines=40 follow=no from=runs to="" connect_flags=() one_worker=0

# Options that only these two have.
switch() {
  case "$1" in
    --follow) follow=yes ;;
    *) switch_of_script "$1" ;;
  esac
}
option() {
  case "$1" in
    --lines) lines="$2" ;;
    --worker) one_worker="$2" ;;
    --from) from="$2" ;;
    --to) to="$2" ;;
    --runtime) runtime="$2" ;;
    --ssh-flag) connect_flags+=("$2") ;;
    *) option_of_script "$1" "$2" ;;
  esac
}

# Software of the TPU VM for each generation (https://cloud.google.com/tpu/docs/runtimes).
find_runtime() {
  [ -n "$type" ] || fail "no TPU type; pass --type=TYPE, such as v5litepod-8, v5p-64, v6e-16"
  if [ -n "${runtime:-}" ]; then return; fi
  case "$type" in
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v2-*|v3-*|v4-*) runtime=tpu-ubuntu2204-base ;;
    tpu7x*) fail "$type is only offered in clusters; use scripts/tpu_multislice.sh" ;;
    *) fail "unknown TPU type '$type'; pass --runtime=VERSION with it if it is a new one" ;;
  esac
}

# ssh to workers $1 with command $2.
remote() {
  run gcloud compute tpus tpu-vm ssh "$name" "--project=$project" "--zone=$zone" "--worker=$1" \
    ${connect_flags[@]+"${connect_flags[@]}"} "--command=$2"
}

call_worker() { remote "$1" "$(quoted bash "$worker_script" "${@:2}")"; }

copy_code() {
  local folder="$root/runs/launcher"
  archive="mila_jax-$commit.tar.gz"
  run mkdir -p "$folder" \
    && run git -C "$root" archive --format=tar.gz --prefix=mila_jax/ "--output=$folder/$archive" "$commit" \
    && run gcloud compute tpus tpu-vm scp "$root/scripts/$worker_script" "$folder/$archive" "$name:" "--project=$project" "--zone=$zone" \
      "--worker=$workers" ${connect_flags[@]+"${connect_flags[@]}"}
}

set_up() {
  local extra=()
  while IFS= read -r line; do extra+=("$line"); done < <(extras)
  copy_code && call_worker "$workers" setup "${extra[@]}" "$archive"
}

start_command() { call_worker "$workers" start "--tries=$tries" -- "${mila[@]}"; }
stop_command() { remote "$workers" "if [ -f $worker_script ]; then bash $worker_script stop; fi"; }
show_log() {
  local options=("--lines=$lines")
  if [ "$follow" = yes ]; then options+=(--follow); fi
  call_worker "$1" logs "${options[@]}"
}

# One line a worker, "mila-worker HOST STATE [CODE]"; fails if a worker does not answer. A fresh machine has no script yet.
worker_states() {
  remote "$workers" "if [ -f $worker_script ]; then bash $worker_script status; else echo mila-worker new none; fi"
}

check_fetch() { case "$from" in gs://*) fail "$from is in a bucket: gcloud storage cp --recursive $from FOLDER" ;; esac; }

# Results from worker 0 (or --worker): a path in its copy of the repository, or an absolute one.
fetch_results() {
  local source="$from"
  case "$source" in /*) ;; *) source="mila_jax/$source" ;; esac
  to="${to:-$root/runs/$name}"
  run mkdir -p "$to"
  run gcloud compute tpus tpu-vm scp --recurse "$name:$source" "$to" "--project=$project" "--zone=$zone" "--worker=$one_worker" \
    ${connect_flags[@]+"${connect_flags[@]}"}
}
