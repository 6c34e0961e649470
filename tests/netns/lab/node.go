package lab

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/internal/testenv"
)

// Node stands for a machine of a cluster: a network namespace on the switch, a mount namespace with a /run and a BPF
// file system of its own, and a cgroup that all its programs and pods live below.
type Node struct {
	Name  string
	Addrs []netip.Addr

	// ZtunnelEnv is added to the environment of a ztunnel that StartZtunnel starts.
	ZtunnelEnv []string

	world  *World
	index  int
	dir    string // of CNI files, below World.Dir
	cgroup string
	thread *thread

	agent   *process
	ztunnel *process
	ports   proxyPorts // of ztunnel
	// proxyAgent is what StartProxy runs in the agent's place, or nil.
	proxyAgent *proxyAgent

	mu       sync.Mutex
	pods     int // made so far
	programs map[string]*program
}

func (w *World) newNode(index int) (*Node, error) {
	n := &Node{Name: fmt.Sprintf("node%d", index+1), Addrs: nodeAddresses(index), world: w, index: index, ports: defaultPorts, programs: map[string]*program{}}
	n.dir = filepath.Join(w.Dir, n.Name)
	n.cgroup = filepath.Join(w.cgroup, n.Name)
	if err := n.makeFiles(); err != nil {
		return nil, err
	}
	var err error
	if n.thread, err = newThread(n.enter); err != nil {
		return nil, err
	}
	err = w.control.do(func() error { return attachPort(n.Name, n.Addrs, podPrefixes(index)) })
	if err == nil {
		err = n.thread.do(n.route)
	}
	if err != nil {
		n.thread.end()
		return nil, err
	}
	return n, nil
}

// makeFiles makes the node's directories and the CNI configuration of a cluster without a mesh: one plugin, which
// reports the wiring that the lab made.
func (n *Node) makeFiles() error {
	for _, dir := range []string{n.cniBin(), n.cniConf(), n.cniResults(), n.cgroup, filepath.Join(n.cgroup, "system")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	for _, name := range []string{wirePlugin, podProgram, Kubelet, HostProcess} {
		if err := os.Symlink(self, filepath.Join(n.cniBin(), name)); err != nil {
			return err
		}
	}
	return n.RewriteCNI()
}

// RewriteCNI writes the node's CNI configuration as it was before anybody else came.
func (n *Node) RewriteCNI() error {
	conf, err := json.MarshalIndent(map[string]any{
		"cniVersion": "1.0.0", "name": "lab",
		"plugins": []any{map[string]any{"type": wirePlugin, "results": n.cniResults()}},
	}, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(n.cniConf(), "10-lab.conflist"), append(conf, '\n'), 0o644)
}

func (n *Node) cniBin() string     { return filepath.Join(n.dir, "cni", "bin") }
func (n *Node) cniConf() string    { return filepath.Join(n.dir, "cni", "net.d") }
func (n *Node) cniResults() string { return filepath.Join(n.dir, "cni", "results") }

// enter makes the calling thread one of the node: its network and its mounts.
func (n *Node) enter() error {
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_NEWNET); err != nil {
		return os.NewSyscallError("unshare namespaces", err)
	}
	if err := n.mount(); err != nil {
		return err
	}
	if err := routerSysctls(); err != nil {
		return err
	}
	return plug(n.Name, int(n.world.control.net.Fd()), n.Addrs)
}

// mount gives the node what a machine has for itself. istiod's name is written in the node's hosts file, because
// there is no DNS.
func (n *Node) mount() error {
	hosts := filepath.Join(n.dir, "hosts")
	lines := "127.0.0.1 localhost\n::1 localhost\n"
	for _, a := range controlAddresses() {
		lines += fmt.Sprintf("%s %s\n", a, istiodHost)
	}
	if err := os.WriteFile(hosts, []byte(lines), 0o644); err != nil {
		return err
	}
	if err := mountHosts(hosts); err != nil {
		return err
	}
	for _, m := range []struct{ source, target, kind string }{
		{"tmpfs", "/run", "tmpfs"},
		{"bpf", "/sys/fs/bpf", "bpf"},
	} {
		if err := unix.Mount(m.source, m.target, m.kind, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	for _, dir := range []string{"/run/netns", "/run/ztunnel", "/run/istio-cni"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	return nil
}

// mountHosts shows the calling thread, which has a mount namespace of its own, a hosts file. Mounts that others make
// later are seen here, what is mounted here is seen nowhere else.
func mountHosts(file string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount(file, "/etc/hosts", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount /etc/hosts: %w", err)
	}
	return nil
}

// route tells the node where the other nodes' pods are.
func (n *Node) route() error {
	if err := testenv.Settle("eth0", n.Addrs...); err != nil {
		return err
	}
	for other := range n.world.opts.Nodes {
		if other == n.index {
			continue
		}
		if err := addRoutes(podPrefixes(other), nodeAddresses(other)); err != nil {
			return err
		}
	}
	return nil
}

// gateways are the addresses on the node's end of each pod's link.
func (n *Node) gateways() []netip.Addr {
	var all []netip.Addr
	for _, p := range podPrefixes(n.index) {
		all = append(all, hostOf(p, 1))
	}
	return all
}

// NoRoute makes an address among the node's pods that nothing answers from: packets to it are dropped without a word
// (silent), or answered with "host unreachable".
func (n *Node) NoRoute(silent bool) (netip.Addr, error) {
	kind, number := unix.RTN_UNREACHABLE, 251
	if silent {
		kind, number = unix.RTN_BLACKHOLE, 250
	}
	addr := hostOf(podPrefixes(n.index)[0], number)
	return addr, n.thread.do(func() error {
		return netlink.RouteReplace(&netlink.Route{Dst: ipNet(netip.PrefixFrom(addr, addr.BitLen())), Type: kind})
	})
}
