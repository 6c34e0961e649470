package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"

	"github.com/fairlead-mesh/fairlead/bpf"
)

// devices looks at interfaces of the calling thread's network namespace, and at what is reached through them. Those that
// do not exist (yet) are passed over.
func devices(names []string) (bpf.Devices, error) {
	var found bpf.Devices
	excluded := map[int]bool{}
	for _, name := range names {
		link, err := netlink.LinkByName(name)
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			continue
		}
		if err != nil {
			return found, fmt.Errorf("look up interface %s: %w", name, err)
		}
		excluded[link.Attrs().Index] = true
		found.Indices = append(found.Indices, uint32(link.Attrs().Index))
	}
	if len(excluded) == 0 {
		return found, nil
	}
	routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return found, fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		network, ok := destination(r)
		switch {
		case !ok:
		case excluded[r.LinkIndex]:
			found.Networks = append(found.Networks, network)
		default:
			found.Others = append(found.Others, network)
		}
	}
	// What is reached through others too, as the addresses of a link are, is not left out.
	found.Networks = slices.DeleteFunc(found.Networks, func(n netip.Prefix) bool { return slices.Contains(found.Others, n) })
	for _, list := range [][]netip.Prefix{found.Networks, found.Others} {
		slices.SortFunc(list, netip.Prefix.Compare)
	}
	slices.Sort(found.Indices)
	return found, nil
}

// destination is the network that a route leads to.
func destination(r netlink.Route) (netip.Prefix, bool) {
	if r.Dst == nil {
		family := netip.IPv4Unspecified()
		if r.Family == netlink.FAMILY_V6 {
			family = netip.IPv6Unspecified()
		}
		return netip.PrefixFrom(family, 0), true
	}
	ip, ok := netip.AddrFromSlice(r.Dst.IP)
	bits, size := r.Dst.Mask.Size()
	if size == 32 {
		ip = ip.Unmap()
	}
	return netip.PrefixFrom(ip, bits).Masked(), ok
}
