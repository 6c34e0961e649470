package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/internal/testenv"
)

// switchName is the bridge of the control namespace; istiod-lite listens on its addresses.
const switchName = "switch"

// enterControl makes the control namespace on the calling thread: a switch with addresses of its own.
func enterControl() error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return os.NewSyscallError("unshare network namespace", err)
	}
	if err := routerSysctls(); err != nil {
		return err
	}
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: switchName}}
	if err := netlink.LinkAdd(bridge); err != nil {
		return fmt.Errorf("add the switch: %w", err)
	}
	if err := addAddresses(bridge, controlAddresses(), 24, 64); err != nil {
		return err
	}
	return upAll("lo", switchName)
}

// programPorts are those that the mesh's programs listen on. A client that waits for one of them must not be given its port for
// its own end: it would be connected to itself, and the program could not listen.
const programPorts = "8000,15000-15099,16000-16099"

// routerSysctls prepares the calling thread's network namespace to forward between its links.
func routerSysctls() error {
	for path, value := range map[string]string{
		"ipv4/ip_forward":                        "1",
		"ipv6/conf/all/forwarding":               "1",
		"ipv4/ip_local_port_range":               "2048 60999",
		"ipv4/ip_local_reserved_ports":           programPorts,
		"ipv6/conf/default/accept_dad":           "0",
		"ipv6/conf/default/router_solicitations": "0",
	} {
		if err := os.WriteFile("/proc/sys/net/"+path, []byte(value), 0); err != nil {
			return fmt.Errorf("set sysctl %s: %w", path, err)
		}
	}
	return nil
}

// plug joins the calling thread's namespace to the switch: an interface eth0 here, a port of the given name there.
func plug(port string, control int, addrs []netip.Addr) error {
	link := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: "eth0"},
		PeerName:  port, PeerNamespace: netlink.NsFd(control),
	}
	if err := netlink.LinkAdd(link); err != nil {
		return fmt.Errorf("add the link to the switch: %w", err)
	}
	if err := addAddresses(link, addrs, 24, 64); err != nil {
		return err
	}
	return upAll("lo", "eth0")
}

// attachPort puts a port of the control namespace on the switch, and tells the control namespace that the node's pods
// are behind it.
func attachPort(port string, node []netip.Addr, pods []netip.Prefix) error {
	bridge, err := netlink.LinkByName(switchName)
	if err != nil {
		return err
	}
	link, err := netlink.LinkByName(port)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetMaster(link, bridge); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return err
	}
	return addRoutes(pods, node)
}

// addRoutes sends each prefix to the gateway of the same family.
func addRoutes(to []netip.Prefix, via []netip.Addr) error {
	for _, p := range to {
		for _, gw := range via {
			if gw.Is4() != p.Addr().Is4() {
				continue
			}
			if err := netlink.RouteAdd(&netlink.Route{Dst: ipNet(p), Gw: gw.AsSlice()}); err != nil {
				return fmt.Errorf("add route to %s via %s: %w", p, gw, err)
			}
		}
	}
	return nil
}

// wirePod makes a pod's eth0 from inside the node's namespace. Like the ptp plugin it gives the pod one address of each
// family, a default route to the gateway address on the node's end, and the node a route to the pod.
func wirePod(pod *os.File, host string, addrs, gateways []netip.Addr) error {
	link := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: host},
		PeerName:  "eth0", PeerNamespace: netlink.NsFd(int(pod.Fd())),
	}
	if err := netlink.LinkAdd(link); err != nil {
		return fmt.Errorf("add the pod's link: %w", err)
	}
	if err := addAddresses(link, gateways, 32, 128); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return err
	}
	for _, a := range addrs {
		route := &netlink.Route{LinkIndex: link.Index, Dst: ipNet(netip.PrefixFrom(a, a.BitLen())), Scope: netlink.SCOPE_LINK}
		if err := netlink.RouteAdd(route); err != nil {
			return fmt.Errorf("add route to pod %s: %w", a, err)
		}
	}
	return nil
}

// addressPod gives eth0 of the calling thread's namespace its addresses and routes.
func addressPod(addrs, gateways []netip.Addr) error {
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	if err := addAddresses(link, addrs, 32, 128); err != nil {
		return err
	}
	if err := upAll("lo", "eth0"); err != nil {
		return err
	}
	for _, gw := range gateways {
		onLink := &netlink.Route{
			LinkIndex: link.Attrs().Index, Dst: ipNet(netip.PrefixFrom(gw, gw.BitLen())), Scope: netlink.SCOPE_LINK,
		}
		if err := netlink.RouteAdd(onLink); err != nil {
			return fmt.Errorf("add route to gateway %s: %w", gw, err)
		}
		all := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if gw.Is6() {
			all = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		route := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(all), Gw: gw.AsSlice()}
		if err := netlink.RouteAdd(route); err != nil {
			return fmt.Errorf("add default route via %s: %w", gw, err)
		}
	}
	return testenv.Settle("eth0", addrs...)
}

// addAddresses adds addresses with a prefix length for each family, usable at once (no duplicate address detection).
func addAddresses(link netlink.Link, addrs []netip.Addr, bits4, bits6 int) error {
	for _, a := range addrs {
		bits := bits4
		if a.Is6() {
			bits = bits6
		}
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(bits, a.BitLen())}, Flags: unix.IFA_F_NODAD}
		if err := netlink.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("add address %s to %s: %w", a, link.Attrs().Name, err)
		}
	}
	return nil
}

func upAll(names ...string) error {
	var errs []error
	for _, name := range names {
		link, err := netlink.LinkByName(name)
		if err == nil {
			err = netlink.LinkSetUp(link)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
