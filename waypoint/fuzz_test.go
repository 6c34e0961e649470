package waypoint

import (
	"net/netip"
	"testing"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	rbacnetwork "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	tcpproxy "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/fairlead-mesh/fairlead/internal/httproute"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

func wireOf(f *testing.F, m proto.Message) []byte {
	f.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		f.Fatal(err)
	}
	return b
}

func anyOfMessage(f *testing.F, m proto.Message) *anypb.Any {
	f.Helper()
	a, err := anypb.New(m)
	if err != nil {
		f.Fatal(err)
	}
	return a
}

// FuzzListener: a listener is refused, or connections can be led by it and asked about.
func FuzzListener(f *testing.F) {
	f.Add(wireOf(f, &listenerv3.Listener{Name: mainListener, FilterChains: []*listenerv3.FilterChain{{Name: "a", Filters: []*listenerv3.Filter{
		{Name: "rbac", ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: anyOfMessage(f, &rbacnetwork.RBAC{Rules: &rbacv3.RBAC{
			Action: rbacv3.RBAC_DENY, Policies: map[string]*rbacv3.Policy{"ns[a]-policy[b]-rule[0]": {
				Permissions: []*rbacv3.Permission{{Rule: &rbacv3.Permission_DestinationPort{DestinationPort: 80}}},
				Principals:  []*rbacv3.Principal{{Identifier: &rbacv3.Principal_Any{Any: true}}}}}}})}},
		{Name: "tcp", ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: anyOfMessage(f, &tcpproxy.TcpProxy{
			ClusterSpecifier: &tcpproxy.TcpProxy_Cluster{Cluster: "c"}})}},
	}}}}))
	to := netip.MustParseAddrPort("10.0.0.1:80")
	asked := &facts{source: mesh.Identity{TrustDomain: "cluster.local", Namespace: "a", ServiceAccount: "b"}, sourceIP: to.Addr(), destination: to, remoteIP: to.Addr()}
	f.Fuzz(func(t *testing.T, body []byte) {
		var m listenerv3.Listener
		if proto.Unmarshal(body, &m) != nil {
			return
		}
		e, err := decodeListener(&m)
		if err != nil {
			return
		}
		if found, ok := e.find(to); ok && e.chains[found.http] == nil && e.chains[found.tcp] == nil {
			t.Errorf("led to %+v, which is not there", found)
		}
		for _, c := range e.chains {
			check(c.rules, asked)
		}
	})
}

// FuzzRoutes: a table is refused, or requests find their way by it.
func FuzzRoutes(f *testing.F) {
	f.Add(wireOf(f, &routev3.RouteConfiguration{Name: "a", VirtualHosts: []*routev3.VirtualHost{{Domains: []string{"*"}, Routes: []*routev3.Route{{
		Match:  &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_PathSeparatedPrefix{PathSeparatedPrefix: "/a"}},
		Action: &routev3.Route_Route{Route: &routev3.RouteAction{ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: "c"}}}}}}}}), "a.example", "/a/b", "x=y")
	f.Fuzz(func(t *testing.T, body []byte, host, path, query string) {
		var m routev3.RouteConfiguration
		if proto.Unmarshal(body, &m) != nil {
			return
		}
		table, err := decodeRoutes(&m)
		if err != nil {
			return
		}
		path, ok := httproute.NormalizePath(path)
		if !ok {
			return
		}
		r := &httproute.Request{Method: "GET", Host: host, Path: path, RawQuery: query, Header: func(string) (string, bool) { return "", false }}
		d := table.Select(r, 7)
		if d.Route != nil && d.Route.Redirect == nil && d.Route.Answer == nil && d.Cluster == nil && len(d.Route.Clusters) > 0 {
			total := uint32(0)
			for _, c := range d.Route.Clusters {
				total += c.Weight
			}
			if total > 0 {
				t.Errorf("route %+v leads nowhere", d.Route)
			}
		}
	})
}

// FuzzClusters reads clusters and their endpoints.
func FuzzClusters(f *testing.F) {
	f.Add(wireOf(f, &clusterv3.Cluster{Name: "a", ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS}}),
		wireOf(f, &endpointv3.ClusterLoadAssignment{ClusterName: "a", Endpoints: []*endpointv3.LocalityLbEndpoints{{LbEndpoints: []*endpointv3.LbEndpoint{{}}}}}))
	f.Fuzz(func(t *testing.T, cluster, assignment []byte) {
		var c clusterv3.Cluster
		if proto.Unmarshal(cluster, &c) == nil {
			if got, err := decodeCluster(&c); err == nil && got != nil && got.connectTimeout <= 0 {
				t.Errorf("no time to connect: %+v", got)
			}
		}
		var a endpointv3.ClusterLoadAssignment
		if proto.Unmarshal(assignment, &a) != nil {
			return
		}
		endpoints, err := decodeEndpoints(&a, func(string) *load { return &load{} })
		for _, e := range endpoints {
			if err == nil && (!e.addr.IsValid() || e.peer == nil || e.peer.hbone && e.peer.identity.IsZero()) {
				t.Errorf("accepted %+v", e)
			}
		}
	})
}
