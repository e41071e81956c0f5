#!/bin/sh
# The server from a shell, by reflection: buf is a client of any gRPC service. It comes with `make test`.
address=${1:-127.0.0.1:50051}
buf=${BUF:-.venv/bin/buf}

"$buf" curl --protocol grpc --http2-prior-knowledge "http://$address/taper.v1.ControlService/GetModelInfo"
"$buf" curl --protocol grpc --http2-prior-knowledge --data '{
  "prompt": {"text": "Tea or coffee?"},
  "plan": {"stages": [
    {"parallel": {"branches": [
      {"label": "tea", "prefix": {"text": "Tea:"}, "stopping": {"max_tokens": 4}},
      {"label": "coffee", "prefix": {"text": "Coffee:"}, "stopping": {"max_tokens": 4}}]}},
    {"serial": {"prefix": {"text": " So:"}, "stopping": {"max_tokens": 4}}}]}
}' "http://$address/taper.v1.InferenceService/Generate"
