#!/bin/sh
# Kubernetes CRDs: a field with `nullable: true` and null among the values of its `enum` still refuses null ("Unsupported
# value"), although OpenAPI 3.0.3 asks for just that to allow it. Without the enum, null is taken. Asked of the API
# server's own validator. Needs Go; fails if that changes.
set -eu
folder=$(mktemp -d)
trap 'chmod -R u+w "$folder"; rm -rf "$folder"' EXIT
cd "$folder"
cat > main.go <<'END'
package main

import (
	"encoding/json"
	"fmt"

	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	v1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/validation"
)

func main() {
	for _, schema := range []string{
		`{"type": "string", "nullable": true}`,
		`{"type": "string", "nullable": true, "enum": ["a", null]}`,
	} {
		var field v1.JSONSchemaProps
		if err := json.Unmarshal([]byte(`{"type": "object", "properties": {"x": `+schema+`}}`), &field); err != nil {
			panic(err)
		}
		var internal apiextensions.JSONSchemaProps
		if err := v1.Convert_v1_JSONSchemaProps_To_apiextensions_JSONSchemaProps(&field, &internal, nil); err != nil {
			panic(err)
		}
		validator, _, err := validation.NewSchemaValidator(&internal)
		if err != nil {
			panic(err)
		}
		refused := validation.ValidateCustomResource(nil, map[string]any{"x": nil}, validator)
		fmt.Println(schema, "with x: null ->", refused)
	}
}
END
export GOFLAGS=-mod=mod
go mod init example.com/crd 2>/dev/null
go get k8s.io/apiextensions-apiserver@v0.36.3 2>/dev/null
echo "k8s.io/apiextensions-apiserver v0.36.3; right: [] both times"
go run . | tee seen
# Seen: [] for the first; for the second [x: Unsupported value: null: supported values: "a", "null"].
grep -qF 'enum": ["a", null]} with x: null -> [x: Unsupported value: null' seen
