#!/bin/sh
# The kubelet's reader of logs (kubectl logs --tail=2 --limit-bytes=64; PodLogOptions.tailLines and limitBytes): both
# limits together give the *first* bytes of the last lines, so that the end, where an error stands, is what is missing.
# Needs Go; fails if that changes.
set -eu
folder=$(mktemp -d)
trap 'chmod -R u+w "$folder"; rm -rf "$folder"' EXIT
cd "$folder"
cat > main.go <<'END'
package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strings"

	"k8s.io/cri-client/pkg/logs"
)

func main() {
	at := "2026-01-01T00:00:00.000000000Z stdout F "
	text := at + "first\n" + at + strings.Repeat("progress ", 20) + "\n" + at + "ValueError: boom\n"
	if err := os.WriteFile("0.log", []byte(text), 0o600); err != nil {
		panic(err)
	}
	for _, limit := range []*int64{nil, new(int64)} {
		if limit != nil {
			*limit = 64
		}
		tail := int64(2)
		var out bytes.Buffer
		options := &logs.LogOptions{TailLines: &tail, LimitBytes: limit}
		if err := logs.ReadLogs(context.Background(), "0.log", "id", options, nil, &out, &out); err != nil {
			panic(err)
		}
		fmt.Println("limited:", limit != nil, "bytes:", out.Len(), "holds the error:", strings.Contains(out.String(), "boom"))
	}
}
END
export GOFLAGS=-mod=mod
go mod init example.com/logs 2>/dev/null
go get k8s.io/cri-client@v0.36.3 2>/dev/null
echo "k8s.io/cri-client v0.36.3, the last 2 of 3 lines, with and without a limit of 64 bytes"
go run . | tee seen
# Seen: "limited: false … holds the error: true", then "limited: true bytes: 64 holds the error: false".
grep -q "limited: true bytes: 64 holds the error: false" seen
