package wire

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/fairlead-mesh/fairlead/api/workload"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// EncodeWorkload writes a workload as an Address resource; its resource name is w.UID.
func EncodeWorkload(w *mesh.Workload) *workload.Address {
	out := &workload.Workload{
		Uid: w.UID, Name: w.Name, Namespace: w.Namespace,
		TrustDomain: w.TrustDomain, ServiceAccount: w.ServiceAccount,
		Network: w.Network, ClusterId: w.ClusterID, Node: w.Node,
		Addresses: encodeIPs(w.Addresses), Hostname: w.Hostname,
		TunnelProtocol: encodeProtocol(w.Protocol), NativeTunnel: w.NativeTunnel,
		ApplicationTunnel: encodeApplicationTunnel(w),
		Waypoint:          encodeGateway(w.Waypoint), NetworkGateway: encodeGateway(w.NetworkGateway),
		CanonicalName: w.CanonicalName, CanonicalRevision: w.CanonicalRevision,
		WorkloadName: w.WorkloadName, WorkloadType: encodeWorkloadType(w.WorkloadType),
		AuthorizationPolicies: w.Policies,
		Status:                workload.WorkloadStatus_UNHEALTHY,
	}
	if w.Healthy {
		out.Status = workload.WorkloadStatus_HEALTHY
	}
	if w.HostNetwork {
		out.NetworkMode = workload.NetworkMode_HOST_NETWORK
	}
	if w.Locality != (mesh.Locality{}) {
		out.Locality = &workload.Locality{Region: w.Locality.Region, Zone: w.Locality.Zone, Subzone: w.Locality.Subzone}
	}
	if w.Capacity != 0 {
		out.Capacity = wrapperspb.UInt32(w.Capacity)
	}
	if len(w.Services) > 0 {
		out.Services = make(map[string]*workload.PortList, len(w.Services))
		for key, ports := range w.Services {
			out.Services[key.String()] = &workload.PortList{Ports: encodePorts(ports)}
		}
	}
	return &workload.Address{Type: &workload.Address_Workload{Workload: out}}
}

func decodeWorkload(w *workload.Workload) (*mesh.Workload, error) {
	if w.GetUid() == "" {
		return nil, errors.New("without a uid")
	}
	out := &mesh.Workload{
		UID: w.GetUid(), Name: w.GetName(), Namespace: w.GetNamespace(),
		TrustDomain: w.GetTrustDomain(), ServiceAccount: w.GetServiceAccount(),
		Network: w.GetNetwork(), ClusterID: w.GetClusterId(), Node: w.GetNode(),
		Hostname: w.GetHostname(), NativeTunnel: w.GetNativeTunnel(),
		CanonicalName: w.GetCanonicalName(), CanonicalRevision: w.GetCanonicalRevision(),
		WorkloadName: w.GetWorkloadName(),
		Policies:     w.GetAuthorizationPolicies(),
		Locality: mesh.Locality{
			Region: w.GetLocality().GetRegion(), Zone: w.GetLocality().GetZone(), Subzone: w.GetLocality().GetSubzone(),
		},
		Capacity: w.GetCapacity().GetValue(),
	}
	var errs [7]error
	out.Addresses, errs[0] = decodeIPs(w.GetAddresses())
	out.Protocol, errs[1] = decodeProtocol(w.GetTunnelProtocol())
	out.ApplicationProto, out.ApplicationPort, errs[2] = decodeApplicationTunnel(w.GetApplicationTunnel())
	out.Waypoint, errs[3] = decodeGateway(w.GetWaypoint())
	out.NetworkGateway, errs[4] = decodeGateway(w.GetNetworkGateway())
	out.Services, errs[5] = decodeWorkloadServices(w.GetServices())
	errs[6] = decodeWorkloadModes(w, out)
	if err := errors.Join(errs[:]...); err != nil {
		return nil, err
	}
	return out, nil
}

// decodeWorkloadModes reads the enums that become plain fields: status, network mode, type.
func decodeWorkloadModes(w *workload.Workload, out *mesh.Workload) error {
	switch w.GetStatus() {
	case workload.WorkloadStatus_HEALTHY:
		out.Healthy = true
	case workload.WorkloadStatus_UNHEALTHY:
	default:
		return fmt.Errorf("unknown status %d", w.GetStatus())
	}
	switch w.GetNetworkMode() {
	case workload.NetworkMode_STANDARD:
	case workload.NetworkMode_HOST_NETWORK:
		out.HostNetwork = true
	default:
		return fmt.Errorf("unknown network mode %d", w.GetNetworkMode())
	}
	var err error
	out.WorkloadType, err = decodeWorkloadType(w.GetWorkloadType())
	return err
}

func decodeWorkloadServices(services map[string]*workload.PortList) (map[mesh.NamespacedHostname][]mesh.Port, error) {
	if len(services) == 0 {
		return nil, nil
	}
	out := make(map[mesh.NamespacedHostname][]mesh.Port, len(services))
	for key, list := range services {
		name, err := decodeNamespacedHostname(key)
		if err != nil {
			return nil, err
		}
		if out[name], err = decodePorts(list.GetPorts()); err != nil {
			return nil, fmt.Errorf("service %q: %w", key, err)
		}
	}
	return out, nil
}

func encodeProtocol(p mesh.Protocol) workload.TunnelProtocol {
	if p == mesh.ProtocolHBONE {
		return workload.TunnelProtocol_HBONE
	}
	return workload.TunnelProtocol_NONE
}

func decodeProtocol(p workload.TunnelProtocol) (mesh.Protocol, error) {
	switch p {
	case workload.TunnelProtocol_NONE:
		return mesh.ProtocolNone, nil
	case workload.TunnelProtocol_HBONE:
		return mesh.ProtocolHBONE, nil
	default:
		return 0, fmt.Errorf("unsupported tunnel protocol %s", p)
	}
}

func encodeApplicationTunnel(w *mesh.Workload) *workload.ApplicationTunnel {
	if w.ApplicationProto == mesh.ApplicationNone && w.ApplicationPort == 0 {
		return nil
	}
	out := &workload.ApplicationTunnel{Port: uint32(w.ApplicationPort)}
	if w.ApplicationProto == mesh.ApplicationProxy {
		out.Protocol = workload.ApplicationTunnel_PROXY
	}
	return out
}

func decodeApplicationTunnel(t *workload.ApplicationTunnel) (mesh.ApplicationProtocol, uint16, error) {
	port, err := decodePort(t.GetPort())
	if err != nil {
		return 0, 0, fmt.Errorf("application tunnel: %w", err)
	}
	switch t.GetProtocol() {
	case workload.ApplicationTunnel_NONE:
		return mesh.ApplicationNone, port, nil
	case workload.ApplicationTunnel_PROXY:
		return mesh.ApplicationProxy, port, nil
	default:
		return 0, 0, fmt.Errorf("unknown application tunnel protocol %d", t.GetProtocol())
	}
}

// encodeWorkloadType: what the wire has no word for is a pod; the type only labels telemetry.
func encodeWorkloadType(t string) workload.WorkloadType {
	switch t {
	case "deployment":
		return workload.WorkloadType_DEPLOYMENT
	case "cronjob":
		return workload.WorkloadType_CRONJOB
	case "job":
		return workload.WorkloadType_JOB
	default:
		return workload.WorkloadType_POD
	}
}

func decodeWorkloadType(t workload.WorkloadType) (string, error) {
	switch t {
	case workload.WorkloadType_DEPLOYMENT:
		return "deployment", nil
	case workload.WorkloadType_CRONJOB:
		return "cronjob", nil
	case workload.WorkloadType_POD:
		return "pod", nil
	case workload.WorkloadType_JOB:
		return "job", nil
	default:
		return "", fmt.Errorf("unknown workload type %d", t)
	}
}
