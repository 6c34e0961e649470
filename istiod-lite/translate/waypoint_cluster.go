package translate

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	internalupstream "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/internal_upstream/v3"
	rawbuffer "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/raw_buffer/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	upstreamhttp "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	metadatav3 "github.com/envoyproxy/go-control-plane/envoy/type/metadata/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

const (
	connectOriginate = "connect_originate"
	mainInternal     = "main_internal"
	connectTerminate = "connect_terminate"
	hbonePort        = 15008
	// connectTimeout is for TCP and, where there is a tunnel, its handshake.
	connectTimeout = 10 * time.Second

	// tunnelMetadata is the endpoint metadata that the internal listener reads the endpoint's own address from.
	tunnelMetadata = "envoy.filters.listener.original_dst"
	// peerMetadata is the endpoint or cluster metadata that tells who is behind an address; Envoy does not read it.
	peerMetadata = "fairlead.peer"
)

// addCluster makes a service port's cluster and its endpoints, once.
func (w *waypointBuilder) addCluster(name string, s WaypointService, port uint16, protocol portProtocol) {
	if _, done := w.clusters[name]; done {
		return
	}
	c := &clusterv3.Cluster{
		Name:                 name,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
		EdsClusterConfig: &clusterv3.Cluster_EdsClusterConfig{
			EdsConfig: adsSource(), ServiceName: name,
		},
		ConnectTimeout: durationpb.New(connectTimeout),
		LbPolicy:       clusterv3.Cluster_LEAST_REQUEST,
		TransportSocketMatches: []*clusterv3.Cluster_TransportSocketMatch{
			{Name: "hbone", Match: tunnelMatch(), TransportSocket: internalUpstream()},
			{Name: "plaintext", Match: &structpb.Struct{}, TransportSocket: rawSocket()},
		},
		TypedExtensionProtocolOptions: protocolOptions(protocol),
		Metadata:                      &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{"istio": serviceMetadata(s.Service)}},
	}
	w.clusters[name] = c
	w.endpoints = append(w.endpoints, w.assignment(name, s, port))
}

// workloadCluster sends to a workload itself, to whatever port was asked for.
func workloadCluster(name string, wl *mesh.Workload) *clusterv3.Cluster {
	c := &clusterv3.Cluster{
		Name:                          name,
		ClusterDiscoveryType:          &clusterv3.Cluster_Type{Type: clusterv3.Cluster_ORIGINAL_DST},
		LbPolicy:                      clusterv3.Cluster_CLUSTER_PROVIDED,
		ConnectTimeout:                durationpb.New(connectTimeout),
		TypedExtensionProtocolOptions: protocolOptions(protocolHTTP),
		Metadata:                      &corev3.Metadata{FilterMetadata: peerOf(wl)},
	}
	if wl.Protocol == mesh.ProtocolHBONE {
		// The tunnel listener is the one endpoint; it reads the address asked for from the connection.
		c.ClusterDiscoveryType = &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC}
		c.LbPolicy = clusterv3.Cluster_ROUND_ROBIN
		c.TransportSocket = internalUpstream()
		c.LoadAssignment = &endpointv3.ClusterLoadAssignment{ClusterName: name, Endpoints: []*endpointv3.LocalityLbEndpoints{{
			LbEndpoints: []*endpointv3.LbEndpoint{{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{
				Endpoint: &endpointv3.Endpoint{Address: internalAddress("")}}}}}}}
	}
	return c
}

// assignment lists the endpoints of a service port, by locality.
func (w *waypointBuilder) assignment(name string, s WaypointService, port uint16) *endpointv3.ClusterLoadAssignment {
	groups := map[mesh.Locality][]*endpointv3.LbEndpoint{}
	for _, wl := range sortedWorkloads(s.Endpoints) {
		if !wl.Healthy && !s.Service.LoadBalancing.AllowUnhealthy {
			continue
		}
		target, ok := targetPort(wl, s.Service.Key(), port)
		if !ok || len(wl.Addresses) == 0 || wl.NetworkGateway != nil {
			continue
		}
		groups[wl.Locality] = append(groups[wl.Locality], endpoint(wl, netip.AddrPortFrom(wl.Addresses[0], target)))
	}
	a := &endpointv3.ClusterLoadAssignment{ClusterName: name}
	for locality, endpoints := range groups {
		weight := uint32(0)
		for _, e := range endpoints {
			weight += e.LoadBalancingWeight.GetValue()
		}
		a.Endpoints = append(a.Endpoints, &endpointv3.LocalityLbEndpoints{
			Locality:            &corev3.Locality{Region: locality.Region, Zone: locality.Zone, SubZone: locality.Subzone},
			LbEndpoints:         endpoints,
			LoadBalancingWeight: wrapperspb.UInt32(weight),
		})
	}
	slices.SortFunc(a.Endpoints, func(x, y *endpointv3.LocalityLbEndpoints) int {
		return cmp.Or(cmp.Compare(x.Locality.Region, y.Locality.Region), cmp.Compare(x.Locality.Zone, y.Locality.Zone),
			cmp.Compare(x.Locality.SubZone, y.Locality.SubZone))
	})
	return a
}

// targetPort is where a workload serves a service's port.
func targetPort(wl *mesh.Workload, service mesh.NamespacedHostname, port uint16) (uint16, bool) {
	for _, p := range wl.Services[service] {
		if p.ServicePort == port {
			return cmp.Or(p.TargetPort, p.ServicePort), true
		}
	}
	return 0, false
}

func endpoint(wl *mesh.Workload, at netip.AddrPort) *endpointv3.LbEndpoint {
	metadata := peerOf(wl)
	address := socketAddress(at)
	if wl.Protocol == mesh.ProtocolHBONE {
		address = internalAddress(at.String())
		metadata[tunnelMetadata] = stringStruct("local", at.String())
		metadata["envoy.transport_socket_match"] = tunnelMatch()
	}
	return &endpointv3.LbEndpoint{
		HostIdentifier:      &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: address}},
		HealthStatus:        corev3.HealthStatus_HEALTHY,
		Metadata:            &corev3.Metadata{FilterMetadata: metadata},
		LoadBalancingWeight: wrapperspb.UInt32(max(wl.Capacity, 1)),
	}
}

// peerOf tells who a workload is: the identity its proxy must prove, and names for logs and metrics.
func peerOf(wl *mesh.Workload) map[string]*structpb.Struct {
	return map[string]*structpb.Struct{peerMetadata: stringStruct(
		"uid", wl.UID,
		"tunnel", wl.Protocol.String(),
		"identity", wl.Identity().String(),
		"name", wl.Name,
		"namespace", wl.Namespace,
		"workload", wl.WorkloadName,
		"canonical_name", wl.CanonicalName,
		"canonical_revision", wl.CanonicalRevision,
		"cluster", wl.ClusterID,
		"region", wl.Locality.Region,
		"zone", wl.Locality.Zone,
	)}
}

func serviceMetadata(s *mesh.Service) *structpb.Struct {
	return &structpb.Struct{Fields: map[string]*structpb.Value{
		"services": structpb.NewListValue(&structpb.ListValue{Values: []*structpb.Value{
			structpb.NewStructValue(stringStruct("host", s.Hostname, "name", s.Name, "namespace", s.Namespace)),
		}}),
	}}
}

// addTunnels adds the clusters that Envoy needs between its listeners: into main_internal, and out of connect_originate.
func (w *waypointBuilder) addTunnels() {
	w.clusters[invalidBackend] = &clusterv3.Cluster{
		Name:                 invalidBackend,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
		ConnectTimeout:       durationpb.New(connectTimeout),
		LoadAssignment:       &endpointv3.ClusterLoadAssignment{ClusterName: invalidBackend},
	}
	w.clusters[mainInternal] = &clusterv3.Cluster{
		Name:                 mainInternal,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
		ConnectTimeout:       durationpb.New(connectTimeout),
		TransportSocket:      internalUpstream(),
		LoadAssignment: &endpointv3.ClusterLoadAssignment{ClusterName: mainInternal, Endpoints: []*endpointv3.LocalityLbEndpoints{{
			LbEndpoints: []*endpointv3.LbEndpoint{{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{
				Address: &corev3.Address{Address: &corev3.Address_EnvoyInternalAddress{EnvoyInternalAddress: &corev3.EnvoyInternalAddress{
					AddressNameSpecifier: &corev3.EnvoyInternalAddress_ServerListenerName{ServerListenerName: mainInternal}}}}}}}}}}},
	}
	w.clusters[connectOriginate] = &clusterv3.Cluster{
		Name:                 connectOriginate,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_ORIGINAL_DST},
		LbPolicy:             clusterv3.Cluster_CLUSTER_PROVIDED,
		ConnectTimeout:       durationpb.New(connectTimeout),
		LbConfig: &clusterv3.Cluster_OriginalDstLbConfig_{OriginalDstLbConfig: &clusterv3.Cluster_OriginalDstLbConfig{
			UpstreamPortOverride: wrapperspb.UInt32(hbonePort)}},
		TransportSocket: &corev3.TransportSocket{Name: "tls", ConfigType: &corev3.TransportSocket_TypedConfig{
			TypedConfig: pack(&tlsv3.UpstreamTlsContext{CommonTlsContext: tunnelTLS(w.in.TrustDomain)})}},
		TypedExtensionProtocolOptions: protocolOptions(protocolHTTP2),
	}
}

func protocolOptions(protocol portProtocol) map[string]*anypb.Any {
	options := &upstreamhttp.HttpProtocolOptions{}
	switch protocol {
	case protocolTCP:
		return nil
	case protocolHTTP2:
		options.UpstreamProtocolOptions = &upstreamhttp.HttpProtocolOptions_ExplicitHttpConfig_{
			ExplicitHttpConfig: &upstreamhttp.HttpProtocolOptions_ExplicitHttpConfig{
				ProtocolConfig: &upstreamhttp.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{
					Http2ProtocolOptions: &corev3.Http2ProtocolOptions{}}}}
	default:
		options.UpstreamProtocolOptions = &upstreamhttp.HttpProtocolOptions_UseDownstreamProtocolConfig{
			UseDownstreamProtocolConfig: &upstreamhttp.HttpProtocolOptions_UseDownstreamHttpConfig{
				HttpProtocolOptions: &corev3.Http1ProtocolOptions{}, Http2ProtocolOptions: &corev3.Http2ProtocolOptions{}}}
	}
	return map[string]*anypb.Any{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": pack(options)}
}

func tunnelMatch() *structpb.Struct { return stringStruct("tunnel", "h2") }

// internalUpstream passes an endpoint's own address on to the tunnel listener.
func internalUpstream() *corev3.TransportSocket {
	host := &metadatav3.MetadataKind{Kind: &metadatav3.MetadataKind_Host_{Host: &metadatav3.MetadataKind_Host{}}}
	return &corev3.TransportSocket{Name: "internal_upstream", ConfigType: &corev3.TransportSocket_TypedConfig{
		TypedConfig: pack(&internalupstream.InternalUpstreamTransport{
			PassthroughMetadata: []*internalupstream.InternalUpstreamTransport_MetadataValueSource{{Kind: host, Name: tunnelMetadata}},
			TransportSocket:     rawSocket(),
		})}}
}

func rawSocket() *corev3.TransportSocket {
	return &corev3.TransportSocket{Name: "raw_buffer", ConfigType: &corev3.TransportSocket_TypedConfig{
		TypedConfig: pack(&rawbuffer.RawBuffer{})}}
}

func internalAddress(id string) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_EnvoyInternalAddress{EnvoyInternalAddress: &corev3.EnvoyInternalAddress{
		AddressNameSpecifier: &corev3.EnvoyInternalAddress_ServerListenerName{ServerListenerName: connectOriginate}, EndpointId: id}}}
}

func socketAddress(at netip.AddrPort) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: at.Addr().String(), PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(at.Port())}}}}
}

func adsSource() *corev3.ConfigSource {
	return &corev3.ConfigSource{ResourceApiVersion: corev3.ApiVersion_V3,
		ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}}}
}

// stringStruct makes a struct of key, value, key, value …; empty values are left out.
func stringStruct(pairs ...string) *structpb.Struct {
	fields := map[string]*structpb.Value{}
	for i := 0; i+1 < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			fields[pairs[i]] = structpb.NewStringValue(pairs[i+1])
		}
	}
	return &structpb.Struct{Fields: fields}
}

// pack makes an Any of a message that was just built; equal messages give equal bytes.
func pack(m proto.Message) *anypb.Any {
	// Marshalling fails only for strings that are not UTF-8, which the API server does not let through; an empty Any is
	// then refused by whoever reads it.
	body, _ := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	return &anypb.Any{TypeUrl: "type.googleapis.com/" + string(m.ProtoReflect().Descriptor().FullName()), Value: body}
}
