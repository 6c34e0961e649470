package waypoint

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"
	"sync/atomic"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	upstreamhttp "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

const (
	// peerMetadata says who is behind an endpoint.
	peerMetadata = "fairlead.peer"
	httpOptions  = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
)

// cluster is where routes lead: a service's port or a workload.
type cluster struct {
	name           string
	connectTimeout time.Duration
	// http2: endpoints speak HTTP/2 always; else what the client spoke.
	http2   bool
	service serviceName
	// eds names the endpoints' resource; a cluster without has itself, or none.
	eds string
	// original is the workload of a cluster that sends to the address asked for.
	original *peer
}

// serviceName is a service for logs and metrics.
type serviceName struct{ host, name, namespace string }

// endpoint is one place to send to. Those with the same key share a load.
type endpoint struct {
	addr netip.AddrPort
	// host stands for the endpoint in HTTP connection pools: endpoints that must not share connections differ in it.
	host   string
	peer   *peer
	weight uint32
	load   *load
}

// load is what is under way to an endpoint; it outlives changes of the endpoint's cluster.
type load struct{ active atomic.Int64 }

// peer is a workload as seen from outside.
type peer struct {
	// hbone: it is reached through a tunnel, and must prove identity.
	hbone    bool
	identity mesh.Identity
	workload mesh.Workload // names only
}

// key tells endpoints apart that must not share a connection.
func (e *endpoint) key() string {
	if !e.peer.hbone {
		return e.addr.String() + "/"
	}
	return e.addr.String() + "/" + e.peer.identity.Principal()
}

// decodeCluster reads a cluster; nil for one of Envoy's own plumbing.
func decodeCluster(c *clusterv3.Cluster) (*cluster, error) {
	if c.GetName() == mainListener || c.GetName() == "connect_originate" {
		return nil, nil
	}
	out := &cluster{name: c.GetName(), connectTimeout: c.GetConnectTimeout().AsDuration()}
	if out.connectTimeout <= 0 {
		out.connectTimeout = 5 * time.Second
	}
	if o := c.GetTypedExtensionProtocolOptions()[httpOptions]; o != nil {
		var options upstreamhttp.HttpProtocolOptions
		if err := o.UnmarshalTo(&options); err != nil {
			return nil, fmt.Errorf("protocol options: %w", err)
		}
		out.http2 = options.GetExplicitHttpConfig().GetHttp2ProtocolOptions() != nil
	}
	metadata := c.GetMetadata().GetFilterMetadata()
	if list := metadata["istio"].GetFields()["services"].GetListValue().GetValues(); len(list) > 0 {
		s := list[0].GetStructValue()
		out.service = serviceName{field(s, "host"), field(s, "name"), field(s, "namespace")}
	}
	if m := metadata[peerMetadata]; m != nil {
		p, err := decodePeer(m)
		if err != nil {
			return nil, err
		}
		out.original = p
		return out, nil
	}
	switch c.GetType() {
	case clusterv3.Cluster_EDS:
		out.eds = c.GetEdsClusterConfig().GetServiceName()
		if out.eds == "" {
			out.eds = c.GetName()
		}
	case clusterv3.Cluster_STATIC:
		if len(c.GetLoadAssignment().GetEndpoints()) > 0 {
			return nil, fmt.Errorf("static endpoints are not supported")
		}
	default:
		return nil, fmt.Errorf("type %s is not supported", c.GetType())
	}
	return out, nil
}

// decodeEndpoints reads an assignment. loads gives the load of an endpoint by key.
func decodeEndpoints(a *endpointv3.ClusterLoadAssignment, loads func(key string) *load) ([]*endpoint, error) {
	var out []*endpoint
	for _, locality := range a.GetEndpoints() {
		for _, lb := range locality.GetLbEndpoints() {
			if s := lb.GetHealthStatus(); s != corev3.HealthStatus_HEALTHY && s != corev3.HealthStatus_UNKNOWN {
				continue
			}
			e, err := decodeEndpoint(lb)
			if err != nil {
				return nil, err
			}
			e.load, e.host = loads(e.key()), poolHost(e)
			out = append(out, e)
		}
	}
	return out, nil
}

func poolHost(e *endpoint) string {
	sum := sha256.Sum256([]byte(e.key()))
	return hex.EncodeToString(sum[:12])
}

func decodeEndpoint(lb *endpointv3.LbEndpoint) (*endpoint, error) {
	e := &endpoint{weight: max(lb.GetLoadBalancingWeight().GetValue(), 1)}
	address := lb.GetEndpoint().GetAddress()
	text := address.GetEnvoyInternalAddress().GetEndpointId()
	if s := address.GetSocketAddress(); s != nil {
		text = netJoin(s.GetAddress(), s.GetPortValue())
	}
	var err error
	if e.addr, err = netip.ParseAddrPort(text); err != nil {
		return nil, fmt.Errorf("endpoint: %w", err)
	}
	metadata := lb.GetMetadata().GetFilterMetadata()[peerMetadata]
	if metadata == nil {
		if address.GetEnvoyInternalAddress() != nil {
			return nil, fmt.Errorf("endpoint %s: tunnelled, and nothing says to whom", e.addr)
		}
		e.peer = &peer{}
		return e, nil
	}
	if e.peer, err = decodePeer(metadata); err != nil {
		return nil, fmt.Errorf("endpoint %s: %w", e.addr, err)
	}
	if e.peer.hbone != (address.GetEnvoyInternalAddress() != nil) {
		return nil, fmt.Errorf("endpoint %s: address and peer metadata disagree on the tunnel", e.addr)
	}
	return e, nil
}

func netJoin(host string, port uint32) string {
	addr, err := netip.ParseAddr(host)
	if err != nil || port > 65535 {
		return fmt.Sprintf("%s:%d", host, port)
	}
	return netip.AddrPortFrom(addr, uint16(port)).String()
}

func decodePeer(m *structpb.Struct) (*peer, error) {
	p := &peer{workload: mesh.Workload{
		UID: field(m, "uid"), Name: field(m, "name"), Namespace: field(m, "namespace"), WorkloadName: field(m, "workload"),
		CanonicalName: field(m, "canonical_name"), CanonicalRevision: field(m, "canonical_revision"),
		ClusterID: field(m, "cluster"), Locality: mesh.Locality{Region: field(m, "region"), Zone: field(m, "zone")},
	}}
	switch tunnel := field(m, "tunnel"); tunnel {
	case mesh.ProtocolHBONE.String():
		p.hbone = true
	case mesh.ProtocolNone.String():
		return p, nil
	default:
		return nil, fmt.Errorf("tunnel %q is not supported", tunnel)
	}
	id, err := mesh.ParseIdentity(field(m, "identity"))
	p.identity = id
	return p, err
}

func field(s *structpb.Struct, name string) string { return s.GetFields()[name].GetStringValue() }
