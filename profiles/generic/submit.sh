#!/usr/bin/env bash
# A submit command at its smallest: start the job script on this machine, in the background, and print an id.
# On a real queue this is one line, for example: qsub -terse -l h_rt=... "$1"
set -euo pipefail
nohup bash "$1" >/dev/null 2>&1 </dev/null &
echo $!
