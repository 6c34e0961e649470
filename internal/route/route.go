// Package route (decisions) says where a connection goes: from a snapshot of the mesh, who opens the connection and the
// address it was opened to, to a next hop and the identities that may answer there, or a refusal with its reason.
package route

import (
	"net/netip"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// HBONEPort is where workloads and gateways take tunnels unless told otherwise.
const HBONEPort = 15008

// Action is what is to be done with a connection.
type Action uint8

// The actions.
const (
	// Passthrough: to the original destination, which the mesh does not know, as it is.
	Passthrough Action = iota
	// Plain: to NextHop, a workload of the mesh that takes no tunnels.
	Plain
	// HBONE: through a tunnel to NextHop, for Authority.
	HBONE
	// Deliver: to the application of the workload itself.
	Deliver
	// Refuse: the connection is closed; Why says why.
	Refuse
)

func (a Action) String() string {
	switch a {
	case Passthrough:
		return "passthrough"
	case Plain:
		return "plain"
	case HBONE:
		return "HBONE"
	case Deliver:
		return "deliver"
	}
	return "refuse"
}

// Why is the reason of a refusal.
type Why uint8

// The reasons.
const (
	// Granted: it was not refused.
	Granted Why = iota
	// NoEndpoint: the service has no endpoint that may take the connection.
	NoEndpoint
	// NoServicePort: none of the service's endpoints serves that port.
	NoServicePort
	// NoWaypoint: the destination is bound to a waypoint that is not there or not ready. Going around it would go around
	// its policies.
	NoWaypoint
	// OtherNetwork: the destination is in another network and there is no way there.
	OtherNetwork
	// NoAddress: the workload has no address that can be dialled.
	NoAddress
	// NotThisWorkload: the connection asks this workload's proxy for somebody else's address.
	NotThisWorkload
	// BadAuthority: the CONNECT does not name an address and port.
	BadAuthority
)

func (w Why) String() string {
	switch w {
	case Granted:
		return ""
	case NoEndpoint:
		return "no healthy endpoint of the service"
	case NoServicePort:
		return "the service does not have this port"
	case NoWaypoint:
		return "the destination's waypoint has no healthy endpoint"
	case OtherNetwork:
		return "the destination is in another network"
	case NoAddress:
		return "the destination workload has no address"
	case NotThisWorkload:
		return "the address asked for is not this workload's"
	case BadAuthority:
		return "the authority asked for is not an address and port"
	}
	return "unknown"
}

// Decision is where a connection goes.
type Decision struct {
	Action Action
	// NextHop is what is dialled.
	NextHop netip.AddrPort
	// Target is the application's address at the destination workload; not valid towards a waypoint, which chooses.
	Target netip.AddrPort
	// Authority is what an HBONE tunnel is asked for.
	Authority string
	// Destination is the workload that NextHop belongs to (towards a waypoint: the waypoint's); nil where the mesh knows none.
	Destination *mesh.Workload
	// Service is what the connection was opened to; nil where that was a workload or an unknown address.
	Service *mesh.Service
	// Waypoint: NextHop is a waypoint.
	Waypoint bool
	// Expected are the identities one of which must answer at NextHop; empty without HBONE.
	Expected []mesh.Identity
	Why      Why
}
