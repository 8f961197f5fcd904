#!/usr/bin/env bash
""":" # Bash runs the no-op command ":" here and goes on; Python reads the start of a string that ends at the bottom.
#
# Pre-train a GPT-MoE with a grafted n-gram memory on real text. The same file, either way:
#
#     bash examples/pretrain_graft_moe.sh [Megatron flags]                               # starts torchrun itself
#     torchrun --nproc-per-node=2 examples/pretrain_graft_moe.sh [Megatron flags]        # is started by torchrun
#
# Flags given here are appended to the script's own and win. With nothing else set, text, tokenizer, data, donor and
# bank are made under WORK_DIR first (finished stages are skipped), and the run is evaluated and reported at its end
# under runs/RUN_NAME. Run it again to resume.
#
# Environment:
#   DATA_PATH         your own .bin/.idx prefix (or blend); needs TOKENIZER_MODEL. SPLIT is its --split (default 969,30,1).
#   TEXT, FOREIGN     or: your own .txt/.jsonl files, space-separated, in place of the default corpus
#   TOKENIZER_MODEL   SentencePiece .model or Hugging Face tokenizer.json
#   TOKENIZER_VOCAB_SIZE   ids of the tokenizer trained where none is given (default 8192; little text bears fewer)
#   GRAFT_BANK        a bank directory; "none" trains without one (several: append --graft-bank A B)
#   GRAFT_LAYERS      layers whose memory site reads a bank (default "2 3")
#   ENGRAM_LAYERS     layers whose memory site reads a trainable table of hashed n-grams (default: none)
#   ENGRAM_VOCAB_SIZE, ENGRAM_DIM   rows of each of its 16 heads, elements of each of its two orders (default 9973, 288)
#   NUM_EXPERTS       experts per layer (default 4); 0 trains the dense model
#   DONOR             packaged donor's name or a local causal-LM directory, for building the bank
#   BANK_ARGUMENTS    further flags for tools/build_bank.py
#   EVALUATION        what the finished run is evaluated on, NAME=PREFIX ... (default: the held-out text, and the foreign
#                     one where it was made); one NAME must be "heldout". "none": neither evaluated nor reported
#   RUN_NAME, RUNS_DIR, WORK_DIR, DEVICE (cpu or cuda)
#   GRAFT_THREADS     of each process on the CPU (default: its share of the processors)
#   RUN_COMMAND       what the report says the run was started by
#   GPUS_PER_NODE, NUM_NODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   as in Megatron's own examples
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
RUN_NAME="${RUN_NAME:-graft_moe}"
RUN_DIR="${RUNS_DIR:-runs}/${RUN_NAME}"
WORK_DIR="${WORK_DIR:-work}"
GRAFT_BANK="${GRAFT_BANK:-}"
read -ra GRAFT_LAYERS <<< "${GRAFT_LAYERS:-2 3}"
read -ra ENGRAM_LAYERS <<< "${ENGRAM_LAYERS:-}"
RUN_COMMAND="${RUN_COMMAND:-bash examples/pretrain_graft_moe.sh${*:+ $*}}" # for the report
DEVICE="${DEVICE:-$(nvidia-smi -L > /dev/null 2>&1 && echo cuda || echo cpu)}"

case " ${EVALUATION:-none} " in
    " none " | *" heldout="*) ;;
    *)
        echo "error: EVALUATION: names no held-out text (got ${EVALUATION}; expected heldout=PREFIX among its words). Name the text to report on heldout, or set EVALUATION=none" >&2
        exit 2
        ;;
esac

# A checkout is used in place; from an installed package this file lies inside it and Python finds the rest.
if [ -d "${HERE}/../megatron_graft" ]; then
    ROOT="$(cd "${HERE}/.." && pwd)"
    export PYTHONPATH="${ROOT}${PYTHONPATH:+:${PYTHONPATH}}"
    # shellcheck disable=SC2329
    tool() { exec python "${HERE}/../tools/$1.py" "${@:2}"; }
else
    # shellcheck disable=SC2329
    tool() { exec python -m "megatron_graft.tools.$1" "${@:2}"; }
fi

# ---------------------------------------------------------------- what the run needs
PREPARE_ARGS=(--work-dir "${WORK_DIR}")
[ -n "${TEXT:-}" ] && { read -ra FILES <<< "${TEXT}"; PREPARE_ARGS+=(--input "${FILES[@]}"); }
[ -n "${FOREIGN:-}" ] && { read -ra FILES <<< "${FOREIGN}"; PREPARE_ARGS+=(--foreign "${FILES[@]}"); }
[ -n "${TOKENIZER_MODEL:-}" ] && PREPARE_ARGS+=(--tokenizer-model "${TOKENIZER_MODEL}")
[ -n "${TOKENIZER_VOCAB_SIZE:-}" ] && PREPARE_ARGS+=(--vocab-size "${TOKENIZER_VOCAB_SIZE}")
[ -n "${GRAFT_BANK}" ] && PREPARE_ARGS+=(--bank "${GRAFT_BANK}")
[ -n "${DONOR:-}" ] && PREPARE_ARGS+=(--donor "${DONOR}")
TOKENIZER_MODEL="${TOKENIZER_MODEL:-${WORK_DIR}/tokenizer/tokenizer.model}"
if [ -n "${DATA_PATH:-}" ]; then
    read -ra BLEND <<< "${DATA_PATH}"
    [ -f "${DATA_PATH}.idx" ] && BLEND=("${DATA_PATH}") # one data set, under a path with spaces
    SPLIT="${SPLIT:-969,30,1}"
    PREPARE_ARGS+=(--data-path "${BLEND[@]}" --split "${SPLIT}")
    DATA_ARGS=(--data-path "${BLEND[@]}" --split "${SPLIT}")
    EVALUATION_DATA=()
    for PREFIX in "${BLEND[@]}"; do # of each, the validation share of SPLIT is read
        [ -f "${PREFIX}.idx" ] && EVALUATION_DATA+=("heldout${EVALUATION_DATA:+-$((${#EVALUATION_DATA[@]} + 1))}=${PREFIX}")
    done
else
    DATA_ARGS=(
        --train-data-path "${WORK_DIR}/data/train_text_document"
        --valid-data-path "${WORK_DIR}/data/heldout_text_document"
    )
    EVALUATION_DATA=("heldout=${WORK_DIR}/data/heldout_text_document")
fi
[ -n "${BANK_ARGUMENTS:-}" ] && { read -ra FILES <<< "${BANK_ARGUMENTS}"; PREPARE_ARGS+=(--bank-arguments "${FILES[@]}"); }
case "${TOKENIZER_MODEL}" in
    *.model) TOKENIZER_TYPE=SentencePieceTokenizer ;;
    *.json) TOKENIZER_TYPE=HuggingFaceTokenizer TOKENIZER_MODEL="$(dirname "${TOKENIZER_MODEL}")" ;; # Megatron wants its directory
    *) TOKENIZER_TYPE=HuggingFaceTokenizer ;;
esac
DATA_ARGS+=(
    --tokenizer-type "${TOKENIZER_TYPE}"
    --tokenizer-model "${TOKENIZER_MODEL}"
    --data-cache-path "${WORK_DIR}/index-cache"
    --no-create-attention-mask-in-dataloader
    --num-workers 0 # our look-ahead thread reads already
)

# ---------------------------------------------------------------- model
MODEL_ARGS=(
    --num-layers 4
    --hidden-size 256
    --ffn-hidden-size 512
    --num-attention-heads 4
    --seq-length 256
    --max-position-embeddings 256
    --position-embedding-type rope
    --normalization RMSNorm
    --swiglu
    --disable-bias-linear
    --attention-dropout 0
    --hidden-dropout 0
    --init-method-std 0.02
)
MOE_ARGS=()
if [ "${NUM_EXPERTS:-4}" != 0 ]; then
    MOE_ARGS=(
        --num-experts "${NUM_EXPERTS:-4}"
        --moe-router-topk 2
        --moe-router-load-balancing-type aux_loss
        --moe-aux-loss-coeff 1e-2
        --moe-token-dispatcher-type alltoall
    )
fi
MEMORY_ARGS=()
if [ "${GRAFT_BANK}" != none ]; then
    MEMORY_ARGS=(--graft-bank "${GRAFT_BANK:-${WORK_DIR}/bank}" --graft-layers "${GRAFT_LAYERS[@]}")
fi
if [ ${#ENGRAM_LAYERS[@]} -gt 0 ]; then
    MEMORY_ARGS+=(--engram-layers "${ENGRAM_LAYERS[@]}")
    MEMORY_ARGS+=(--engram-vocab-size "${ENGRAM_VOCAB_SIZE:-9973}" --engram-dim "${ENGRAM_DIM:-288}")
fi

# ---------------------------------------------------------------- training
TRAINING_ARGS=(
    --micro-batch-size 8
    --global-batch-size 16
    --train-iters 375
    --lr 2e-3
    --min-lr 2e-4
    --lr-decay-style cosine
    --lr-warmup-fraction 0.1
    --weight-decay 0.1
    --adam-beta1 0.9
    --adam-beta2 0.95
    --clip-grad 1.0
    --use-distributed-optimizer
    --seed 1234
)
LOGGING_ARGS=(
    --log-interval 10
    --eval-interval 125
    --eval-iters 4
    --tensorboard-dir "${RUN_DIR}/tensorboard"
    --graft-run-dir "${RUN_DIR}"
)
CHECKPOINT_ARGS=(
    --save "${RUN_DIR}/checkpoints"
    --load "${RUN_DIR}/checkpoints"
    --save-interval 125
    --ckpt-format torch_dist
    --dist-ckpt-optim-fully-reshardable # so that another layout can go on from them
    --exit-signal-handler
)

# ---------------------------------------------------------------- device
if [ "${DEVICE}" = cuda ]; then # written for a GPU cluster; has not been run on one
    if [ -z "${LOCAL_RANK:-}" ]; then # torch counts the visible ones, nvidia-smi all
        PROCESSES="${GPUS_PER_NODE:-$(python -c 'import torch; print(torch.cuda.device_count())')}"
    fi
    FLAGS="$(python -c '
from megatron_graft.compat.optional import cuda_flags
print("--distributed-backend nccl --bf16", *cuda_flags())')"
    read -ra DEVICE_ARGS <<< "${FLAGS##*$'\n'}" # the last line: an import may print others
else
    export CUDA_VISIBLE_DEVICES= # DEVICE=cpu is asked for on machines with GPUs, too
    # Two processes of one thread beat one process of two wherever a core is shared: threads wait for each other at the
    # end of every small operation, data-parallel ranks once a step.
    PROCESSES="${GPUS_PER_NODE:-$(($(nproc) > 1 ? 2 : 1))}"
    DEVICE_ARGS=( # what has no kernel on a CPU
        --distributed-backend gloo
        --transformer-impl local
        --no-gradient-accumulation-fusion
        --no-masked-softmax-fusion
        --no-bias-dropout-fusion
        --no-bias-swiglu-fusion
        --no-rope-fusion
        --no-persist-layer-norm
    )
    WORKERS="${LOCAL_WORLD_SIZE:-${PROCESSES}}"
    THREADS=$(($(nproc) / WORKERS))
    export OMP_NUM_THREADS="${GRAFT_THREADS:-$((THREADS > 0 ? THREADS : 1))}"
    # Keep freed memory: every step allocates the same large tensors, and fresh pages take time.
    export MALLOC_MMAP_MAX_="${MALLOC_MMAP_MAX_:-0}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-8589934592}"
fi
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

ARGS=(
    "${MODEL_ARGS[@]}" "${MOE_ARGS[@]}" "${MEMORY_ARGS[@]}" "${DATA_ARGS[@]}" "${TRAINING_ARGS[@]}"
    "${LOGGING_ARGS[@]}" "${CHECKPOINT_ARGS[@]}" "${DEVICE_ARGS[@]}" "$@"
)

# ---------------------------------------------------------------- run
# Signals sent to this script reach the program that runs; training saves a checkpoint on SIGTERM. An interrupt goes on as
# the signal that is named first: what bash starts in the background ignores SIGINT, unless like torchrun it asks for it.
# USR1 is passed on for Slurm, where torchrun starts this script; a torchrun that this script started does not survive it.
forwarding_signals() {
    "${@:2}" &
    local child=$! status=0
    trap 'kill -TERM ${child} 2> /dev/null || true' TERM
    # shellcheck disable=SC2064
    trap "kill -$1 ${child} 2> /dev/null || true" INT
    trap 'kill -USR1 ${child} 2> /dev/null || true' USR1
    wait "${child}" || status=$?
    while kill -0 "${child}" 2> /dev/null; do # a trapped signal ends the first wait, not the child
        status=0
        wait "${child}" || status=$?
    done
    trap - TERM INT USR1
    return "${status}"
}

fits_tokenizer() { # whether there is such a bank, made with this run's tokenizer
    [ -f "$1/bank.json" ] && python -c '
import sys
from pathlib import Path
from megatron_graft.bank.manifest import read_manifest
from megatron_graft.data.tokenizer import load_tokenizer
sys.exit(read_manifest(Path(sys.argv[1])).identity.tokenizer.fingerprint != load_tokenizer(sys.argv[2]).fingerprint)
' "$1" "${TOKENIZER_MODEL}"
}

evaluate_and_report() { # in one process, whatever layout was trained
    unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK MASTER_ADDR MASTER_PORT
    FOREIGN_DATA="${WORK_DIR}/data/foreign_text_document" # one's own text may come without it
    [ -n "${DATA_PATH:-}" ] || [ ! -f "${FOREIGN_DATA}.idx" ] || EVALUATION_DATA+=("foreign=${FOREIGN_DATA}")
    [ -z "${EVALUATION:-}" ] || read -ra EVALUATION_DATA <<< "${EVALUATION}"
    local options=(--if-finished --data "${EVALUATION_DATA[@]}")
    if [ "${GRAFT_BANK}" = none ] && fits_tokenizer "${WORK_DIR}/bank"; then # comparable with the run that has it
        options+=(--classify-by "${WORK_DIR}/bank")
    fi
    forwarding_signals TERM tool evaluate "${RUN_DIR}" "${options[@]}"
    forwarding_signals TERM tool report "${RUN_DIR}" --work-dir "${WORK_DIR}" --command "${RUN_COMMAND}"
}

main() {
    # One process per file system works, the others wait for it.
    forwarding_signals TERM tool prepare_run "${PREPARE_ARGS[@]}"
    if [ -n "${LOCAL_RANK:-}" ]; then
        forwarding_signals TERM python -m megatron_graft.training.pretrain "${ARGS[@]}"
    else
        # After SIGTERM; its own 30 s are too little to save a large model.
        export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
        forwarding_signals INT python -m torch.distributed.run \
            --nproc-per-node "${PROCESSES}" \
            --nnodes "${NUM_NODES:-1}" \
            --node-rank "${NODE_RANK:-0}" \
            --master-addr "${MASTER_ADDR:-localhost}" \
            --master-port "${MASTER_PORT:-6000}" \
            -m megatron_graft.training.pretrain "${ARGS[@]}"
    fi
    if [ "${RANK:-${NODE_RANK:-0}}" = 0 ] && [ "${EVALUATION:-}" != none ]; then
        evaluate_and_report
    fi
}

main; exit 0 # one line, all read by now: a long run does not mind that this file is changed under it
# What follows is for Python; to bash it is a document that nothing reads.
# shellcheck disable=SC2317
: << '"END OF PYTHON"'
"""
if __name__ == "__main__":
    import os
    import sys

    os.execvp("bash", ["bash", os.path.abspath(__file__), *sys.argv[1:]])

"END OF PYTHON"
