package main

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"

	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// Two machines on one: each is a network namespace with a bridge for its pods, and a link joins them. The namespaces
// have no names, so they are gone when this process and its children are.

// uplink is the name of the link between the machines, at both ends.
const uplink = "uplink"

// machine is one of the two.
type machine struct {
	name    string
	index   int // 1 or 2, third byte of its pods' addresses
	ns      *os.File
	nextPod int
	// control is the TCP congestion control of its pods.
	control string
}

// congestionControl is what Linux has unless told otherwise, where that is allowed. Some machines have one that paces, which
// costs more than all that is measured on a link between namespaces.
func congestionControl() string {
	if slices.Contains(strings.Fields(readOr("/proc/sys/net/ipv4/tcp_allowed_congestion_control")), "cubic") {
		return "cubic"
	}
	return "reno"
}

// podNetwork is where a machine's pods are.
func (m *machine) podNetwork() netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 77, byte(m.index), 0}), 24)
}

func (m *machine) gateway() netip.Addr {
	return netip.AddrFrom4([4]byte{10, 77, byte(m.index), 1})
}

func (m *machine) address() netip.Addr {
	return netip.AddrFrom4([4]byte{10, 77, 0, byte(m.index)})
}

// newNamespace makes a network namespace with lo up.
func newNamespace() (*os.File, error) {
	ns, err := netns.New()
	if err != nil {
		return nil, err
	}
	if err := netns.Do(ns, func() error { return up("lo") }); err != nil {
		ns.Close()
		return nil, err
	}
	return ns, nil
}

// newMachines makes the two machines.
func newMachines() (a, b *machine, err error) {
	both := []*machine{{name: "node-a", index: 1, control: congestionControl()}, {name: "node-b", index: 2, control: congestionControl()}}
	for _, m := range both {
		if m.ns, err = newNamespace(); err != nil {
			return nil, nil, err
		}
	}
	a, b = both[0], both[1]
	err = netns.Do(a.ns, func() error {
		return netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: uplink}, PeerName: uplink, PeerNamespace: netlink.NsFd(int(b.ns.Fd())),
		})
	})
	if err != nil {
		return nil, nil, fmt.Errorf("join the machines: %w", err)
	}
	for i, m := range both {
		if err := netns.Do(m.ns, func() error { return m.configure(both[1-i]) }); err != nil {
			return nil, nil, fmt.Errorf("configure %s: %w", m.name, err)
		}
	}
	return a, b, nil
}

// configure gives a machine its bridge, its addresses and the way to the other's pods.
func (m *machine) configure(other *machine) error {
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "pods"}}); err != nil {
		return err
	}
	if err := addAddress("pods", m.gateway(), 24); err != nil {
		return err
	}
	if err := addAddress(uplink, m.address(), 30); err != nil {
		return err
	}
	if err := addRoute(other.podNetwork(), other.address()); err != nil {
		return err
	}
	return sysctls(map[string]string{"ipv4/ip_forward": "1", "ipv4/conf/all/rp_filter": "0", "ipv4/conf/default/rp_filter": "0"})
}

// addPod makes a pod's namespace and joins it to the machine's bridge.
func (m *machine) addPod() (*os.File, netip.Addr, error) {
	ns, err := newNamespace()
	if err != nil {
		return nil, netip.Addr{}, err
	}
	m.nextPod++
	addr := netip.AddrFrom4([4]byte{10, 77, byte(m.index), byte(9 + m.nextPod)})
	port := fmt.Sprintf("pod%d", m.nextPod)
	err = netns.Do(m.ns, func() error {
		bridge, err := netlink.LinkByName("pods")
		if err != nil {
			return err
		}
		return errorsOf(
			netlink.LinkAdd(&netlink.Veth{
				LinkAttrs: netlink.LinkAttrs{Name: port, MasterIndex: bridge.Attrs().Index},
				PeerName:  "eth0", PeerNamespace: netlink.NsFd(int(ns.Fd())),
			}),
			up(port),
		)
	})
	if err == nil {
		err = netns.Do(ns, func() error {
			if err := addAddress("eth0", addr, 24); err != nil {
				return err
			}
			if err := addRoute(netip.PrefixFrom(netip.IPv4Unspecified(), 0), m.gateway()); err != nil {
				return err
			}
			// Many connections in a short time: all ports, and those of ended connections again.
			return sysctls(map[string]string{
				"ipv4/ip_local_port_range": "16384 65535", "ipv4/tcp_tw_reuse": "1", "ipv4/tcp_congestion_control": m.control,
				"ipv4/conf/all/rp_filter": "0", "ipv4/conf/default/rp_filter": "0", "ipv4/conf/eth0/rp_filter": "0",
			})
		})
	}
	if err != nil {
		ns.Close()
		return nil, addr, fmt.Errorf("add a pod to %s: %w", m.name, err)
	}
	return ns, addr, nil
}

// errorsOf is the first of several errors.
func errorsOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func up(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(link)
}

func addAddress(name string, addr netip.Addr, bits int) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	a, err := netlink.ParseAddr(netip.PrefixFrom(addr, bits).String())
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(link, a); err != nil {
		return err
	}
	return netlink.LinkSetUp(link)
}

func addRoute(to netip.Prefix, via netip.Addr) error {
	route := &netlink.Route{Gw: via.AsSlice()}
	if to.Bits() > 0 {
		dst, err := netlink.ParseIPNet(to.String())
		if err != nil {
			return err
		}
		route.Dst = dst
	}
	return netlink.RouteAdd(route)
}

// sysctls sets kernel settings below /proc/sys/net of the calling thread's namespace.
func sysctls(values map[string]string) error {
	for name, value := range values {
		if err := os.WriteFile("/proc/sys/net/"+name, []byte(value), 0); err != nil {
			return err
		}
	}
	return nil
}
