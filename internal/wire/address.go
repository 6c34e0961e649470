package wire

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/fairlead-mesh/fairlead/api/workload"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// defaultHBONEPort is the port of HBONE where a gateway names none.
const defaultHBONEPort = 15008

// DecodeAddress reads an Address resource; without an error exactly one of the two results is not nil.
func DecodeAddress(a *workload.Address) (*mesh.Workload, *mesh.Service, error) {
	switch t := a.GetType().(type) {
	case *workload.Address_Workload:
		w, err := decodeWorkload(t.Workload)
		if err != nil {
			return nil, nil, fmt.Errorf("decode workload %q: %w", t.Workload.GetUid(), err)
		}
		return w, nil, nil
	case *workload.Address_Service:
		s, err := decodeService(t.Service)
		if err != nil {
			return nil, nil, fmt.Errorf("decode service %q: %w", t.Service.GetNamespace()+"/"+t.Service.GetHostname(), err)
		}
		return nil, s, nil
	default:
		return nil, nil, fmt.Errorf("decode address: neither a workload nor a service")
	}
}

// Aliases are the further names a workload or service resource can be asked for by: "<network>/<ip>" for each of its
// addresses. A host-network workload has none, because its node's address is not its own.
func Aliases(w *mesh.Workload, s *mesh.Service) []string {
	var names []string
	if w != nil && !w.HostNetwork {
		for _, ip := range w.Addresses {
			names = append(names, w.Network+"/"+ip.String())
		}
	}
	if s != nil {
		for _, a := range s.Addresses {
			names = append(names, a.Network+"/"+a.Address.String())
		}
	}
	return names
}

func decodeIP(b []byte) (netip.Addr, error) {
	ip, ok := netip.AddrFromSlice(b)
	if !ok {
		return netip.Addr{}, fmt.Errorf("address of %d bytes: want 4 or 16", len(b))
	}
	return ip.Unmap(), nil
}

func encodeIPs(ips []netip.Addr) [][]byte {
	var out [][]byte
	for _, ip := range ips {
		out = append(out, ip.AsSlice())
	}
	return out
}

func decodeIPs(bs [][]byte) ([]netip.Addr, error) {
	var out []netip.Addr
	for _, b := range bs {
		ip, err := decodeIP(b)
		if err != nil {
			return nil, err
		}
		out = append(out, ip)
	}
	return out, nil
}

func encodeNetworkAddress(a mesh.NetworkAddress) *workload.NetworkAddress {
	return &workload.NetworkAddress{Network: a.Network, Address: a.Address.AsSlice()}
}

func decodeNetworkAddress(a *workload.NetworkAddress) (mesh.NetworkAddress, error) {
	ip, err := decodeIP(a.GetAddress())
	if err != nil {
		return mesh.NetworkAddress{}, err
	}
	if a.Length != nil && int(a.GetLength()) != ip.BitLen() {
		return mesh.NetworkAddress{}, fmt.Errorf("address %s/%d: ranges are not supported", ip, a.GetLength())
	}
	return mesh.NetworkAddress{Network: a.GetNetwork(), Address: ip}, nil
}

func encodeGateway(g *mesh.GatewayAddress) *workload.GatewayAddress {
	if g == nil {
		return nil
	}
	out := &workload.GatewayAddress{HboneMtlsPort: uint32(g.HBONEPort)}
	if g.Hostname != (mesh.NamespacedHostname{}) {
		out.Destination = &workload.GatewayAddress_Hostname{
			Hostname: &workload.NamespacedHostname{Namespace: g.Hostname.Namespace, Hostname: g.Hostname.Hostname},
		}
		return out
	}
	out.Destination = &workload.GatewayAddress_Address{Address: encodeNetworkAddress(g.Address)}
	return out
}

func decodeGateway(g *workload.GatewayAddress) (*mesh.GatewayAddress, error) {
	if g == nil {
		return nil, nil
	}
	port, err := decodePort(g.GetHboneMtlsPort())
	if err != nil {
		return nil, err
	}
	if port == 0 {
		port = defaultHBONEPort
	}
	out := &mesh.GatewayAddress{HBONEPort: port}
	switch d := g.GetDestination().(type) {
	case *workload.GatewayAddress_Hostname:
		out.Hostname = mesh.NamespacedHostname{Namespace: d.Hostname.GetNamespace(), Hostname: d.Hostname.GetHostname()}
		if out.Hostname.Namespace == "" || out.Hostname.Hostname == "" {
			return nil, fmt.Errorf("gateway hostname %q: want a namespace and a hostname", out.Hostname)
		}
	case *workload.GatewayAddress_Address:
		if out.Address, err = decodeNetworkAddress(d.Address); err != nil {
			return nil, fmt.Errorf("gateway: %w", err)
		}
	default:
		return nil, fmt.Errorf("gateway without a hostname or address")
	}
	return out, nil
}

func decodePort(p uint32) (uint16, error) {
	if p > 65535 {
		return 0, fmt.Errorf("port %d: above 65535", p)
	}
	return uint16(p), nil
}

func encodePorts(ports []mesh.Port) []*workload.Port {
	var out []*workload.Port
	for _, p := range ports {
		out = append(out, &workload.Port{ServicePort: uint32(p.ServicePort), TargetPort: uint32(p.TargetPort)})
	}
	return out
}

func decodePorts(ports []*workload.Port) ([]mesh.Port, error) {
	var out []mesh.Port
	for _, p := range ports {
		service, err := decodePort(p.GetServicePort())
		if err != nil {
			return nil, err
		}
		target, err := decodePort(p.GetTargetPort())
		if err != nil {
			return nil, err
		}
		out = append(out, mesh.Port{ServicePort: service, TargetPort: target})
	}
	return out, nil
}

func decodeNamespacedHostname(key string) (mesh.NamespacedHostname, error) {
	ns, host, ok := strings.Cut(key, "/")
	if !ok || ns == "" || host == "" {
		return mesh.NamespacedHostname{}, fmt.Errorf("service key %q: want <namespace>/<hostname>", key)
	}
	return mesh.NamespacedHostname{Namespace: ns, Hostname: host}, nil
}
