package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/fairlead-mesh/fairlead/internal/identity"
	"github.com/fairlead-mesh/fairlead/internal/zds"
)

// This file runs a node proxy without this project's agent and control plane: any program that is configured as Istio's
// ztunnel is, with a file for the control plane's knowledge.

// proxyAgent is the CNI agent of a node whose proxy was started by StartProxy: it names pods to the proxy, and no more.
type proxyAgent struct {
	*zds.Server
	close []func() error
}

// stop ends the agent and the certificate service.
func (a *proxyAgent) stop() error {
	if a == nil {
		return nil
	}
	var errs []error
	for _, f := range a.close {
		errs = append(errs, f())
	}
	return errors.Join(errs...)
}

// Workloads writes the file from which proxies learn of the pods, those with HBONE as they are in the mesh, and returns
// its path. text is appended: services, policies.
func (w *World) Workloads(text string, inMesh ...*Pod) (string, error) {
	var b strings.Builder
	b.WriteString("workloads:\n")
	for _, p := range inMesh {
		fmt.Fprintf(&b, "- uid: Kubernetes//Pod/%[2]s/%[1]s\n  name: %[1]s\n  namespace: %[2]s\n  serviceAccount: %[3]s\n"+
			"  trustDomain: cluster.local\n  workloadIps: [%[4]q, %[5]q]\n  protocol: HBONE\n  node: %[6]s\n  network: \"\"\n  services: {}\n",
			p.Name, p.Namespace, p.ServiceAccount, p.Addrs[0], p.Addrs[1], p.node.Name)
	}
	b.WriteString(text)
	file := filepath.Join(w.Dir, "workloads.yaml")
	return file, os.WriteFile(file, []byte(b.String()), 0o644)
}

// StartProxy starts a node proxy, the program at path, with the pods of a file made by Workloads and certificates of an
// authority, and names these pods of the node to it. env comes last.
func (n *Node) StartProxy(ctx context.Context, path, workloads string, authority identity.Authority, env []string, pods ...*Pod) error {
	a := &proxyAgent{Server: zds.NewServer(zap.NewNop())}
	n.proxyAgent = a
	dir := n.world.Dir
	socket, root, token := filepath.Join(dir, n.Name+".zds"), filepath.Join(dir, n.Name+".ca.pem"), filepath.Join(dir, n.Name+".token")
	if err := os.WriteFile(token, []byte("token"), 0o600); err != nil {
		return err
	}
	stopAuthority, err := ServeAuthority(n.thread.net, authority, root)
	if err != nil {
		return err
	}
	serving, stopServing := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- a.Serve(serving, socket) }()
	a.close = []func() error{stopAuthority, func() error { stopServing(); return <-served }}
	for wait := 0; ; wait++ { // Serve makes the socket
		if _, err := os.Stat(socket); err == nil || wait == 500 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	n.ztunnel, err = n.thread.start(filepath.Join(dir, "log"), command{
		name: "ztunnel." + n.Name, path: path, cgroup: filepath.Join(n.cgroup, "kubepods", "besteffort", "podztunnel", "ztunnel"),
		env: append([]string{
			"XDS_ADDRESS=", "LOCAL_XDS_PATH=" + workloads, "CA_ADDRESS=https://" + AuthorityAddress.String(), "CA_ROOT_CA=" + root,
			"AUTH_TOKEN=" + token, "INPOD_UDS=" + socket, "NODE_NAME=" + n.Name, "POD_NAME=" + n.ztunnelPod(), "POD_NAMESPACE=" + rootNamespace,
			"SERVICE_ACCOUNT=ztunnel", "INSTANCE_IP=" + n.Addrs[0].String(), "CLUSTER_ID=Kubernetes", "RUST_LOG=info",
		}, env...),
	})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	for _, p := range pods {
		err := a.Add(ctx, zds.Workload{UID: p.UID, Name: p.Name, Namespace: p.Namespace, ServiceAccount: p.ServiceAccount, Netns: p.thread.net})
		if err != nil {
			return fmt.Errorf("name pod %s to the proxy: %w; %s", p.Name, err, n.ztunnel.tail())
		}
	}
	a.Synced()
	return n.ztunnel.ready(ctx, n.thread, netip.MustParseAddrPort("127.0.0.1:15021"), "/healthz/ready")
}

// StartDedicated starts a ztunnel, the program at path, inside the pod, for it alone, with the workloads of a file made by
// Workloads and certificates below the directory that all proxies with self-made ones share.
func (p *Pod) StartDedicated(ctx context.Context, path, workloads string) error {
	dir := p.node.world.Dir
	var err error
	p.proxy, err = p.thread.start(filepath.Join(dir, "log"), command{
		name: "ztunnel." + p.Namespace + "." + p.Name, path: path, cgroup: p.cgroup,
		env: []string{
			"PROXY_MODE=dedicated", "PROXY_WORKLOAD_INFO=" + p.Namespace + "/" + p.Name + "/" + p.ServiceAccount,
			"LOCAL_XDS_PATH=" + workloads, "FAKE_CA=true", "FAIRLEAD_FAKE_CA_DIR=" + filepath.Join(dir, "fake-ca"),
			"NODE_NAME=" + p.node.Name, "CLUSTER_ID=Kubernetes",
		},
	})
	if err != nil {
		return err
	}
	return p.proxy.ready(ctx, p.thread, netip.MustParseAddrPort("127.0.0.1:15021"), "/healthz/ready")
}
