package route

// The way out, in steps:
//  1. Whom was the connection opened to: a service by one of its addresses, else a workload by its own, else nobody the
//     mesh knows (passthrough).
//  2. Is the service, or the workload that was addressed directly, bound to a waypoint: then the waypoint is next.
//  3. Else one of the service's endpoints is chosen, or the workload itself.
//  4. How the chosen one is reached: by HBONE with the identity it must have, or plain.
// Next: internal/hbone/client.go

import (
	"net/netip"

	"github.com/fairlead-mesh/fairlead/internal/balance"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/state"
)

// Outbound decides on a connection that source opened to dst. random chooses among equal endpoints.
func Outbound(snap *state.Snapshot, source *mesh.Workload, dst netip.AddrPort, random uint64) Decision {
	dst = netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())
	at := mesh.NetworkAddress{Network: source.Network, Address: dst.Addr()}
	if service := snap.ServiceAt(at); service != nil {
		return toService(snap, source, service, dst, random)
	}
	if workload := snap.WorkloadAt(at); workload != nil {
		if workload.Waypoint != nil && !isBehind(source, workload.Waypoint) {
			return toWaypoint(snap, source, workload.Waypoint, nil, dst, random)
		}
		return toWorkload(source, workload, nil, dst)
	}
	return Decision{Action: Passthrough, NextHop: dst, Target: dst}
}

func toService(snap *state.Snapshot, source *mesh.Workload, service *mesh.Service, dst netip.AddrPort, random uint64) Decision {
	if service.Waypoint != nil && !isBehind(source, service.Waypoint) {
		return toWaypoint(snap, source, service.Waypoint, service, dst, random)
	}
	if service.LoadBalancing.Mode == mesh.LoadBalancePassthrough {
		return Decision{Action: Passthrough, NextHop: dst, Target: dst, Service: service}
	}
	endpoint, port, why := pick(snap, source, service, dst.Port(), random)
	if why != Granted {
		return Decision{Action: Refuse, Service: service, Why: why}
	}
	address, ok := addressOf(endpoint, dst.Addr())
	if !ok {
		return Decision{Action: Refuse, Service: service, Destination: endpoint, Why: NoAddress}
	}
	return toWorkload(source, endpoint, service, netip.AddrPortFrom(address, port))
}

// toWorkload reaches a workload at target, one of its own addresses.
func toWorkload(source, workload *mesh.Workload, service *mesh.Service, target netip.AddrPort) Decision {
	d := Decision{Action: Plain, NextHop: target, Target: target, Destination: workload, Service: service}
	if workload.Network != source.Network {
		d.Action, d.Why = Refuse, OtherNetwork
		return d
	}
	if workload.Protocol == mesh.ProtocolHBONE {
		d.Action = HBONE
		d.NextHop = netip.AddrPortFrom(target.Addr(), HBONEPort)
		d.Authority = target.String()
		d.Expected = expected(workload, service)
	}
	return d
}

// toWaypoint reaches one of a waypoint's endpoints, for dst as it was asked for: the waypoint chooses the endpoint.
func toWaypoint(snap *state.Snapshot, source *mesh.Workload, gateway *mesh.GatewayAddress, service *mesh.Service, dst netip.AddrPort, random uint64) Decision {
	d := Decision{Action: Refuse, Service: service, Waypoint: true, Why: NoWaypoint}
	hbone := gateway.HBONEPort
	if hbone == 0 {
		hbone = HBONEPort
	}
	var waypoint *mesh.Service
	var endpoint *mesh.Workload
	port := hbone
	if gateway.Hostname != (mesh.NamespacedHostname{}) {
		waypoint = snap.Service(gateway.Hostname)
	} else if waypoint = snap.ServiceAt(gateway.Address); waypoint == nil {
		endpoint = snap.WorkloadAt(gateway.Address)
	}
	if waypoint != nil {
		var why Why
		if endpoint, port, why = pick(snap, source, waypoint, hbone, random); why != Granted {
			return d
		}
	}
	if endpoint == nil || !endpoint.Healthy && waypoint == nil {
		return d
	}
	address, ok := addressOf(endpoint, dst.Addr())
	if !ok {
		return d
	}
	d.Action, d.Why = HBONE, Granted
	d.Destination = endpoint
	d.NextHop = netip.AddrPortFrom(address, port)
	d.Authority = dst.String()
	d.Expected = expected(endpoint, waypoint)
	return d
}

// pick chooses an endpoint of a service and the port it serves servicePort on.
func pick(snap *state.Snapshot, source *mesh.Workload, service *mesh.Service, servicePort uint16, random uint64) (*mesh.Workload, uint16, Why) {
	endpoints := snap.Endpoints(service.Key())
	hasPort := len(endpoints) == 0
	for _, e := range endpoints {
		if targetPort(e.Ports, servicePort) != 0 {
			hasPort = true
			break
		}
	}
	if !hasPort {
		return nil, 0, NoServicePort
	}
	i, ok := balance.Pick(service.LoadBalancing, source, len(endpoints), func(i int) *mesh.Workload {
		w := endpoints[i].Workload
		if targetPort(endpoints[i].Ports, servicePort) == 0 || w.Network != source.Network {
			return nil
		}
		return w
	}, random)
	if !ok {
		return nil, 0, NoEndpoint
	}
	return endpoints[i].Workload, targetPort(endpoints[i].Ports, servicePort), Granted
}

// targetPort is where a service port is served, or 0.
func targetPort(ports []mesh.Port, servicePort uint16) uint16 {
	for _, p := range ports {
		if p.ServicePort != servicePort {
			continue
		}
		if p.TargetPort == 0 {
			return servicePort
		}
		return p.TargetPort
	}
	return 0
}

// addressOf is the workload's address of the same family as the one asked for, else any.
func addressOf(w *mesh.Workload, asked netip.Addr) (netip.Addr, bool) {
	for _, a := range w.Addresses {
		if a.Is4() == asked.Is4() {
			return a, true
		}
	}
	if len(w.Addresses) == 0 {
		return netip.Addr{}, false
	}
	return w.Addresses[0], true
}

// isBehind tells whether source is an endpoint of that gateway itself: a waypoint does not go through itself.
func isBehind(source *mesh.Workload, gateway *mesh.GatewayAddress) bool {
	if _, ok := source.Services[gateway.Hostname]; ok {
		return true
	}
	for _, a := range source.Addresses {
		if gateway.Address == (mesh.NetworkAddress{Network: source.Network, Address: a}) {
			return true
		}
	}
	return false
}

// expected are the identities that may answer for a workload reached through a service (nil: directly).
func expected(w *mesh.Workload, service *mesh.Service) []mesh.Identity {
	ids := []mesh.Identity{w.Identity()}
	if service == nil {
		return ids
	}
	for _, name := range service.SubjectAltNames {
		if id, err := mesh.ParseIdentity(name); err == nil {
			ids = append(ids, id)
		}
	}
	return ids
}
