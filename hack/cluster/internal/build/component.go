// Package build (plumbing) compiles the programs a cluster is made of from the Go
// modules in hack/cluster/build, and keeps them in a cache outside the tree.
package build

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// component is one module of hack/cluster/build and the programs it gives.
type component struct {
	name     string                      // directory below the source
	module   string                      // whose version is the component's; "" for our own
	programs []program                   //
	cold     string                      // how long it took with an empty build cache on two cores
	ldflags  func(version string) string // nil: none
}

type program struct{ pkg, out string }

// components lists everything in building order, the longest first so that a
// person sees early what the wait is for.
func components() []component {
	return []component{
		{name: "k8s", module: "k8s.io/kubernetes", cold: "9 min", ldflags: kubernetesVersion, programs: []program{
			{"k8s.io/kubernetes/cmd/kube-apiserver", "kube-apiserver"},
			{"k8s.io/kubernetes/cmd/kube-controller-manager", "kube-controller-manager"},
			{"k8s.io/kubernetes/cmd/kube-scheduler", "kube-scheduler"},
			{"k8s.io/kubernetes/cmd/kubelet", "kubelet"},
			{"k8s.io/kubernetes/cmd/kube-proxy", "kube-proxy"},
			{"k8s.io/kubernetes/cmd/kubectl", "kubectl"},
		}},
		{name: "containerd", module: "github.com/containerd/containerd/v2", cold: "70 s",
			ldflags: func(v string) string {
				return "-X github.com/containerd/containerd/v2/version.Version=" + strings.TrimPrefix(v, "v")
			},
			programs: []program{
				{"github.com/containerd/containerd/v2/cmd/containerd", "containerd"},
				{"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2", "containerd-shim-runc-v2"},
				{"github.com/containerd/containerd/v2/cmd/ctr", "ctr"},
			}},
		{name: "etcd", module: "go.etcd.io/etcd/server/v3", cold: "45 s", programs: []program{{"go.etcd.io/etcd/server/v3", "etcd"}}},
		{name: "coredns", module: "github.com/coredns/coredns", cold: "70 s", programs: []program{{".", "coredns"}}},
		{name: "helm", module: "helm.sh/helm/v4", cold: "90 s",
			ldflags:  func(v string) string { return "-X helm.sh/helm/v4/internal/version.version=" + v },
			programs: []program{{"helm.sh/helm/v4/cmd/helm", "helm"}}},
		{name: "cni", module: "github.com/containernetworking/plugins", cold: "10 s", programs: []program{
			{"github.com/containernetworking/plugins/plugins/ipam/host-local", "cni/host-local"},
			{"github.com/containernetworking/plugins/plugins/main/bridge", "cni/bridge"},
			{"github.com/containernetworking/plugins/plugins/main/loopback", "cni/loopback"},
			{"github.com/containernetworking/plugins/plugins/main/ptp", "cni/ptp"},
			{"github.com/containernetworking/plugins/plugins/meta/portmap", "cni/portmap"},
		}},
		{name: "netpol", module: "github.com/cloudnativelabs/kube-router/v2", cold: "70 s", programs: []program{{".", "netpol"}}},
		{name: "box", cold: "3 s", programs: []program{{".", "box"}}},
	}
}

// kubernetesVersion sets what a release build would: clients compare it.
func kubernetesVersion(v string) string {
	parts := strings.SplitN(strings.TrimPrefix(v, "v"), ".", 3)
	if len(parts) < 3 {
		return ""
	}
	const p = "k8s.io/component-base/version."
	return strings.Join([]string{
		"-X " + p + "gitVersion=" + v, "-X " + p + "gitMajor=" + parts[0], "-X " + p + "gitMinor=" + parts[1],
		"-X " + p + "gitTreeState=clean", "-X " + p + "buildDate=1970-01-01T00:00:00Z",
		"-X k8s.io/client-go/pkg/version.gitVersion=" + v,
	}, " ")
}

// linkFlags are the linker's flags of c at a version.
func (c component) linkFlags(version string) string {
	flags := "-s -w"
	if c.ldflags != nil && version != "" {
		flags += " " + c.ldflags(version)
	}
	return flags
}

// moduleVersion finds the version of module that a go.mod file requires.
func moduleVersion(goMod []byte, module string) (string, error) {
	if module == "" {
		return "", nil
	}
	m := regexp.MustCompile(`(?m)^(?:require)?\s+` + regexp.QuoteMeta(module) + ` (v\S+)`).FindSubmatch(goMod)
	if m == nil {
		return "", fmt.Errorf("go.mod does not require %s", module)
	}
	return string(m[1]), nil
}

// inputs hashes all that decides what c's programs are: its sources and module
// files, the linker's flags, and the toolchain.
func (c component) inputs(dir, version, toolchain string) (string, error) {
	h := sha256.New()
	fmt.Fprintln(h, c.name, toolchain, c.linkFlags(version), c.programs)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if n := d.Name(); n != "go.mod" && n != "go.sum" && (filepath.Ext(n) != ".go" || strings.HasSuffix(n, "_test.go")) {
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		fmt.Fprintf(h, "%s %d\n", rel, len(b))
		_, err = h.Write(bytes.TrimSpace(b))
		return err
	})
	if err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil))[:16], nil
}
