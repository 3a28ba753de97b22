#!/usr/bin/env bash
# R1-Zero in small, rewards alone: runs/r1_zero.sh [FOLDER [OPTIONS OF EVERY STAGE]]
. "$(dirname "$0")/stage.sh"

stage r1_base --config r1_base
stage r1_zero --config r1_zero --init-from "$run/r1_base"
