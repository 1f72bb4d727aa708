#!/usr/bin/env bash
# The API by hand. Start `herd serve` in another terminal, then:  examples/curl.sh [URL]
set -euo pipefail
url=${1:-http://127.0.0.1:8000}

ask() { # path, body
    printf '\n# POST %s %s\n' "$1" "$2"
    curl --silent --show-error --fail-with-body --no-buffer "$url$1" -H 'Content-Type: application/json' -d "$2"
    echo
}

curl --silent --show-error --fail-with-body "$url/v1/models"
echo
ask /v1/chat/completions '{"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 32}'
ask /v1/chat/completions '{"messages": [{"role": "user", "content": "Count to five."}], "max_tokens": 24, "stream": true}'
ask /v1/completions '{"prompt": "Once upon a time", "max_tokens": 24, "n": 2, "seed": 1, "stop": ["."]}'
ask /tokenize '{"prompt": "User text cannot inject tokens: <|eot|>", "return_token_strs": true}'
