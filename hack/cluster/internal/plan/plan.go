// Package plan (decisions) lays a cluster out: what its machines are called and
// which addresses they, their pods and its Services have. Everything follows
// from the cluster's index, so two clusters with different indexes never meet.
package plan

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
)

// MaxIndex is the highest index a cluster may have: the pod range 10.200+index
// must stay below 10.256.
const MaxIndex = 55

// MaxNodes is the most nodes a cluster may have.
const MaxNodes = 200

// ControlPlane is the name of the machine that runs etcd and the API server.
const ControlPlane = "control-plane"

// Spec is what a person chooses about a cluster, plus the index it was given.
type Spec struct {
	Name      string `json:"name"`
	Index     int    `json:"index"`
	Nodes     int    `json:"nodes"`
	IPFamily  string `json:"ipFamily"`  // ipv4 | dual
	ProxyMode string `json:"proxyMode"` // nftables | iptables
	CNI       string `json:"cni"`       // ptp | bridge
	Cgroup    string `json:"cgroup"`    // v1 | v2: what the nodes see
}

// Node is one node's place in the plan. The IPv4 item comes first in each list.
type Node struct {
	Name     string
	Addrs    []netip.Addr
	PodCIDRs []netip.Prefix
}

// Plan is the whole layout. In each list the IPv4 item comes first; with
// IPFamily "ipv4" it is the only one.
type Plan struct {
	Spec         Spec
	HostLink     string         // interface in the machine's own network namespace
	MachineCIDRs []netip.Prefix // the network of the control plane and the nodes
	HostAddrs    []netip.Addr
	ControlPlane []netip.Addr
	PodCIDRs     []netip.Prefix
	ServiceCIDRs []netip.Prefix
	APIService   []netip.Addr // the kubernetes Service
	DNSService   []netip.Addr
	Nodes        []Node
}

var nameForm = regexp.MustCompile(`^[a-z][a-z0-9-]{0,30}$`)

// CheckName keeps a cluster's name fit for a directory, a cgroup and a label.
func CheckName(name string) error {
	if !nameForm.MatchString(name) {
		return fmt.Errorf("cluster name %q: want lower-case letters, digits and '-', a letter first, at most 31", name)
	}
	return nil
}

// Check says what is wrong with a specification, all of it at once.
func (s Spec) Check() error {
	var errs []error
	errs = append(errs, CheckName(s.Name))
	if s.Index < 0 || s.Index > MaxIndex {
		errs = append(errs, fmt.Errorf("cluster index %d: want 0 to %d", s.Index, MaxIndex))
	}
	if s.Nodes < 1 || s.Nodes > MaxNodes {
		errs = append(errs, fmt.Errorf("%d nodes: want 1 to %d", s.Nodes, MaxNodes))
	}
	for _, c := range []struct {
		what, got string
		want      [2]string
	}{
		{"ip-family", s.IPFamily, [2]string{"ipv4", "dual"}},
		{"proxy-mode", s.ProxyMode, [2]string{"nftables", "iptables"}},
		{"cni", s.CNI, [2]string{"ptp", "bridge"}},
		{"cgroup", s.Cgroup, [2]string{"v1", "v2"}},
	} {
		if c.got != c.want[0] && c.got != c.want[1] {
			errs = append(errs, fmt.Errorf("%s %q: want %s or %s", c.what, c.got, c.want[0], c.want[1]))
		}
	}
	return errors.Join(errs...)
}

// New lays out the cluster that s describes.
func New(s Spec) (Plan, error) {
	if err := s.Check(); err != nil {
		return Plan{}, err
	}
	p := Plan{Spec: s, HostLink: fmt.Sprintf("fl%d-host", s.Index)}
	i := byte(s.Index)
	p.add(family{
		machines: netip.PrefixFrom(netip.AddrFrom4([4]byte{172, 30, i, 0}), 24),
		machine:  func(n int) netip.Addr { return netip.AddrFrom4([4]byte{172, 30, i, byte(n)}) },
		pods:     netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 200 + i, 0, 0}), 16),
		nodePods: func(n int) netip.Prefix {
			return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 200 + i, byte(n), 0}), 24)
		},
		services: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 96 + i, 0, 0}), 16),
	})
	if s.IPFamily == "dual" {
		p.add(family{
			machines: netip.PrefixFrom(address6(i, 0, 0), 64),
			machine:  func(n int) netip.Addr { return address6(i, 0, n) },
			pods:     netip.PrefixFrom(address6(i, 0x100, 0), 56),
			nodePods: func(n int) netip.Prefix { return netip.PrefixFrom(address6(i, 0x100+n, 0), 64) },
			services: netip.PrefixFrom(address6(i, 0xfff0, 0), 112),
		})
	}
	return p, nil
}

// family is one address family's share of a plan.
type family struct {
	machines netip.Prefix
	machine  func(n int) netip.Addr
	pods     netip.Prefix
	nodePods func(n int) netip.Prefix
	services netip.Prefix
}

const (
	controlPlaneHost = 1
	firstNodeHost    = 11
	hostHost         = 254
)

func (p *Plan) add(f family) {
	p.MachineCIDRs = append(p.MachineCIDRs, f.machines)
	p.HostAddrs = append(p.HostAddrs, f.machine(hostHost))
	p.ControlPlane = append(p.ControlPlane, f.machine(controlPlaneHost))
	p.PodCIDRs = append(p.PodCIDRs, f.pods)
	p.ServiceCIDRs = append(p.ServiceCIDRs, f.services)
	p.APIService = append(p.APIService, offset(f.services.Addr(), 1))
	p.DNSService = append(p.DNSService, offset(f.services.Addr(), 10))
	for n := 1; n <= p.Spec.Nodes; n++ {
		if len(p.Nodes) < n {
			p.Nodes = append(p.Nodes, Node{Name: fmt.Sprintf("node%d", n)})
		}
		node := &p.Nodes[n-1]
		node.Addrs = append(node.Addrs, f.machine(firstNodeHost+n-1))
		node.PodCIDRs = append(node.PodCIDRs, f.nodePods(n))
	}
}

// address6 is host n of subnet s of cluster i in a unique local range (RFC 4193).
func address6(i byte, s, n int) netip.Addr {
	return netip.AddrFrom16([16]byte{0xfd, 0x66, 0x1a, 0x1e, 0, i, byte(s >> 8), byte(s), 14: byte(n >> 8), 15: byte(n)})
}

func offset(a netip.Addr, n byte) netip.Addr {
	b := a.AsSlice()
	b[len(b)-1] += n
	r, _ := netip.AddrFromSlice(b)
	return r
}

// Prefixes are all ranges the cluster uses; none may be in use on the machine.
func (p Plan) Prefixes() []netip.Prefix {
	var all []netip.Prefix
	all = append(all, p.MachineCIDRs...)
	all = append(all, p.PodCIDRs...)
	return append(all, p.ServiceCIDRs...)
}

// Node finds a node by name.
func (p Plan) Node(name string) (Node, bool) {
	for _, n := range p.Nodes {
		if n.Name == name {
			return n, true
		}
	}
	return Node{}, false
}

// Machines names the control plane and every node, in that order.
func (p Plan) Machines() []string {
	names := []string{ControlPlane}
	for _, n := range p.Nodes {
		names = append(names, n.Name)
	}
	return names
}

// FreeIndex picks the lowest index whose ranges overlap neither what other
// clusters hold (taken) nor what the machine routes already (routed).
func FreeIndex(s Spec, taken map[int]bool, routed []netip.Prefix) (int, error) {
	s.IPFamily = "dual"
	for i := 0; i <= MaxIndex; i++ {
		if taken[i] {
			continue
		}
		s.Index = i
		p, err := New(s)
		if err != nil {
			return 0, err
		}
		if !overlap(p.Prefixes(), routed) {
			return i, nil
		}
	}
	return 0, fmt.Errorf("no free address ranges: every index from 0 to %d is taken by a cluster or by a route of this machine", MaxIndex)
}

func overlap(a, b []netip.Prefix) bool {
	for _, x := range a {
		for _, y := range b {
			if x.Overlaps(y) {
				return true
			}
		}
	}
	return false
}
