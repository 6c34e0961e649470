package redirect

import (
	"fmt"
	"slices"

	"github.com/vishvananda/netlink"

	"github.com/fairlead-mesh/fairlead/bpf"
)

// links lists the interfaces of a pod.
func (s space) links() ([]netlink.Link, error) {
	all, err := s.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list the pod's interfaces: %w", err)
	}
	return all, nil
}

// wiresOf finds the host's ends of a pod's interfaces, and names the interfaces that lead out of the pod by other ways,
// where the guard cannot be. Interfaces that the pod's exclusions name are neither.
func wiresOf(host *netlink.Handle, pod Pod, links []netlink.Link) (wires []bpf.Wire, others []string, err error) {
	for _, l := range links {
		if stays(l) || slices.Contains(pod.Exclude.Interfaces, l.Attrs().Name) {
			continue
		}
		end := hostEnd(host, l)
		// Only now: the question for the interface makes the kernel give the namespace an id.
		nsid, err := host.GetNetNsIdByFd(int(pod.Netns.Fd()))
		if err != nil {
			return nil, nil, fmt.Errorf("identify the pod's network namespace on the host: %w", err)
		}
		if end != nil && nsid >= 0 && end.NetNsID == nsid {
			wires = append(wires, bpf.Wire{Ifindex: end.Index, Nsid: nsid})
		} else {
			others = append(others, l.Attrs().Name)
		}
	}
	return wires, others, nil
}

// stays tells whether an interface leads nowhere by itself: only within the pod, or over another one of the pod's.
func stays(l netlink.Link) bool {
	switch l.Type() {
	case "dummy", "ifb", "bridge", "bond", "vlan", "vxlan", "gre", "gretap", "ip6gre", "ipip", "ip6tnl", "sit", "vti", "vti6",
		"erspan", "ip6erspan", "ip6gretap", "wireguard", "tuntap", "tun", "vrf", "nlmon":
		return true
	case "device":
		return l.Attrs().Name == "lo"
	}
	return false
}

// hostEnd finds the other end of a pod's interface on the host. Both ends name each other, so that it is no other pair's.
func hostEnd(host *netlink.Handle, l netlink.Link) *netlink.LinkAttrs {
	if l.Type() != "veth" && l.Type() != "netkit" {
		return nil
	}
	end, err := host.LinkByIndex(l.Attrs().ParentIndex)
	if err != nil || end.Type() != l.Type() || end.Attrs().ParentIndex != l.Attrs().Index {
		return nil
	}
	return end.Attrs()
}
