package ztunnel_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/vishvananda/netlink"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest"
	"go.uber.org/zap/zaptest/observer"
	"google.golang.org/grpc"
	ca "istio.io/api/security/v1alpha1"

	"github.com/fairlead-mesh/fairlead/bpf"
	"github.com/fairlead-mesh/fairlead/cni/redirect"
	"github.com/fairlead-mesh/fairlead/internal/accesslog"
	"github.com/fairlead-mesh/fairlead/internal/identity"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/netns"
	"github.com/fairlead-mesh/fairlead/internal/testenv"
	"github.com/fairlead-mesh/fairlead/internal/wire"
	"github.com/fairlead-mesh/fairlead/internal/xds"
	"github.com/fairlead-mesh/fairlead/internal/zds"
	"github.com/fairlead-mesh/fairlead/ztunnel"
)

// world is a network with pods on two nodes, each with a ztunnel, and a control plane that the test plays. All run in
// this process; the pods' network namespaces, their redirection and every protocol between the parts are real.
type world struct {
	t          *testing.T
	fabric     *os.File // joins the pods; a client or server in it is outside the mesh
	redirector *redirect.Redirector
	bpffs      string
	xds        *xds.Server
	control    string // address of the control plane
	server     *grpc.Server
	authority  *identity.SelfSigned
}

// node is one node's proxy.
type node struct {
	name  string
	agent *zds.Server
	logs  *observer.ObservedLogs
	stats string
	ready string
	// socket is where the agent waits for proxies.
	socket string
	end    context.CancelFunc // the proxy, as SIGTERM does
	stop   func()             // end the proxy, wait, and end the agent
}

// pod is one pod, as the test sees it.
type pod struct {
	name string
	ns   *os.File
	ip4  netip.Addr
	ip6  netip.Addr
}

// resolvConf names a file, in place of the system's, among a node's settings.
const resolvConf = "resolv.conf"

const fabric4, fabric6 = "10.79.0.1", "fd79::1"

func newWorld(t *testing.T) *world {
	t.Helper()
	testenv.RequireBPF(t)
	root, err := bpf.FindCgroup2("/proc/self/mounts")
	testenv.Require(t, err == nil, "a cgroup2 mount")
	w := &world{t: t, fabric: testenv.Netns(t), bpffs: filepath.Join(t.TempDir(), "bpf")}
	w.must(netns.Do(w.fabric, func() error {
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "fabric"}}); err != nil {
			return err
		}
		return configure("fabric", fabric4, fabric6)
	}))
	// Applications are in the parent of the proxy's cgroup only in so far as they have no proxy's mark.
	cgroup := filepath.Join(root, fmt.Sprintf("fairlead-ztunnel-test-%d", os.Getpid()))
	enterCgroup(t, root, cgroup)
	cfg := redirect.Config{BPFFS: w.bpffs, Cgroup: cgroup, HostNetns: w.fabric}
	t.Cleanup(func() {
		if err := redirect.Uninstall(cfg); err != nil {
			t.Errorf("uninstall: %v", err)
		}
	})
	w.redirector, err = redirect.New(cfg)
	w.must(err)
	t.Cleanup(func() { w.redirector.Close() })
	w.must(w.redirector.EnsureProxy(os.Getpid()))
	w.authority, err = identity.NewSelfSigned("cluster.local", 0)
	w.must(err)
	w.serveControlPlane()
	return w
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// enterCgroup moves this process into a cgroup of its own until the test ends.
func enterCgroup(t *testing.T, root, cgroup string) {
	t.Helper()
	content, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	home := "/"
	for line := range strings.Lines(string(content)) {
		if rest, ok := strings.CutPrefix(line, "0::"); ok {
			home = strings.TrimSpace(rest)
		}
	}
	move := func(to string) error {
		return os.WriteFile(filepath.Join(to, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0)
	}
	if err := os.Mkdir(cgroup, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := move(cgroup); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := move(filepath.Join(root, home)); err != nil {
			t.Error(err)
		}
		if err := os.Remove(cgroup); err != nil {
			t.Error(err)
		}
	})
}

// configure brings a device and lo of the current namespace up, with its addresses.
func configure(device, ip4, ip6 string) error {
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/all/accept_dad", []byte("0"), 0); err != nil {
		return err
	}
	for name, addrs := range map[string][]string{"lo": nil, device: {ip4 + "/24", ip6 + "/64"}} {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		for _, a := range addrs {
			addr, err := netlink.ParseAddr(a)
			if err != nil {
				return err
			}
			addr.Flags = 2 // IFA_F_NODAD
			if err := netlink.AddrAdd(link, addr); err != nil {
				return err
			}
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
	}
	return nil
}

// pod makes a pod's network, without redirection.
func (w *world) pod(name string, number int) *pod {
	w.t.Helper()
	p := &pod{name: name, ns: testenv.Netns(w.t)}
	ip4, ip6 := fmt.Sprintf("10.79.0.%d", number), fmt.Sprintf("fd79::%d", number)
	p.ip4, p.ip6 = netip.MustParseAddr(ip4), netip.MustParseAddr(ip6)
	w.must(netns.Do(w.fabric, func() error {
		bridge, err := netlink.LinkByName("fabric")
		if err != nil {
			return err
		}
		veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "eth0", PeerNamespace: netlink.NsFd(int(p.ns.Fd()))}
		if err := netlink.LinkAdd(veth); err != nil {
			return err
		}
		if err := netlink.LinkSetMaster(veth, bridge); err != nil {
			return err
		}
		return netlink.LinkSetUp(veth)
	}))
	w.must(netns.Do(p.ns, func() error {
		if err := configure("eth0", ip4, ip6); err != nil {
			return err
		}
		for _, gw := range []string{fabric4, fabric6} {
			if err := netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(gw)}); err != nil {
				return err
			}
		}
		return testenv.Settle("eth0", p.ip4, p.ip6)
	}))
	return p
}

// enrol redirects a pod and hands it to a node's proxy, as the CNI agent does.
func (w *world) enrol(n *node, p *pod) {
	w.t.Helper()
	redirected := redirect.Pod{UID: "uid-" + p.name, Netns: p.ns, IPs: []netip.Addr{p.ip4, p.ip6}}
	_, err := w.redirector.Ensure(w.t.Context(), redirected)
	w.must(err)
	w.hand(n, p)
	w.t.Cleanup(func() {
		if err := w.redirector.Remove(p.ns); err != nil {
			w.t.Error(err)
		}
	})
}

// hand gives a pod to a node's proxy; how it is redirected is the caller's business.
func (w *world) hand(n *node, p *pod) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 10*time.Second)
	defer cancel()
	w.must(n.agent.Add(ctx, zds.Workload{UID: "uid-" + p.name, Name: p.name, Namespace: "shop", ServiceAccount: p.name, Netns: p.ns}))
}

// anyCaller trusts whoever asks; who may ask is not what is tested here.
type anyCaller struct{}

func (anyCaller) Authenticate(context.Context) (identity.Caller, error) {
	return identity.Caller{Identity: mesh.Identity{TrustDomain: "cluster.local", Namespace: "istio-system", ServiceAccount: "ztunnel"}}, nil
}

func (anyCaller) Authorize(context.Context, identity.Caller, mesh.Identity) error { return nil }

func (w *world) serveControlPlane() {
	w.t.Helper()
	log := zaptest.NewLogger(w.t, zaptest.Level(zap.WarnLevel))
	w.xds = xds.NewServer(xds.ServerConfig{
		Scope: func(context.Context, *core.Node, string) (string, error) { return "all", nil },
		Order: []string{wire.AuthorizationType, wire.AddressType}, Log: log,
	})
	server := grpc.NewServer(xds.ServerOptions()...)
	discovery.RegisterAggregatedDiscoveryServiceServer(server, w.xds)
	ca.RegisterIstioCertificateServiceServer(server, identity.NewServer(identity.ServerConfig{
		Authenticator: anyCaller{}, Authorizer: anyCaller{}, Authority: w.authority, Log: log,
	}))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	w.must(err)
	w.control, w.server = "http://"+l.Addr().String(), server
	go server.Serve(l)
	w.t.Cleanup(server.Stop)
}

// push makes the control plane send exactly these workloads, services and policies.
func (w *world) push(workloads []*mesh.Workload, services []*mesh.Service, policies []*mesh.Authorization) {
	w.t.Helper()
	var addresses, authorizations []xds.Resource
	add := func(list *[]xds.Resource, r xds.Resource, err error) {
		w.must(err)
		*list = append(*list, r)
	}
	for _, v := range workloads {
		r, err := xds.NewResource(v.UID, wire.EncodeWorkload(v))
		add(&addresses, r, err)
	}
	for _, v := range services {
		r, err := xds.NewResource(v.Key().String(), wire.EncodeService(v))
		add(&addresses, r, err)
	}
	for _, v := range policies {
		r, err := xds.NewResource(v.Key(), wire.EncodeAuthorization(v))
		add(&authorizations, r, err)
	}
	w.xds.Set(wire.AuthorizationType, "all", authorizations)
	w.xds.Set(wire.AddressType, "all", addresses)
}

// workload describes a pod to the mesh.
func (p *pod) workload(node string, change func(*mesh.Workload)) *mesh.Workload {
	w := &mesh.Workload{
		UID: "Kubernetes//Pod/shop/" + p.name, Name: p.name, Namespace: "shop", ServiceAccount: p.name, ClusterID: "Kubernetes",
		Node: node, Addresses: []netip.Addr{p.ip4, p.ip6}, Protocol: mesh.ProtocolHBONE, WorkloadName: p.name, WorkloadType: "deployment",
		CanonicalName: p.name, CanonicalRevision: "v1", Healthy: true, Services: map[mesh.NamespacedHostname][]mesh.Port{},
	}
	if change != nil {
		change(w)
	}
	return w
}

// node starts a node's proxy.
func (w *world) node(name string, env map[string]string) *node {
	w.t.Helper()
	dir := w.t.TempDir()
	n := &node{name: name, agent: zds.NewServer(zap.NewNop()), stats: testenv.FreeAddr(w.t), ready: testenv.FreeAddr(w.t)}
	agentCtx, stopAgent := context.WithCancel(context.Background())
	ctx, cancel := context.WithCancel(context.Background())
	var agent, proxy sync.WaitGroup
	n.end = cancel
	n.stop = func() { cancel(); proxy.Wait(); stopAgent(); agent.Wait() }
	w.t.Cleanup(n.stop)
	socket := filepath.Join(dir, "z")
	n.socket = socket
	n.agent.Synced()
	agent.Go(func() {
		if err := n.agent.Serve(agentCtx, socket); err != nil {
			w.t.Error(err)
		}
	})
	all := map[string]string{
		"NODE_NAME": name, "XDS_ADDRESS": w.control, "INPOD_UDS": n.socket, "FAIRLEAD_BPFFS": w.bpffs,
		"ADMIN_ADDR": testenv.FreeAddr(w.t), "STATS_ADDR": n.stats, "READINESS_ADDR": n.ready, "TERMINATION_GRACE_PERIOD": "0",
	}
	for k, v := range env {
		all[k] = v
	}
	cfg, err := ztunnel.ConfigFromEnv(func(k string) string { return all[k] })
	w.must(err)
	if path := env[resolvConf]; path != "" {
		cfg.ResolvConf = path
	}
	access, logs := observer.New(zapcore.DebugLevel)
	n.logs = logs
	proxy.Go(func() {
		err := ztunnel.Run(ctx, cfg, ztunnel.Log{
			Process: zap.NewNop(), Level: zap.NewAtomicLevel(), Access: accesslog.New(zap.New(access)),
		})
		if err != nil {
			w.t.Errorf("ztunnel on %s: %v", name, err)
		}
	})
	return n
}

// line waits for the node's next access-log line that has all these fields, and returns it.
func (n *node) line(t *testing.T, want map[string]any) map[string]any {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		for _, entry := range n.logs.All() {
			if fields := entry.ContextMap(); holds(fields, want) {
				return fields
			}
		}
		if time.Now().After(deadline) {
			var all []string
			for _, entry := range n.logs.All() {
				all = append(all, fmt.Sprint(entry.ContextMap()))
			}
			t.Fatalf("%s has no line with %v; it has\n%s", n.name, want, strings.Join(all, "\n"))
		}
	}
}

func holds(fields, want map[string]any) bool {
	for k, v := range want {
		got := fields[k]
		if part, ok := v.(contains); ok {
			if text, _ := got.(string); !strings.Contains(text, string(part)) {
				return false
			}
		} else if got != v {
			return false
		}
	}
	return true
}

// contains is a part of a wanted text.
type contains string
