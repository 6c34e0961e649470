// Package network (plumbing) wires a cluster's machines together: a bridge in the
// control plane's network namespace, a veth pair to each node, and one to the
// machine itself so that kubectl and tests reach the API server, pods and
// Services. Nothing else of the machine's own networking is touched.
package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/plan"
)

const bridge = "br0"

// place is a network namespace and the way to change it.
type place struct {
	*netlink.Handle
	ns netns.NsHandle
}

func (p place) close() {
	p.Handle.Close()
	p.ns.Close()
}

// at opens the network namespace of a process; 0 is the caller's own.
func at(pid int) (place, error) {
	ns, err := netns.Get()
	if pid != 0 {
		ns, err = netns.GetFromPid(pid)
	}
	if err != nil {
		return place{}, fmt.Errorf("opening the network namespace of process %d: %w", pid, err)
	}
	h, err := netlink.NewHandleAt(ns)
	if err != nil {
		ns.Close()
		return place{}, fmt.Errorf("opening netlink in the network namespace of process %d: %w", pid, err)
	}
	return place{h, ns}, nil
}

// ControlPlane sets up the bridge, the link to this machine, and the routes on
// both sides. pid is a process in the control plane's network namespace.
func ControlPlane(p plan.Plan, pid int) error {
	host, err := at(0)
	if err != nil {
		return err
	}
	defer host.close()
	cp, err := at(pid)
	if err != nil {
		return err
	}
	defer cp.close()
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: bridge}}
	if err := cp.LinkAdd(br); err != nil {
		return fmt.Errorf("adding bridge: %w", err)
	}
	if err := cp.up(bridge, p.ControlPlane, p.MachineCIDRs); err != nil {
		return err
	}
	if err := cp.veth(p.HostLink, host, bridge); err != nil {
		return err
	}
	if err := host.up(p.HostLink, p.HostAddrs, p.MachineCIDRs); err != nil {
		return err
	}
	for f := range p.ControlPlane {
		for _, dst := range []netip.Prefix{p.PodCIDRs[f], p.ServiceCIDRs[f]} {
			if err := host.route(p.HostLink, dst, p.ControlPlane[f]); err != nil {
				return err
			}
		}
		// kube-proxy of the first node answers for Services called from outside.
		if err := cp.route(bridge, p.ServiceCIDRs[f], p.Nodes[0].Addrs[f]); err != nil {
			return err
		}
	}
	for _, n := range p.Nodes {
		for f := range n.Addrs {
			if err := cp.route(bridge, n.PodCIDRs[f], n.Addrs[f]); err != nil {
				return err
			}
		}
	}
	return nil
}

// Node links a node to the bridge, gives it its addresses, and routes the other
// nodes' pods and everything unknown.
func Node(p plan.Plan, n plan.Node, pid, controlPlane int) error {
	cp, err := at(controlPlane)
	if err != nil {
		return err
	}
	defer cp.close()
	node, err := at(pid)
	if err != nil {
		return err
	}
	defer node.close()
	// A node that died a moment ago may have left its half.
	if l, err := cp.LinkByName(n.Name); err == nil {
		if err := cp.LinkDel(l); err != nil && !errors.Is(err, syscall.ENODEV) {
			return fmt.Errorf("removing the old link of %s: %w", n.Name, err)
		}
	}
	if err := cp.veth("eth0", node, bridge, n.Name); err != nil {
		return err
	}
	if err := node.up("eth0", n.Addrs, p.MachineCIDRs); err != nil {
		return err
	}
	for f := range n.Addrs {
		if err := node.route("eth0", everywhere(n.Addrs[f]), p.ControlPlane[f]); err != nil {
			return err
		}
		for _, m := range p.Nodes {
			if m.Name == n.Name {
				continue
			}
			if err := node.route("eth0", m.PodCIDRs[f], m.Addrs[f]); err != nil {
				return err
			}
		}
	}
	return nil
}

// RemoveHost removes the machine's side; its addresses and routes go with it. It
// is no error if it is gone already.
func RemoveHost(p plan.Plan) error {
	l, err := netlink.LinkByName(p.HostLink)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err == nil {
		err = netlink.LinkDel(l)
	}
	if err != nil && !errors.Is(err, syscall.ENODEV) {
		return fmt.Errorf("removing %s: %w", p.HostLink, err)
	}
	return nil
}

// Routed lists what this machine routes or has addresses for, default routes apart.
func Routed() ([]netip.Prefix, error) {
	routes, err := netlink.RouteListFiltered(unix.AF_UNSPEC, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return nil, fmt.Errorf("listing routes: %w", err)
	}
	var all []netip.Prefix
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		if p, err := netip.ParsePrefix(r.Dst.String()); err == nil && p.Bits() > 0 {
			all = append(all, p)
		}
	}
	return all, nil
}

// veth makes a pair: far in the namespace other, the near end (named near, or
// else "up0") a port of the bridge here.
func (p place) veth(far string, other place, br string, near ...string) error {
	name := "up0"
	if len(near) > 0 {
		name = near[0]
	}
	master, err := p.LinkByName(br)
	if err != nil {
		return fmt.Errorf("finding %s: %w", br, err)
	}
	v := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name, MasterIndex: master.Attrs().Index},
		PeerName: far, PeerNamespace: netlink.NsFd(int(other.ns))}
	if err := p.LinkAdd(v); err != nil {
		return fmt.Errorf("adding the link %s to %s: %w", name, far, err)
	}
	l, err := p.LinkByName(name)
	if err != nil {
		return err
	}
	return p.LinkSetUp(l)
}

func (p place) up(name string, addrs []netip.Addr, nets []netip.Prefix) error {
	if lo, err := p.LinkByName("lo"); err == nil {
		if err := p.LinkSetUp(lo); err != nil {
			return fmt.Errorf("setting lo up: %w", err)
		}
	}
	l, err := p.LinkByName(name)
	if err != nil {
		return fmt.Errorf("finding %s: %w", name, err)
	}
	for f, a := range addrs {
		addr := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(a, nets[f].Bits()))}
		if a.Is6() {
			// The plan gives each address once; duplicate detection would only cost a second.
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := p.AddrReplace(l, addr); err != nil {
			return fmt.Errorf("giving %s to %s: %w", a, name, err)
		}
	}
	if err := p.LinkSetUp(l); err != nil {
		return fmt.Errorf("setting %s up: %w", name, err)
	}
	return nil
}

func (p place) route(link string, dst netip.Prefix, via netip.Addr) error {
	l, err := p.LinkByName(link)
	if err != nil {
		return fmt.Errorf("finding %s: %w", link, err)
	}
	r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: ipNet(dst), Gw: via.AsSlice()}
	if err := p.RouteReplace(r); err != nil {
		return fmt.Errorf("routing %s via %s: %w", dst, via, err)
	}
	return nil
}

func everywhere(like netip.Addr) netip.Prefix {
	if like.Is4() {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// Sysctls are the settings of a machine's own network namespace: it forwards for
// its pods, and asymmetric paths (a pod called through another node) are allowed.
func Sysctls() map[string]string {
	s := map[string]string{"net/ipv4/ip_forward": "1", "net/ipv4/conf/all/rp_filter": "0", "net/ipv4/conf/default/rp_filter": "0",
		"net/ipv4/conf/all/send_redirects": "0", "net/ipv4/conf/default/send_redirects": "0"}
	if _, err := os.Stat("/proc/sys/net/ipv6"); err == nil {
		s["net/ipv6/conf/all/forwarding"] = "1"
		s["net/ipv6/conf/default/dad_transmits"] = "0"
	}
	return s
}
