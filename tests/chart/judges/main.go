// What the controllers of others make of FineTuneJobs: Flux' own evaluator of healthCheckExprs, kstatus alone, and a
// health script in the interpreter that Argo CD runs it in. Built and asked by tests/chart/judges.py.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"

	"github.com/fluxcd/cli-utils/pkg/kstatus/status"
	"github.com/fluxcd/pkg/apis/kustomize"
	"github.com/fluxcd/pkg/runtime/cel"
	lua "github.com/yuin/gopher-lua"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

type question struct {
	Flux    kustomize.HealthCheckExpressions `json:"flux"`
	Argo    string                           `json:"argo"`
	Objects []json.RawMessage                `json:"objects"`
}

type verdict struct {
	Flux    string `json:"flux"`
	Kstatus string `json:"kstatus"`
	Argo    any    `json:"argo"`
}

func main() {
	if err := answer(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func answer() error {
	var asked question
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		return err
	}
	evaluator, err := cel.NewStatusEvaluator(&asked.Flux)
	if err != nil {
		return err
	}
	verdicts := []verdict{}
	for _, raw := range asked.Objects {
		object := &unstructured.Unstructured{} // its own decoder keeps integers, as a client of the API server does
		if err := object.UnmarshalJSON(raw); err != nil {
			return err
		}
		verdicts = append(verdicts, verdict{
			Flux:    said(evaluator.Evaluate(context.Background(), object)),
			Kstatus: said(status.Compute(object)),
			Argo:    health(asked.Argo, object.Object),
		})
	}
	return json.NewEncoder(os.Stdout).Encode(verdicts)
}

func said(result *status.Result, err error) string {
	if err != nil {
		return "error: " + err.Error()
	}
	return result.Status.String()
}

// The libraries that Argo CD opens for a script without useOpenLibs (its os, time and date only, is left out): there
// is no string library.
func health(script string, object map[string]any) any {
	state := lua.NewState(lua.Options{SkipOpenLibs: true})
	defer state.Close()
	for name, open := range map[string]lua.LGFunction{
		lua.LoadLibName: lua.OpenPackage, lua.BaseLibName: lua.OpenBase, lua.TabLibName: lua.OpenTable,
	} {
		state.Push(state.NewFunction(open))
		state.Push(lua.LString(name))
		state.Call(1, 0)
	}
	state.SetGlobal("obj", toLua(state, object))
	if err := state.DoString(script); err != nil {
		return "error: " + err.Error()
	}
	return fromLua(state.Get(-1))
}

func toLua(state *lua.LState, value any) lua.LValue {
	switch typed := value.(type) {
	case bool:
		return lua.LBool(typed)
	case int64:
		return lua.LNumber(typed)
	case float64:
		return lua.LNumber(typed)
	case string:
		return lua.LString(typed)
	case []any:
		table := state.NewTable()
		for _, item := range typed {
			table.Append(toLua(state, item))
		}
		return table
	case map[string]any:
		table := state.NewTable()
		for key, item := range typed {
			table.RawSetString(key, toLua(state, item))
		}
		return table
	}
	return lua.LNil
}

func fromLua(value lua.LValue) any {
	switch typed := value.(type) {
	case lua.LBool:
		return bool(typed)
	case lua.LNumber:
		return float64(typed)
	case lua.LString:
		return string(typed)
	case *lua.LTable:
		object := map[string]any{}
		typed.ForEach(func(key, item lua.LValue) { object[key.String()] = fromLua(item) })
		return object
	}
	return nil
}
