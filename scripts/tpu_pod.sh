#!/usr/bin/env bash
# Runs `mila train` or `mila prepare` on all workers of a pod slice as one (any command on a single TPU VM), through queued resources, and
# keeps it going.
#   bash scripts/tpu_pod.sh run NAME --type=v5p-128 --spot [options] -- train --config=configs/xl128.py \
#     --config.data.dir=gs://BUCKET/latents --config.train.dir=gs://BUCKET/run
# run     asks for the slice NAME unless it is there, waits until it is ACTIVE, copies the commit that is checked out here to every
#         worker, sets it up, starts `mila train …` on all of them, and watches: a slice that was taken away (SUSPENDED, FAILED) is
#         deleted and asked for again, workers that were restarted start again, and `mila train` goes on from its last save. Ends with
#         0 when every worker is done, with 1 when one failed for good. May be ended and run again at any time: it takes up what it finds
# create, wait, setup, start -- …, watch -- …       the parts of it
# status, stop       of the slice and of the command; stop sends SIGTERM to all workers, upon which `mila train` saves
# logs [--worker=0] [--follow]
# fetch [--worker=0] [--from=runs] [--to=FOLDER]       copies a folder from a worker, a path in its repository or an absolute one
# delete  deletes the queued resource and its workers; until then they cost money
#
# --project=ID, --zone=ZONE    default: CLOUDSDK_CORE_PROJECT and CLOUDSDK_COMPUTE_ZONE, else gcloud's configuration
# --type=TYPE                  https://cloud.google.com/tpu/docs/types-topologies
# --runtime=VERSION            software of the workers; default: what the documentation names for the type
# --spot                       cheaper, and taken away at any time
# --create-flag=FLAG           more for `gcloud compute tpus queued-resources create`, such as --create-flag=--reserved or
#                              --create-flag=--valid-until-duration=24h; as often as needed
# --ssh-flag=FLAG              more for gcloud's ssh and scp, such as --ssh-flag=--internal-ip
# --tries=N                    failures one after another until the command, or asking for the slice, is given up (default 5)
# --poll=SECONDS               between two looks at the slice (default 30)
# --delete-at-end              deletes the slice when the command is done or failed for good
# --lines=N                    of the log (default 40)
# --ignore-changes             copy the commit although files have been changed since
# --dry-run                    prints the commands that would be run, one a line, and does nothing; needs neither gcloud nor a project
#
# Paths in the command are the workers': data and checkpoints belong on gs://, since disks of a slice go with it. gcloud reaches several
# workers only with its key in the ssh agent: ssh-add ~/.ssh/google_compute_engine. Training gets distributed.initialize=always, so that
# workers that do not find each other fail instead of running once each.
# shellcheck source=scripts/tpu_common.sh disable=SC2034,SC2154
source "$(dirname "${BASH_SOURCE[0]}")/tpu_common.sh"
# shellcheck source=scripts/tpu_workers.sh
source "$root/scripts/tpu_workers.sh"

workers=all poll=30 delete_at_end=no
switch_of_script() { case "$1" in --delete-at-end) delete_at_end=yes ;; *) return 1 ;; esac; }
option_of_script() { case "$1" in --poll) poll="$2" ;; *) return 1 ;; esac; }

describe() { run gcloud compute tpus queued-resources describe "$name" "--project=$project" "--zone=$zone" "--format=value(state.state)"; }

# Sets `state`: that of the queued resource, NONE if there is none, UNKNOWN if gcloud did not answer (`answer` says why).
look() {
  if [ "$dry_run" = yes ]; then describe; state="$1"; return; fi
  if answer="$(describe 2>&1)"; then
    state="$(tail -n 1 <<< "$answer")"
  else
    case "$answer" in *NOT_FOUND*|*"not found"*) state=NONE ;; *) state=UNKNOWN ;; esac
  fi
  if [ "$state" != "${shown:-}" ]; then say "$(date -u +%FT%TZ) $name is $state"; fi
  shown="$state"
}

create() {
  find_runtime
  local flags=()
  if [ "$spot" = yes ]; then flags+=(--spot); fi
  run gcloud compute tpus queued-resources create "$name" "--node-id=$name" "--project=$project" "--zone=$zone" "--accelerator-type=$type" \
    "--runtime-version=$runtime" ${flags[@]+"${flags[@]}"} ${create_flags[@]+"${create_flags[@]}"}
}
delete() { run gcloud compute tpus queued-resources delete "$name" "--project=$project" "--zone=$zone" --force --quiet; }

# Waits until the slice is there; with `again`, a slice that is gone is asked for again, at most --tries times in a row.
wait_until_active() {
  local asked=0
  while :; do
    look ACTIVE
    case "$state" in
      ACTIVE) return ;;
      NONE|SUSPENDED|FAILED)
        [ "$1" = again ] || give_up "$name is $state; bash scripts/tpu_pod.sh run asks for it again"
        asked=$((asked + 1))
        if [ "$asked" -gt "$tries" ]; then give_up "asked $tries times for $name; gcloud compute tpus queued-resources describe $name says why"; fi
        if [ "$state" != NONE ]; then delete || say "deleting failed; trying on"; fi
        create || say "asking failed; trying on"
        ;;
      UNKNOWN) say "gcloud: $(head -n 1 <<< "$answer")" ;;
    esac
    sleep "$poll"
  done
}

# Brings the slice, the code and the command up; a slice can be taken away in the midst of it.
bring_up() {
  local attempt=0
  while [ "$attempt" -lt "$tries" ]; do
    wait_until_active again
    if set_up && start_command; then return; fi
    look ACTIVE
    if [ "$state" != ACTIVE ]; then continue; fi
    attempt=$((attempt + 1))
    say "setting up failed ($attempt of $tries)"
    stop_command || true
    sleep "$poll"
  done
  give_up "the workers could not be set up; if gcloud did not get through: ssh-add ~/.ssh/google_compute_engine"
}

end() {  # exit code
  if [ "$delete_at_end" = yes ]; then delete; else say "$name costs money until: bash scripts/tpu_pod.sh delete $name"; fi
  exit "$1"
}

# Looks at the slice and its workers until the command is over.
watch() {
  local report
  while :; do
    sleep "$poll"
    look ACTIVE
    case "$state" in
      ACTIVE)
        if ! report="$(worker_states 2>/dev/null)"; then say "not every worker answers"; continue; fi
        report="$(grep '^mila-worker ' <<< "$report" || true)"
        case "$report" in
          *" failed "*)
            say "failed: $(grep -m 1 ' failed ' <<< "$report"); bash scripts/tpu_pod.sh logs $name"
            stop_command || true
            end 1
            ;;
          *" lost"*|*" none"*|*" interrupted "*)  # workers were restarted under the command
            say "workers were restarted; starting the command again"
            stop_command || true
            bring_up
            ;;
          *" running"*) ;;
          *" stopped "*) say "stopped by hand; run again to go on"; exit 1 ;;
          *" done"*) say "every worker is done"; end 0 ;;
        esac
        ;;
      NONE|SUSPENDED|FAILED) bring_up ;;
      UNKNOWN) say "gcloud: $(head -n 1 <<< "$answer")" ;;
    esac
  done
}

run_command() {
  look NONE
  case "$state" in
    NONE) create || give_up "asking for $name failed" ;;
    UNKNOWN) give_up "gcloud: $(head -n 1 <<< "$answer")" ;;
    ACTIVE)
      case "$(worker_states 2>/dev/null || true)" in
        *" running"*) say "a command is running on $name already; watching it"; watch ;;
      esac
      ;;
  esac
  bring_up
  if [ "$dry_run" = no ]; then watch; fi
  look ACTIVE
  worker_states
  say "after a pre-emption: $(delete), and all of it again"
}

parse "$@"
case "$command" in
  run|create|wait|setup|start|watch|status|logs|stop|fetch|delete) ;;
  *) fail "unknown command '$command'; bash scripts/tpu_pod.sh --help" ;;
esac
[ -n "$name" ] || fail "$command needs the name of the slice"
check_name name "$name"
is_number "$poll" || fail "--poll takes seconds, not '$poll'"
is_number "$one_worker" || fail "--worker takes a number, not '$one_worker'"
case "$command" in
  run|start|watch)
    need_command
    need_command_for_all "use scripts/tpu_vm.sh, or pass a --type with one worker"
    train_as_one
    warn_of_local_runs
    ;;
esac
case "$command" in run|create|watch) find_runtime ;; esac
case "$command" in run|setup|watch) find_commit ;; esac
if [ "$command" = fetch ]; then check_fetch; fi
need_tool gcloud "https://cloud.google.com/sdk/docs/install"
find_project
case "$command" in
  run) run_command ;;
  create) create ;;
  wait) if [ "$dry_run" = yes ]; then describe; else wait_until_active once; fi ;;
  setup) set_up ;;
  start) start_command ;;
  watch) if [ "$dry_run" = yes ]; then describe; worker_states; else watch; fi ;;
  status) describe; worker_states ;;
  logs) show_log "$one_worker" ;;
  stop) stop_command ;;
  fetch) fetch_results ;;
  delete) delete ;;
esac
