// Package config (decisions) says how each daemon of a cluster is run: its command
// line and its files, from the plan alone.
package config

import (
	"bytes"
	"embed"
	"fmt"
	"path/filepath"
	"strings"
	"text/template"

	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/build"
	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/plan"
)

//go:embed files
var files embed.FS

// Where a node's daemons find each other and their files, inside the node.
const (
	ContainerdSocket = "/run/containerd/containerd.sock"
	containerdFile   = "/etc/containerd/config.toml"
	kubeletFile      = "/var/lib/kubelet/config.yaml"
	kubeProxyFile    = "/etc/kubernetes/kube-proxy.yaml"
)

// Paths of a cluster on the machine; nodes see them at the same places.
type Paths struct {
	Bin  string // the built programs
	Run  string // the cluster's own directory
	Runc string
}

// PKI is the directory of keys and kubeconfigs.
func (p Paths) PKI() string { return filepath.Join(p.Run, "pki") }

func (p Paths) pki(name string) string { return filepath.Join(p.PKI(), name) }

// Daemon is a program to keep running.
type Daemon struct {
	Name string
	Args []string // without the program's name
}

// Etcd keeps nothing safe over a power cut of the machine: speed is worth more here.
func Etcd(p Paths) Daemon {
	return Daemon{"etcd", []string{
		"--data-dir=" + filepath.Join(p.Run, plan.ControlPlane, "etcd"), "--unsafe-no-fsync", "--log-level=warn",
		"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
		"--listen-peer-urls=http://127.0.0.1:2380", "--initial-advertise-peer-urls=http://127.0.0.1:2380", "--initial-cluster=default=http://127.0.0.1:2380",
	}}
}

// APIServer reaches webhook pods directly (aggregator routing): no kube-proxy runs
// in the control plane's network namespace.
func APIServer(p Paths, c plan.Plan) Daemon {
	bind := "0.0.0.0"
	if len(c.ControlPlane) > 1 {
		bind = "::"
	}
	return Daemon{"kube-apiserver", []string{
		"--etcd-servers=http://127.0.0.1:2379", "--bind-address=" + bind, "--advertise-address=" + c.ControlPlane[0].String(), "--secure-port=6443",
		"--service-cluster-ip-range=" + join(c.ServiceCIDRs),
		"--client-ca-file=" + p.pki("ca.crt"), "--tls-cert-file=" + p.pki("apiserver.crt"), "--tls-private-key-file=" + p.pki("apiserver.key"),
		"--service-account-key-file=" + p.pki("sa.pub"), "--service-account-signing-key-file=" + p.pki("sa.key"),
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--kubelet-client-certificate=" + p.pki("apiserver-kubelet-client.crt"), "--kubelet-client-key=" + p.pki("apiserver-kubelet-client.key"),
		"--kubelet-preferred-address-types=InternalIP",
		"--requestheader-client-ca-file=" + p.pki("ca.crt"), "--requestheader-allowed-names=front-proxy-client",
		"--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group", "--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--proxy-client-cert-file=" + p.pki("front-proxy-client.crt"), "--proxy-client-key-file=" + p.pki("front-proxy-client.key"),
		"--enable-aggregator-routing=true", "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
		"--allow-privileged=true", "--profiling=false",
	}}
}

// Controllers are the daemons that must come after the API server is ready: before
// it has made its own RBAC objects they give up.
func Controllers(p Paths) []Daemon {
	kubeconfig := func(name string) []string {
		f := p.pki(name + ".kubeconfig")
		return []string{"--kubeconfig=" + f, "--authentication-kubeconfig=" + f, "--authorization-kubeconfig=" + f, "--leader-elect=false", "--bind-address=127.0.0.1"}
	}
	return []Daemon{
		{"kube-controller-manager", append(kubeconfig("controller-manager"),
			"--root-ca-file="+p.pki("ca.crt"), "--service-account-private-key-file="+p.pki("sa.key"),
			"--cluster-signing-cert-file="+p.pki("ca.crt"), "--cluster-signing-key-file="+p.pki("ca.key"),
			"--use-service-account-credentials=true", "--flex-volume-plugin-dir="+filepath.Join(p.Run, plan.ControlPlane, "flexvolume"))},
		{"kube-scheduler", kubeconfig("scheduler")},
	}
}

// Containerd is a node's container runtime.
func Containerd() Daemon { return Daemon{"containerd", []string{"--config=" + containerdFile}} }

// NodeDaemons are those that need the API server.
func NodeDaemons(p Paths, n plan.Node) []Daemon {
	return []Daemon{
		{"kubelet", []string{"--config=" + kubeletFile, "--kubeconfig=" + p.pki(n.Name+".kubeconfig"), "--root-dir=/var/lib/kubelet",
			"--node-ip=" + join(n.Addrs), "--hostname-override=" + n.Name}},
		{"kube-proxy", []string{"--config=" + kubeProxyFile}},
	}
}

// values are what the templates see.
type values struct {
	plan.Plan
	Paths                    Paths
	Node                     plan.Node
	PauseImage, CoreDNSImage string
	ContainerdSocket         string
	PodCIDR, IPFamilyPolicy  string
}

func newValues(p Paths, c plan.Plan) values {
	v := values{Plan: c, Paths: p, PauseImage: build.PauseImage, CoreDNSImage: build.CoreDNSImage, ContainerdSocket: ContainerdSocket,
		PodCIDR: join(c.PodCIDRs), IPFamilyPolicy: "SingleStack"}
	if len(c.DNSService) > 1 {
		v.IPFamilyPolicy = "RequireDualStack"
	}
	return v
}

// NodeFiles are a node's configuration files by their path in the node.
func NodeFiles(p Paths, c plan.Plan, n plan.Node) (map[string][]byte, error) {
	v := newValues(p, c)
	v.Node = n
	out := map[string][]byte{}
	for path, name := range map[string]string{
		containerdFile: "containerd.toml", kubeletFile: "kubelet.yaml", kubeProxyFile: "kube-proxy.yaml", "/etc/cni/net.d/10-lab.conflist": "cni.json",
		"/etc/hosts": "hosts", "/etc/resolv.conf": "resolv.conf",
	} {
		b, err := render(name, v)
		if err != nil {
			return nil, err
		}
		out[path] = b
	}
	return out, nil
}

// Bootstrap are the API objects that must exist before kubelets start.
func Bootstrap(p Paths, c plan.Plan) ([]byte, error) {
	return render("bootstrap.yaml", newValues(p, c))
}

// CoreDNS are the API objects of the cluster's DNS.
func CoreDNS(p Paths, c plan.Plan) ([]byte, error) { return render("coredns.yaml", newValues(p, c)) }

func render(name string, v values) ([]byte, error) {
	t, err := template.New(name).Option("missingkey=error").ParseFS(files, "files/"+name)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if err := t.Execute(&b, v); err != nil {
		return nil, fmt.Errorf("rendering %s: %w", name, err)
	}
	return b.Bytes(), nil
}

func join[T fmt.Stringer](l []T) string {
	var s []string
	for _, v := range l {
		s = append(s, v.String())
	}
	return strings.Join(s, ",")
}
