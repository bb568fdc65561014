#!/bin/sh
# sigs.k8s.io/yaml, by which kubectl and Helm read: a merge key (<<) that stands below a key overrides it. By the
# description of merge keys (https://yaml.org/type/merge.html) the keys of the map itself win, wherever << stands, and
# so it is with PyYAML and Go's yaml.v3. Needs Go; fails if that changes.
set -eu
folder=$(mktemp -d)
trap 'chmod -R u+w "$folder"; rm -rf "$folder"' EXIT
cd "$folder"
cat > main.go <<'END'
package main

import (
	"fmt"

	"sigs.k8s.io/yaml"
)

func main() {
	for _, text := range []string{"{<<: {rate: 1}, rate: 3}", "{rate: 3, <<: {rate: 1}}"} {
		read, err := yaml.YAMLToJSON([]byte(text))
		fmt.Println(text, "->", string(read), err)
	}
}
END
export GOFLAGS=-mod=mod
go mod init example.com/merge 2>/dev/null
go get sigs.k8s.io/yaml@v1.6.0 2>/dev/null
echo "sigs.k8s.io/yaml v1.6.0; right by the description: {\"rate\":3} both times"
go run . | tee seen
# Seen: {"rate":3} for the first, {"rate":1} for the second.
grep -qF '{rate: 3, <<: {rate: 1}} -> {"rate":1} <nil>' seen
