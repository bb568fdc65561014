#!/bin/sh
# A kubelet with localStorageCapacityIsolation: false (documented for systems that cannot tell the size of their root
# filesystem) evicts nobody, not for memory either. Its cAdvisor then keeps no figures of filesystems, the eviction
# manager asks it whether images lie on a filesystem of their own, takes the missing answer for an error, and ends each
# of its rounds there: "failed to get HasDedicatedImageFs: ... cannot find filesystem info for device ...". A node short
# of memory is left to the kernel's OOM killer. Needs Go and Linux, and no cluster; fails if that changes.
set -eu
version=1.36.3
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat > main.go <<'END'
package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/google/cadvisor/cache/memory"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/kubelet/cadvisor"
)

func main() {
	klog.LogToStderr(false)
	klog.SetOutput(io.Discard)
	root := os.Args[1]
	for _, isolation := range []bool{true, false} {
		images := cadvisor.NewImageFsInfoProvider("unix:///run/containerd/containerd.sock")
		reader, err := cadvisor.New(klog.Background(), images, root, []string{"/"}, false, isolation)
		if err == nil {
			err = reader.Start()
		}
		if err != nil {
			panic(err)
		}
		// The question of the eviction manager (HasDedicatedImageFs), for the folder in which a runtime keeps images.
		for errors.Is(err, memory.ErrDataNotFound) || err == nil {
			if _, err = reader.GetDirFsInfo(root); err == nil {
				break
			}
			time.Sleep(time.Second) // until cAdvisor has looked for the first time
		}
		fmt.Println("localStorageCapacityIsolation:", isolation, "filesystem known:", err == nil, err)
	}
}
END
go mod init finding 2>/dev/null
for part in api apiextensions-apiserver apimachinery apiserver cli-runtime client-go cloud-provider cluster-bootstrap \
  code-generator component-base component-helpers controller-manager cri-api cri-client cri-streaming \
  csi-translation-lib dynamic-resource-allocation endpointslice externaljwt kms kube-aggregator kube-controller-manager kube-proxy \
  kube-scheduler kubectl kubelet metrics mount-utils pod-security-admission sample-apiserver sample-cli-plugin \
  sample-controller streaming; do
  go mod edit -replace "k8s.io/$part=k8s.io/$part@v0${version#1}"
done
go mod edit -require "k8s.io/kubernetes@v$version"
go mod tidy 2>/dev/null
echo "Kubernetes $version; expected: the filesystem is known to both"
CGO_ENABLED=0 go run . "$folder" > seen
cat seen
# Seen: true for the first, for the second: cannot find filesystem info for device ...
grep -q "Isolation: true filesystem known: true" seen
grep -q "Isolation: false filesystem known: false cannot find filesystem info" seen
