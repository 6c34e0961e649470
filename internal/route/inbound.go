package route

// The way in, in steps:
//  1. Which address and port does the CONNECT ask for.
//  2. Is it this workload's own: a proxy delivers to its own application only.
// Next: ztunnel/inbound.go, which checks the policies and dials the application.

import (
	"net/netip"
	"slices"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// Inbound decides on a CONNECT for authority that arrived at local, an address of the pod that self describes.
func Inbound(self *mesh.Workload, local netip.Addr, authority string) Decision {
	target, err := netip.ParseAddrPort(authority)
	if err != nil || target.Port() == 0 {
		return Decision{Action: Refuse, Destination: self, Why: BadAuthority}
	}
	target = netip.AddrPortFrom(target.Addr().Unmap(), target.Port())
	if target.Addr() != local.Unmap() && !slices.Contains(self.Addresses, target.Addr()) {
		return Decision{Action: Refuse, Destination: self, Why: NotThisWorkload}
	}
	return Decision{Action: Deliver, NextHop: target, Target: target, Destination: self}
}
