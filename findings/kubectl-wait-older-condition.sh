#!/bin/sh
# `kubectl wait --for=condition=Complete` does not believe a condition that is True where the condition's own
# observedGeneration is older than metadata.generation, also where status.observedGeneration is current: it says "timed
# out waiting for the condition", and nothing of the generation. So a controller that has seen an edit must renew the
# observedGeneration of every condition, also of those the edit has nothing to do with. Needs Go and Python, and no
# cluster (the API is pretended); fails if that changes.
set -eu
folder=$(mktemp -d)
server=
trap 'kill $server 2>/dev/null || true; chmod -R u+w "$folder"; rm -rf "$folder"' EXIT
cd "$folder"
cat > api.py <<'END'
import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GROUP, VERSION = "example.com", "v1"
KIND = {"kind": "Run", "apiVersion": f"{GROUP}/{VERSION}"}


def run(name, seen):
    condition = {"type": "Complete", "status": "True", "reason": "Done", "observedGeneration": seen}
    meta = {"name": name, "namespace": "default", "generation": 2, "resourceVersion": "1", "uid": name}
    return {**KIND, "metadata": meta, "status": {"observedGeneration": 2, "conditions": [condition]}}


RUNS = {"older": run("older", 1), "current": run("current", 2)}
FOUND = {"name": "runs", "singularName": "run", "namespaced": True, "kind": "Run", "verbs": ["get", "list", "watch"]}
ANSWERS = {
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": []},
    "/apis": {
        "kind": "APIGroupList",
        "apiVersion": "v1",
        "groups": [{"name": GROUP, "versions": [{"groupVersion": f"{GROUP}/{VERSION}", "version": VERSION}]}],
    },
    f"/apis/{GROUP}/{VERSION}": {
        "kind": "APIResourceList",
        "groupVersion": f"{GROUP}/{VERSION}",
        "resources": [FOUND],
    },
}


class Api(BaseHTTPRequestHandler):
    def do_GET(self):
        path, _, query = self.path.partition("?")
        name = next((n for n in RUNS if path.endswith(f"/{n}") or f"metadata.name%3D{n}" in query), None)
        answer = ANSWERS.get(path)
        if answer is None and path.endswith("/runs"):
            answer = {**KIND, "kind": "RunList", "metadata": {"resourceVersion": "1"}, "items": [RUNS[name]]}
        elif answer is None and name:
            answer = RUNS[name]
        self.send_response(200 if answer else 404)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if "watch=true" in query:
            if "sendInitialEvents=true" in query:
                self.tell("ADDED", RUNS[name])
                end = {"resourceVersion": "1", "annotations": {"k8s.io/initial-events-end": "true"}}
                self.tell("BOOKMARK", {**KIND, "metadata": end})
            self.wfile.flush()
            time.sleep(10)  # nothing happens any more
            return
        self.wfile.write(json.dumps(answer or {"kind": "Status", "status": "Failure", "code": 404}).encode())

    def tell(self, kind, thing):
        self.wfile.write(json.dumps({"type": kind, "object": thing}).encode() + b"\n")

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
print(server.server_address[1], flush=True)
server.serve_forever()
END
cat > main.go <<'END'
package main

import (
	"os"

	"k8s.io/kubectl/pkg/cmd"
)

func main() {
	if err := cmd.NewDefaultKubectlCommand().Execute(); err != nil {
		os.Exit(1)
	}
}
END
export CGO_ENABLED=0
go mod init example.com/kubectl > /dev/null 2>&1
go get k8s.io/kubectl@v0.36.3 > /dev/null 2>&1
go mod tidy > /dev/null 2>&1
go build -trimpath -o kubectl .
mkfifo port
python3 api.py > port &
server=$!
read -r number < port
wait_for() { HOME=$folder ./kubectl --server "http://127.0.0.1:$number" wait "runs/$1" --for=condition=Complete --timeout=3s; }
echo "kubectl 1.36.3 (k8s.io/kubectl 0.36.3); expected: the condition is met by both"
wait_for current
if wait_for older 2> said; then echo "older is believed now"; exit 1; fi
cat said
# Seen: "run.example.com/current condition met", and of the other: "error: timed out waiting for the condition on runs/older".
grep -q "timed out waiting for the condition on runs/older" said
if grep -qi generation said; then exit 1; fi
