#!/usr/bin/env bash
# Build a bank on a Slurm cluster: plan it here, then submit every stage as an array of jobs, each after the one before
# it has ended well.
#
#   examples/slurm/submit_build.sh WORK_DIR <flags of tools/build_bank.py>     # the first time
#   examples/slurm/submit_build.sh WORK_DIR                                    # go on after a failure
#
# WORK_DIR must be on a file system that all nodes share. Stages that are done are not submitted, and within a stage
# only the tasks are run that are not done. Should a stage fail, the stages behind it are cancelled: look into
# WORK_DIR/logs, mend the cause, and call this again.
#
# Environment (flags of sbatch, separated by spaces):
#   GRAFT_SBATCH          for every stage, for example "--account=lm --partition=cpu"
#   GRAFT_COUNT_SBATCH    for the stages that count: count-N-map and count-N-reduce
#   GRAFT_ENCODE_SBATCH   for the stage that runs the donor, for example "--partition=gpu --gpus-per-task=1"
#   GRAFT_SINGLE_SBATCH   for the stages of one task: select, pack, assemble, report
#   GRAFT_MAX_TASKS       most array jobs of a stage (default 200); a stage of more tasks gives each job several
#   GRAFT_CHECKOUT, GRAFT_CONTAINER, GRAFT_CONTAINER_ARGS, GRAFT_MAX_RESTARTS   see build_bank.sbatch
set -euo pipefail

fail() {
    echo "error: $1" >&2
    exit 2
}

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
[ $# -ge 1 ] && [[ $1 != -* ]] || fail "expected WORK_DIR first, then the flags of tools/build_bank.py"
work="$(realpath -m -- "$1")"
shift
maximum=${GRAFT_MAX_TASKS:-200}
[[ $maximum =~ ^[1-9][0-9]*$ ]] || fail "GRAFT_MAX_TASKS: not a number of tasks (got $maximum; expected 1 or more)"
command -v sbatch >/dev/null || fail "sbatch: not found. Call this where jobs are submitted; without Slurm, tools/build_bank.py builds on one machine"

for word; do
    [[ $word != --work-dir && $word != --work-dir=* ]] || fail "--work-dir: is WORK_DIR, given first. Leave it out"
done
if [ -d "$here/../../megatron_graft" ] && [ -z "${GRAFT_CONTAINER:-}" ]; then # a checkout
    GRAFT_CHECKOUT="$(cd "$here/../.." && pwd)"
    export GRAFT_CHECKOUT PYTHONPATH="$GRAFT_CHECKOUT${PYTHONPATH:+:$PYTHONPATH}"
    [ -d "$GRAFT_CHECKOUT/.venv" ] && PATH="$GRAFT_CHECKOUT/.venv/bin:$PATH"
    build_stage=(python "$GRAFT_CHECKOUT/tools/build_stage.py")
elif [ -n "${GRAFT_CONTAINER:-}" ]; then
    read -ra more <<< "${GRAFT_CONTAINER_ARGS:-}"
    mkdir -p "$work"
    unset PYTHONPATH
    build_stage=(apptainer exec --env PYTHONSAFEPATH=1 --bind "$PWD,$work" --pwd "$PWD" "${more[@]}" "$GRAFT_CONTAINER"
        python -m megatron_graft.tools.build_stage)
else
    build_stage=(python -m megatron_graft.tools.build_stage)
fi

# Two chains over one directory would do each other's tasks twice.
label="graft build of $work"
queued="$(squeue --user="$(id -un)" --noheader --format='%i %k' | awk -v label="$label" '{ id = $1; sub(/^[^ ]+ /, "") } $0 == label && !n++ { print id }')"
[ -z "$queued" ] || fail "$work: its build is in the queue already (job $queued). Wait for it, or cancel it with scancel"

if [ $# -gt 0 ]; then
    "${build_stage[@]}" plan --work-dir "$work" "$@"
elif [ ! -f "$work/plan.json" ]; then
    fail "$work: has no plan. Give the flags of tools/build_bank.py (data, tokenizer, donor, output) behind WORK_DIR"
fi
[ -f "$work/plan.json" ] || exit 0 # the bank is there, and the plan has said so
stages="$("${build_stage[@]}" list --work-dir "$work")"
mkdir -p "$work/logs"

flags_of() { # of a stage, into the array `flags`
    local kind
    case $1 in
        count-*) kind=${GRAFT_COUNT_SBATCH:-} ;;
        encode) kind=${GRAFT_ENCODE_SBATCH:-} ;;
        *) kind=${GRAFT_SINGLE_SBATCH:-} ;;
    esac
    read -ra flags <<< "${GRAFT_SBATCH:-} $kind"
}

previous=""
while read -r stage tasks; do
    [ -n "$stage" ] || continue # nothing is left
    jobs=$((tasks < maximum ? tasks : maximum))
    flags_of "$stage"
    dependency=()
    [ -z "$previous" ] || dependency=(--dependency="afterok:$previous" --kill-on-invalid-dep=yes)
    previous="$(sbatch --parsable --requeue --array="0-$((jobs - 1))" --job-name="graft-$stage" --comment="$label" \
        --output="$work/logs/%x-%A_%a.log" "${dependency[@]}" "${flags[@]}" "$here/build_bank.sbatch" "$stage" "$work")" ||
        fail "$stage: sbatch refused it, see above. Stages before it are submitted; cancel them with scancel, or call this again when they have ended"
    previous=${previous%%;*} # on a cluster of clusters: number;cluster
    echo "$stage: $tasks tasks in $jobs jobs, submitted as job $previous"
done <<< "$stages"

if [ -z "$previous" ]; then
    echo "every stage is done"
else
    echo "logs: $work/logs; progress: squeue --me; the bank is there when job $previous has ended"
fi
