#!/usr/bin/env bash
# The tables of Engram-27B (arXiv 2601.07372, table 5 and appendix) as flags, to be read into one's own launch script:
#
#     source examples/engram_27b.sh
#     torchrun ... -m megatron_graft.training.pretrain "${ENGRAM_27B[@]}" [the model's own flags]
#
# Orders 2 and 3, eight heads each, in layers 2 and 15 of 30, 1280 elements per order; the paper's 2,262,400 slots are
# read as two orders of 1,131,200 rows a head. That makes 5.79 billion parameters; the paper, which does not say how its
# slots are meant, has 5.7.
# shellcheck disable=SC2034  # read by whoever sources this
ENGRAM_27B=(
    --engram-layers 2 15
    --engram-dialect deepseek
    --engram-max-order 3
    --engram-heads 8
    --engram-vocab-size 1131200
    --engram-dim 1280
    --engram-across-documents # the published n-grams know no documents; leave this out to stop at their starts
    --engram-lr-mult 5
    --engram-wd-mult 0
    --graft-gate plain
    --graft-conv-kernel 4
    --graft-conv-dilation 3
)
