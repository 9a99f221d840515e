#!/usr/bin/env bash
# Several machines without a scheduler: run this on each of them, with the same HEAD.
#
#   HEAD=node0:29500 NODES=2 examples/torchrun.sh --data.path corpus/ --trainer.num_nodes 2
#
# torchrun starts a process for every GPU, finds the other machines through HEAD and tells each process its place;
# Lightning reads that. In the configuration, `devices` is the number of processes per machine.
# Without HEAD it is one machine, where `devices: N` in the configuration alone does the same.
set -euo pipefail
exec torchrun \
  --nnodes "${NODES:-1}" \
  --nproc-per-node "${DEVICES:-8}" \
  --rdzv-backend c10d \
  --rdzv-endpoint "${HEAD:-localhost:0}" \
  --no-python \
  lightning-dualpipe fit --config "${CONFIG:-examples/train_small.yaml}" "$@"
