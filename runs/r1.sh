#!/usr/bin/env bash
# R1 in small (figure 2 of its report), R1-Zero at its side and a student after it:
# runs/r1.sh [FOLDER [OPTIONS OF EVERY STAGE]]
. "$(dirname "$0")/stage.sh"

stage base --config r1_base2
stage zero --config r1_zero2 --init-from "$run/base"
stage cold --config r1_cold --init-from "$run/base"
stage reasoning --config r1_reasoning --init-from "$run/cold"
stage sft --config r1_sft --init-from "$run/base" --sft.policy "$run/reasoning"
stage r1 --config r1 --init-from "$run/sft"
stage student --config r1_student2 --sft.policy "$run/r1"
