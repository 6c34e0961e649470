package wire

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/fairlead-mesh/fairlead/api/security"
	"github.com/fairlead-mesh/fairlead/api/workload"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// netipValues lets cmp.Diff compare addresses and prefixes.
func netipValues() cmp.Option { return cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}) }

// fullWorkload has every field set; a field added to the model without encoding it fails the round trip only if it is
// set here, so TestFullValues checks that all are.
func fullWorkload() *mesh.Workload {
	return &mesh.Workload{
		UID: "c1//Pod/default/a", Name: "a", Namespace: "default", TrustDomain: "td", ServiceAccount: "sa",
		Network: "n1", ClusterID: "c1", Node: "node1",
		Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("2001:db8::1")},
		Hostname:  "a.example", Protocol: mesh.ProtocolHBONE, NativeTunnel: true,
		ApplicationPort: 15088, ApplicationProto: mesh.ApplicationProxy,
		Waypoint: &mesh.GatewayAddress{Hostname: mesh.NamespacedHostname{Namespace: "default", Hostname: "waypoint.default.svc"}, HBONEPort: 15008},
		NetworkGateway: &mesh.GatewayAddress{
			Address: mesh.NetworkAddress{Network: "n2", Address: netip.MustParseAddr("192.0.2.1")}, HBONEPort: 15009,
		},
		CanonicalName: "a", CanonicalRevision: "v1", WorkloadName: "a-dep", WorkloadType: "deployment",
		Services: map[mesh.NamespacedHostname][]mesh.Port{
			{Namespace: "default", Hostname: "a.default.svc.cluster.local"}: {{ServicePort: 80, TargetPort: 8080}, {ServicePort: 443}},
			{Namespace: "default", Hostname: "headless"}:                    nil,
		},
		Policies: []string{"default/deny"}, Healthy: true, HostNetwork: true,
		Locality: mesh.Locality{Region: "r", Zone: "z", Subzone: "s"}, Capacity: 3,
	}
}

func fullService() *mesh.Service {
	return &mesh.Service{
		Name: "a", Namespace: "default", Hostname: "a.default.svc.cluster.local",
		Addresses: []mesh.NetworkAddress{{Network: "n1", Address: netip.MustParseAddr("10.96.0.1")}, {Address: netip.MustParseAddr("2001:db8::96")}},
		Ports:     []mesh.Port{{ServicePort: 80, TargetPort: 8080}}, SubjectAltNames: []string{"spiffe://td/ns/x/sa/y"},
		Waypoint: &mesh.GatewayAddress{Hostname: mesh.NamespacedHostname{Namespace: "infra", Hostname: "w"}, HBONEPort: 15008},
		LoadBalancing: mesh.LoadBalancing{
			Preference: []mesh.LocalityScope{mesh.ScopeNetwork, mesh.ScopeRegion, mesh.ScopeZone, mesh.ScopeSubzone, mesh.ScopeNode, mesh.ScopeCluster},
			Mode:       mesh.LoadBalanceFailover, AllowUnhealthy: true,
		},
		Canonical: true,
	}
}

func fullAuthorization() *mesh.Authorization {
	strings := []mesh.StringMatch{{Kind: mesh.MatchExact, Value: "a"}, {Kind: mesh.MatchPrefix, Value: "b"}, {Kind: mesh.MatchSuffix, Value: "c"}, {Kind: mesh.MatchPresence}}
	accounts := []mesh.ServiceAccountMatch{{Namespace: "ns", ServiceAccount: "sa"}}
	prefixes := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("2001:db8::/32")}
	return &mesh.Authorization{
		Name: "p", Namespace: "default", Scope: mesh.ScopeSelector, Action: mesh.ActionDeny, DryRun: true,
		Rules: []mesh.Rule{{}, {Clauses: []mesh.Clause{{Matches: []mesh.Match{{
			Namespaces: strings, NotNamespaces: strings, Principals: strings, NotPrincipals: strings,
			ServiceAccounts: accounts, NotServiceAccounts: accounts, SourceIPs: prefixes, NotSourceIPs: prefixes,
			DestinationIPs: prefixes, NotDestinationIPs: prefixes, DestinationPorts: []uint16{80, 65535}, NotDestinationPorts: []uint16{0},
		}, {DestinationPorts: []uint16{1}}}}}}},
	}
}

func TestRoundTripWorkload(t *testing.T) {
	plain := &mesh.Workload{UID: "c//Pod/ns/b", WorkloadType: "pod", Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.2")}}
	for _, want := range []*mesh.Workload{fullWorkload(), plain} {
		got, svc, err := DecodeAddress(overTheWire(t, EncodeWorkload(want)))
		if err != nil || svc != nil {
			t.Fatalf("decode: service %v, error %v", svc, err)
		}
		if diff := cmp.Diff(want, got, netipValues()); diff != "" {
			t.Errorf("workload (-want +got):\n%s", diff)
		}
	}
}

func TestRoundTripService(t *testing.T) {
	for _, want := range []*mesh.Service{fullService(), {Namespace: "default", Hostname: "b"}} {
		w, got, err := DecodeAddress(overTheWire(t, EncodeService(want)))
		if err != nil || w != nil {
			t.Fatalf("decode: workload %v, error %v", w, err)
		}
		if diff := cmp.Diff(want, got, netipValues()); diff != "" {
			t.Errorf("service (-want +got):\n%s", diff)
		}
	}
}

func TestRoundTripAuthorization(t *testing.T) {
	for _, want := range []*mesh.Authorization{
		fullAuthorization(),
		{Name: "nothing", Namespace: "default", Scope: mesh.ScopeNamespace},
		{Name: "global", Namespace: "istio-system", Scope: mesh.ScopeGlobal, Action: mesh.ActionAllow, Rules: []mesh.Rule{{}}},
	} {
		got, err := DecodeAuthorization(overTheWire(t, EncodeAuthorization(want)))
		if err != nil {
			t.Fatalf("decode: %v", err)
		}
		if diff := cmp.Diff(want, got, netipValues()); diff != "" {
			t.Errorf("authorization (-want +got):\n%s", diff)
		}
	}
}

// TestFullValues: the round trips above prove nothing for a field they leave at zero.
func TestFullValues(t *testing.T) {
	for _, v := range []any{fullWorkload(), fullService(), fullAuthorization()} {
		for _, name := range zeroFields(v) {
			t.Errorf("%T.%s is not set in its round trip", v, name)
		}
	}
}

// TestEncodeWhatSaysNothing: a clause that always holds is left out, a rule that cannot match is too.
func TestEncodeWhatSaysNothing(t *testing.T) {
	port := mesh.Clause{Matches: []mesh.Match{{DestinationPorts: []uint16{80}}}}
	always := mesh.Clause{Matches: []mesh.Match{{DestinationPorts: []uint16{81}}, {}}}
	a := &mesh.Authorization{Name: "p", Namespace: "n", Rules: []mesh.Rule{
		{Clauses: []mesh.Clause{always, port}},
		{Clauses: []mesh.Clause{port, {}}},
	}}
	got, err := DecodeAuthorization(EncodeAuthorization(a))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]mesh.Rule{{Clauses: []mesh.Clause{port}}}, got.Rules, netipValues()); diff != "" {
		t.Errorf("rules (-want +got):\n%s", diff)
	}
}

func TestDecodeNormalises(t *testing.T) {
	mapped := netip.MustParseAddr("::ffff:10.0.0.0").As16()
	got, err := decodePrefixes([]*security.Address{
		{Address: mapped[:], Length: 104}, {Address: []byte{10, 1, 2, 3}, Length: 8}, {Address: make([]byte, 16), Length: 0},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("::/0")}
	if diff := cmp.Diff(want, got, netipValues()); diff != "" {
		t.Errorf("prefixes (-want +got):\n%s", diff)
	}
	w, _, err := DecodeAddress(workloadAddress(&workload.Workload{Uid: "u", Waypoint: &workload.GatewayAddress{
		Destination: &workload.GatewayAddress_Address{Address: &workload.NetworkAddress{Address: mapped[:], Length: proto.Uint32(32)}},
	}}))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&mesh.GatewayAddress{Address: mesh.NetworkAddress{Address: netip.MustParseAddr("10.0.0.0")}, HBONEPort: 15008}, w.Waypoint, netipValues()); diff != "" {
		t.Errorf("waypoint (-want +got):\n%s", diff)
	}
}

func TestDecodeAddressRefuses(t *testing.T) {
	gateway := func(g *workload.GatewayAddress) *workload.Address {
		return workloadAddress(&workload.Workload{Uid: "u", Waypoint: g})
	}
	for _, tc := range []struct {
		name string
		in   *workload.Address
		want string
	}{
		{"nil", nil, "neither a workload nor a service"},
		{"empty", &workload.Address{}, "neither a workload nor a service"},
		{"no uid", workloadAddress(&workload.Workload{}), "without a uid"},
		{"address length", workloadAddress(&workload.Workload{Uid: "u", Addresses: [][]byte{{1, 2}}}), "address of 2 bytes"},
		{"tunnel protocol", workloadAddress(&workload.Workload{Uid: "u", TunnelProtocol: 7}), "unsupported tunnel protocol"},
		{"legacy tunnel", workloadAddress(&workload.Workload{Uid: "u", TunnelProtocol: workload.TunnelProtocol_LEGACY_ISTIO_MTLS}), "unsupported tunnel protocol LEGACY"},
		{"status", workloadAddress(&workload.Workload{Uid: "u", Status: 9}), "unknown status 9"},
		{"network mode", workloadAddress(&workload.Workload{Uid: "u", NetworkMode: 9}), "unknown network mode 9"},
		{"workload type", workloadAddress(&workload.Workload{Uid: "u", WorkloadType: 9}), "unknown workload type 9"},
		{"application tunnel", workloadAddress(&workload.Workload{Uid: "u", ApplicationTunnel: &workload.ApplicationTunnel{Protocol: 4}}), "unknown application tunnel protocol 4"},
		{"application port", workloadAddress(&workload.Workload{Uid: "u", ApplicationTunnel: &workload.ApplicationTunnel{Port: 70000}}), "port 70000"},
		{"service key", workloadAddress(&workload.Workload{Uid: "u", Services: map[string]*workload.PortList{"x": nil}}), `service key "x"`},
		{"service port", workloadAddress(&workload.Workload{Uid: "u", Services: map[string]*workload.PortList{"n/h": {Ports: []*workload.Port{{TargetPort: 65536}}}}}), "port 65536"},
		{"gateway nowhere", gateway(&workload.GatewayAddress{}), "gateway without"},
		{"gateway port", gateway(&workload.GatewayAddress{HboneMtlsPort: 1 << 20}), "port 1048576"},
		{"gateway hostname", gateway(&workload.GatewayAddress{Destination: &workload.GatewayAddress_Hostname{}}), "want a namespace and a hostname"},
		{"gateway range", gateway(&workload.GatewayAddress{Destination: &workload.GatewayAddress_Address{
			Address: &workload.NetworkAddress{Address: []byte{1, 2, 3, 4}, Length: proto.Uint32(24)}}}), "ranges are not supported"},
		{"service without name", serviceAddress(&workload.Service{Namespace: "n"}), "without a namespace or hostname"},
		{"service scope", serviceAddress(&workload.Service{Namespace: "n", Hostname: "h", LoadBalancing: &workload.LoadBalancing{RoutingPreference: []workload.LoadBalancing_Scope{0}}}), "unknown load balancing scope"},
		{"service mode", serviceAddress(&workload.Service{Namespace: "n", Hostname: "h", LoadBalancing: &workload.LoadBalancing{Mode: 9}}), "unknown load balancing mode"},
		{"service health", serviceAddress(&workload.Service{Namespace: "n", Hostname: "h", LoadBalancing: &workload.LoadBalancing{HealthPolicy: 9}}), "unknown health policy"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, _, err := DecodeAddress(tc.in)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want one with %q", err, tc.want)
			}
		})
	}
}

func TestDecodeAuthorizationRefuses(t *testing.T) {
	rule := func(m *security.Match) *security.Authorization {
		return &security.Authorization{Name: "p", Namespace: "n", Rules: []*security.Rule{{Clauses: []*security.Clause{{Matches: []*security.Match{m}}}}}}
	}
	for _, tc := range []struct {
		name string
		in   *security.Authorization
		want string
	}{
		{"no name", &security.Authorization{Namespace: "n"}, "without a namespace or name"},
		{"scope", &security.Authorization{Name: "p", Namespace: "n", Scope: 7}, "unknown scope 7"},
		{"action", &security.Authorization{Name: "p", Namespace: "n", Action: 7}, "unknown action 7"},
		{"empty match", rule(&security.Match{}), "match without a condition"},
		{"match extension", rule(&security.Match{DestinationPorts: []uint32{1}, Extensions: []*workload.Extension{{Name: "x"}}}), `extension "x"`},
		{"string kind", rule(&security.Match{NotPrincipals: []*security.StringMatch{{}}}), "string match of unknown kind"},
		{"prefix too long", rule(&security.Match{SourceIps: []*security.Address{{Address: []byte{1, 2, 3, 4}, Length: 33}}}), "longer than the address"},
		{"prefix length overflow", rule(&security.Match{SourceIps: []*security.Address{{Address: []byte{1, 2, 3, 4}, Length: 1 << 31}}}), "longer than the address"},
		{"port", rule(&security.Match{DestinationPorts: []uint32{65536}}), "port 65536"},
		{"service account", rule(&security.Match{ServiceAccounts: []*security.ServiceAccountMatch{{Namespace: "n"}}}), "want both"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := DecodeAuthorization(tc.in)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want one with %q", err, tc.want)
			}
		})
	}
}

func TestAliases(t *testing.T) {
	w, s := fullWorkload(), fullService()
	if diff := cmp.Diff([]string(nil), Aliases(w, nil)); diff != "" {
		t.Errorf("host-network workload (-want +got):\n%s", diff)
	}
	w.HostNetwork = false
	if diff := cmp.Diff([]string{"n1/10.0.0.1", "n1/2001:db8::1"}, Aliases(w, nil)); diff != "" {
		t.Errorf("workload (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"n1/10.96.0.1", "/2001:db8::96"}, Aliases(nil, s)); diff != "" {
		t.Errorf("service (-want +got):\n%s", diff)
	}
}

// FuzzDecodeAddress: no bytes crash the decoder, and what it accepts survives another trip.
func FuzzDecodeAddress(f *testing.F) {
	for _, a := range []*workload.Address{EncodeWorkload(fullWorkload()), EncodeService(fullService()),
		workloadAddress(&workload.Workload{Uid: "u", Capacity: wrapperspb.UInt32(0)})} {
		b, err := proto.Marshal(a)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var a workload.Address
		if proto.Unmarshal(b, &a) != nil {
			return
		}
		w, s, err := DecodeAddress(&a)
		if err != nil {
			return
		}
		var again *workload.Address
		if w != nil {
			again = EncodeWorkload(w)
		} else {
			again = EncodeService(s)
		}
		w2, s2, err := DecodeAddress(overTheWire(t, again))
		if err != nil {
			t.Fatalf("what was accepted is refused after encoding: %v", err)
		}
		if diff := cmp.Diff(w, w2, netipValues()); diff != "" {
			t.Errorf("workload (-first +second):\n%s", diff)
		}
		if diff := cmp.Diff(s, s2, netipValues(), cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("service (-first +second):\n%s", diff)
		}
	})
}

// FuzzDecodeAuthorization: as FuzzDecodeAddress, for policies.
func FuzzDecodeAuthorization(f *testing.F) {
	b, err := proto.Marshal(EncodeAuthorization(fullAuthorization()))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		var a security.Authorization
		if proto.Unmarshal(b, &a) != nil {
			return
		}
		first, err := DecodeAuthorization(&a)
		if err != nil {
			return
		}
		second, err := DecodeAuthorization(overTheWire(t, EncodeAuthorization(first)))
		if err != nil {
			t.Fatalf("what was accepted is refused after encoding: %v", err)
		}
		if diff := cmp.Diff(first, second, netipValues()); diff != "" {
			t.Errorf("policy (-first +second):\n%s", diff)
		}
	})
}
