package mesh

import "net/netip"

// Protocol is how a workload is reached.
type Protocol uint8

// The tunnel protocols of a workload.
const (
	// ProtocolNone: plain TCP to the workload's own port.
	ProtocolNone Protocol = iota
	// ProtocolHBONE: an HBONE tunnel to port 15008 of the workload's address.
	ProtocolHBONE
)

func (p Protocol) String() string {
	if p == ProtocolHBONE {
		return "HBONE"
	}
	return "TCP"
}

// ApplicationProtocol is how a workload behind a proxy of its own (a waypoint's or gateway's) takes tunnelled bytes.
type ApplicationProtocol uint8

// The application tunnels.
const (
	ApplicationNone ApplicationProtocol = iota
	ApplicationProxy
)

// NetworkAddress is an address in a network; networks may overlap, the empty network is the default one.
type NetworkAddress struct {
	Network string
	Address netip.Addr
}

// NamespacedHostname names a service across the mesh.
type NamespacedHostname struct {
	Namespace string
	Hostname  string
}

// String is "<namespace>/<hostname>", the service's xDS resource name.
func (n NamespacedHostname) String() string { return n.Namespace + "/" + n.Hostname }

// GatewayAddress points at a waypoint or network gateway: by hostname, or else by address.
type GatewayAddress struct {
	Hostname NamespacedHostname
	Address  NetworkAddress
	// HBONEPort is the port HBONE is spoken on, 15008 unless told otherwise.
	HBONEPort uint16
}

// Port maps a service port to the port its endpoint listens on; a TargetPort of 0 means "the same".
type Port struct {
	ServicePort uint16
	TargetPort  uint16
}

// Locality is where a workload runs.
type Locality struct {
	Region  string
	Zone    string
	Subzone string
}

// Workload is one instance a connection can come from or go to: a pod, or an entry that stands for one.
type Workload struct {
	// UID is unique in the mesh: "<cluster>//Pod/<namespace>/<name>" for a pod.
	UID            string
	Name           string
	Namespace      string
	TrustDomain    string
	ServiceAccount string
	Network        string
	ClusterID      string
	Node           string
	// Addresses are the workload's own; empty for a workload reached by Hostname.
	Addresses []netip.Addr
	Hostname  string
	Protocol  Protocol
	// NativeTunnel: the workload itself terminates HBONE (a waypoint or gateway).
	NativeTunnel     bool
	ApplicationPort  uint16
	ApplicationProto ApplicationProtocol
	Waypoint         *GatewayAddress
	NetworkGateway   *GatewayAddress
	// CanonicalName, CanonicalRevision, WorkloadName and WorkloadType ("pod", "deployment", …) are for telemetry.
	CanonicalName     string
	CanonicalRevision string
	WorkloadName      string
	WorkloadType      string
	// Services the workload is an endpoint of, with the ports it serves them on.
	Services map[NamespacedHostname][]Port
	// Policies are the "<namespace>/<name>" of the selector policies that apply to this workload.
	Policies    []string
	Healthy     bool
	HostNetwork bool
	Locality    Locality
	// Capacity weighs the workload among its service's endpoints; 0 means 1.
	Capacity uint32
}

// Identity is the identity the workload's certificates carry.
func (w *Workload) Identity() Identity {
	td := w.TrustDomain
	if td == "" {
		td = DefaultTrustDomain
	}
	return Identity{TrustDomain: td, Namespace: w.Namespace, ServiceAccount: w.ServiceAccount}
}
