#!/usr/bin/env bash
# Several machines without a scheduler: run this on each of them, with the same HEAD and its own number.
#
#   HEAD=node0:29500 NODES=2 NODE=0 examples/torchrun.sh --data.path corpus/ --trainer.num_nodes 2     # on node0
#   HEAD=node0:29500 NODES=2 NODE=1 examples/torchrun.sh --data.path corpus/ --trainer.num_nodes 2
#
# torchrun starts a process for every GPU, finds the other machines through HEAD and tells each process its place;
# Lightning reads that. In the configuration, `devices` is the number of processes per machine.
# Without HEAD it is one machine, where `devices: N` in the configuration alone does the same.
#
# The machines are numbered because a torchrun that looks for its place itself (--rdzv-backend c10d) does not end when
# it has lost HEAD: it waits until the kernel gives up the connection, a quarter of an hour.
set -euo pipefail
if [[ -n ${HEAD:-} ]]; then
  place=(--nnodes "${NODES:-1}" --node-rank "${NODE:?the number of this machine, from 0}"
    --master-addr "${HEAD%:*}" --master-port "${HEAD##*:}")
else
  place=(--standalone)
fi
exec torchrun "${place[@]}" --nproc-per-node "${DEVICES:-8}" --no-python \
  lightning-dualpipe fit --config "${CONFIG:-examples/train_small.yaml}" "$@"
