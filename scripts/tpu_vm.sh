#!/usr/bin/env bash
# Runs `mila` on one TPU VM (a type with one worker: v5litepod-1 … 8, v6e-1 … 8, v5p-8, v4-8); larger ones: scripts/tpu_pod.sh.
#   bash scripts/tpu_vm.sh run NAME --type=v5litepod-8 [options] -- train --config=configs/small.py --config.data.dir=DIR --config.train.dir=DIR
# run     uses the VM NAME or creates it, copies the commit that is checked out here, sets it up, starts `mila train …` so that it goes
#         on without this terminal, and follows its log; exit code 0 if it is done, 1 if it failed
# create, setup, start -- …, logs [--follow]       the parts of it
# status, stop       of the VM and of the command; stop sends SIGTERM, upon which `mila train` saves
# fetch [--from=runs] [--to=FOLDER]       copies a folder from the VM, a path in its repository or an absolute one (default to runs/NAME)
# delete  deletes the VM and its disk; until then it costs money
#
# --project=ID, --zone=ZONE    default: CLOUDSDK_CORE_PROJECT and CLOUDSDK_COMPUTE_ZONE, else gcloud's configuration
# --type=TYPE                  https://cloud.google.com/tpu/docs/types-topologies
# --runtime=VERSION            software of the VM; default: what the documentation names for the type
# --spot                       cheaper, and taken away at any time; tpu_pod.sh brings such a one back by itself (one VM too), this does not
# --create-flag=FLAG           more for `gcloud compute tpus tpu-vm create`, such as --create-flag=--network=NAME; as often as needed
# --ssh-flag=FLAG              more for gcloud's ssh and scp, such as --ssh-flag=--internal-ip
# --tries=N                    failures one after another until the command is given up (default 5; see scripts/tpu_worker.sh)
# --lines=N                    of the log (default 40)
# --ignore-changes             copy the commit although files have been changed since
# --dry-run                    prints the commands that would be run, one a line, and does nothing; needs neither gcloud nor a project
#
# Paths in the command are the VM's: gs:// of a bucket, absolute, or relative to the repository there.
# shellcheck source=scripts/tpu_common.sh disable=SC2034,SC2154
source "$(dirname "${BASH_SOURCE[0]}")/tpu_common.sh"
# shellcheck source=scripts/tpu_workers.sh
source "$root/scripts/tpu_workers.sh"

workers=0
switch_of_script() { return 1; }
option_of_script() { return 1; }

# READY, CREATING, STOPPED, PREEMPTED …, or nothing if there is no such VM. A dry run is told that there is none.
vm_state() {
  local answer
  if [ "$dry_run" = yes ]; then
    describe >&3
  elif answer="$(describe 2>&1)"; then
    tail -n 1 <<< "$answer"
  else
    case "$answer" in *NOT_FOUND*|*"not found"*) ;; *) give_up "gcloud: $(head -n 1 <<< "$answer")" ;; esac
  fi
}
describe() { run gcloud compute tpus tpu-vm describe "$name" "--project=$project" "--zone=$zone" "--format=value(state)"; }

check_type() {
  find_runtime
  if several_workers; then fail "$type has several workers; use scripts/tpu_pod.sh"; fi
}

create() {
  check_type
  local flags=()
  if [ "$spot" = yes ]; then flags+=(--spot); fi
  run gcloud compute tpus tpu-vm create "$name" "--project=$project" "--zone=$zone" "--accelerator-type=$type" "--version=$runtime" \
    ${flags[@]+"${flags[@]}"} ${create_flags[@]+"${create_flags[@]}"}
}
delete() { run gcloud compute tpus tpu-vm delete "$name" "--project=$project" "--zone=$zone" --quiet; }

run_command() {
  local state
  state="$(vm_state)"
  case "$state" in
    READY) say "using $name, which is there already" ;;
    "") create ;;
    STOPPED) run gcloud compute tpus tpu-vm start "$name" "--project=$project" "--zone=$zone" ;;
    PREEMPTED|TERMINATED) say "$name was taken away; creating it again"; delete; create ;;
    *) give_up "$name is $state; try again when it is READY" ;;
  esac
  set_up
  start_command
  follow=yes
  show_log 0 || say "the connection ended; the command goes on"
  if [ "$dry_run" = yes ]; then call_worker 0 status; else outcome; fi
}

outcome() {
  local answer
  answer="$(call_worker 0 status | grep '^mila-worker ')" || give_up "$name does not answer; bash scripts/tpu_vm.sh status $name"
  say "${answer#mila-worker }"
  case "$answer" in
    *" running") say "it goes on; follow it with: bash scripts/tpu_vm.sh logs $name --follow" ;;
    *" done") say "$name costs money until: bash scripts/tpu_vm.sh delete $name" ;;
    *) exit 1 ;;
  esac
}

parse "$@"
if [ "$dry_run" = yes ]; then exec 3>&1; fi
case "$command" in
  run|create|setup|start|status|logs|stop|fetch|delete) ;;
  *) fail "unknown command '$command'; bash scripts/tpu_vm.sh --help" ;;
esac
[ -n "$name" ] || fail "$command needs the name of the VM"
check_name name "$name"
case "$command" in run|start) need_command ;; esac
if [ "$command" = create ] || [ -n "$type" ]; then check_type; fi
case "$command" in run|setup) find_commit ;; esac
if [ "$command" = fetch ]; then check_fetch; fi
need_tool gcloud "https://cloud.google.com/sdk/docs/install"
find_project
case "$command" in
  run) run_command ;;
  create) create ;;
  setup) set_up ;;
  start) start_command ;;
  status) describe; call_worker 0 status ;;
  logs) show_log 0 ;;
  stop) stop_command ;;
  fetch) fetch_results ;;
  delete) delete ;;
esac
