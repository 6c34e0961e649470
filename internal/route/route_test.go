package route

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/state"
)

func host(name string) mesh.NamespacedHostname {
	return mesh.NamespacedHostname{Namespace: "shop", Hostname: name + ".shop.svc.cluster.local"}
}

func at(ip string) mesh.NetworkAddress { return mesh.NetworkAddress{Address: netip.MustParseAddr(ip)} }

func pod(name string, change func(*mesh.Workload), ips ...string) *mesh.Workload {
	w := &mesh.Workload{
		UID: "Kubernetes//Pod/shop/" + name, Name: name, Namespace: "shop", ServiceAccount: name,
		Protocol: mesh.ProtocolHBONE, Healthy: true, Services: map[mesh.NamespacedHostname][]mesh.Port{},
	}
	for _, ip := range ips {
		w.Addresses = append(w.Addresses, netip.MustParseAddr(ip))
	}
	if change != nil {
		change(w)
	}
	return w
}

func service(name string, change func(*mesh.Service), vips ...string) *mesh.Service {
	s := &mesh.Service{Name: name, Namespace: "shop", Hostname: host(name).Hostname}
	for _, vip := range vips {
		s.Addresses = append(s.Addresses, at(vip))
	}
	if change != nil {
		change(s)
	}
	return s
}

func serves(service string, ports ...mesh.Port) func(*mesh.Workload) {
	return func(w *mesh.Workload) { w.Services[host(service)] = ports }
}

// world has one of each kind of destination.
func world() *state.Snapshot {
	toWaypoint := &mesh.GatewayAddress{Hostname: host("waypoint")}
	noWaypoint := &mesh.GatewayAddress{Hostname: host("gone")}
	store := state.New()
	store.Apply(state.Change{
		Workloads: []*mesh.Workload{
			pod("web", serves("web", mesh.Port{ServicePort: 80, TargetPort: 8080}), "10.0.0.1", "fd00::1"),
			pod("plain", func(w *mesh.Workload) {
				w.Protocol = mesh.ProtocolNone
				w.Services[host("plain")] = []mesh.Port{{ServicePort: 80}}
			}, "10.0.0.2"),
			pod("sick", func(w *mesh.Workload) {
				w.Healthy = false
				w.Services[host("sick")] = []mesh.Port{{ServicePort: 80}}
			}, "10.0.0.3"),
			pod("far", func(w *mesh.Workload) {
				w.Network = "other"
				w.Services[host("far")] = []mesh.Port{{ServicePort: 80}}
			}, "10.0.0.4"),
			pod("waypoint", serves("waypoint", mesh.Port{ServicePort: 15008}), "10.0.0.5"),
			pod("guarded", func(w *mesh.Workload) { w.Waypoint = toWaypoint }, "10.0.0.6"),
			pod("nameless", serves("nameless", mesh.Port{ServicePort: 80})),
		},
		Services: []*mesh.Service{
			service("web", nil, "10.1.0.1", "fd01::1"),
			service("plain", nil, "10.1.0.2"),
			service("sick", nil, "10.1.0.3"),
			service("far", nil, "10.1.0.4"),
			service("waypoint", nil, "10.1.0.5"),
			service("guarded", func(s *mesh.Service) { s.Waypoint = toWaypoint }, "10.1.0.6"),
			service("lost", func(s *mesh.Service) { s.Waypoint = noWaypoint }, "10.1.0.7"),
			service("byaddress", func(s *mesh.Service) {
				s.Waypoint = &mesh.GatewayAddress{Address: at("10.1.0.5"), HBONEPort: 15008}
			}, "10.1.0.8"),
			service("bypod", func(s *mesh.Service) { s.Waypoint = &mesh.GatewayAddress{Address: at("10.0.0.5")} }, "10.1.0.9"),
			service("empty", nil, "10.1.0.10"),
			service("asis", func(s *mesh.Service) { s.LoadBalancing.Mode = mesh.LoadBalancePassthrough }, "10.1.0.11"),
			service("nameless", nil, "10.1.0.12"),
			service("vouched", func(s *mesh.Service) { s.SubjectAltNames = []string{"spiffe://cluster.local/ns/vm/sa/a", "bad"} }, "10.1.0.13"),
		},
	})
	return store.Load()
}

func identity(name string) mesh.Identity {
	return mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: name}
}

func TestOutbound(t *testing.T) {
	snap := world()
	client := pod("client", nil, "10.0.0.9")
	addr := netip.MustParseAddrPort
	wl := func(name string) *mesh.Workload { return snap.Workload("Kubernetes//Pod/shop/" + name) }
	svc := func(name string) *mesh.Service { return snap.Service(host(name)) }
	viaWaypoint := func(service *mesh.Service, dst string) Decision {
		return Decision{Action: HBONE, NextHop: addr("10.0.0.5:15008"), Authority: dst, Destination: wl("waypoint"),
			Service: service, Waypoint: true, Expected: []mesh.Identity{identity("waypoint")}}
	}
	for _, tc := range []struct {
		name   string
		source *mesh.Workload
		dst    string
		want   Decision
	}{
		{"address of nobody", client, "192.0.2.1:443", Decision{NextHop: addr("192.0.2.1:443"), Target: addr("192.0.2.1:443")}},
		{"v4 in v6", client, "[::ffff:192.0.2.1]:443", Decision{NextHop: addr("192.0.2.1:443"), Target: addr("192.0.2.1:443")}},
		{"pod", client, "10.0.0.1:9000", Decision{Action: HBONE, NextHop: addr("10.0.0.1:15008"), Target: addr("10.0.0.1:9000"),
			Authority: "10.0.0.1:9000", Destination: wl("web"), Expected: []mesh.Identity{identity("web")}}},
		{"service, mapped port", client, "10.1.0.1:80", Decision{Action: HBONE, NextHop: addr("10.0.0.1:15008"), Target: addr("10.0.0.1:8080"),
			Authority: "10.0.0.1:8080", Destination: wl("web"), Service: svc("web"), Expected: []mesh.Identity{identity("web")}}},
		{"service, IPv6", client, "[fd01::1]:80", Decision{Action: HBONE, NextHop: addr("[fd00::1]:15008"), Target: addr("[fd00::1]:8080"),
			Authority: "[fd00::1]:8080", Destination: wl("web"), Service: svc("web"), Expected: []mesh.Identity{identity("web")}}},
		{"service, port it does not have", client, "10.1.0.1:81", Decision{Action: Refuse, Service: svc("web"), Why: NoServicePort}},
		{"unmeshed", client, "10.1.0.2:80", Decision{Action: Plain, NextHop: addr("10.0.0.2:80"), Target: addr("10.0.0.2:80"),
			Destination: wl("plain"), Service: svc("plain")}},
		{"nobody healthy", client, "10.1.0.3:80", Decision{Action: Refuse, Service: svc("sick"), Why: NoEndpoint}},
		{"no endpoints", client, "10.1.0.10:80", Decision{Action: Refuse, Service: svc("empty"), Why: NoEndpoint}},
		{"endpoints in another network only", client, "10.1.0.4:80", Decision{Action: Refuse, Service: svc("far"), Why: NoEndpoint}},
		{"endpoint without address", client, "10.1.0.12:80",
			Decision{Action: Refuse, Service: svc("nameless"), Destination: wl("nameless"), Why: NoAddress}},
		{"passthrough service", client, "10.1.0.11:80",
			Decision{NextHop: addr("10.1.0.11:80"), Target: addr("10.1.0.11:80"), Service: svc("asis")}},
		{"service behind waypoint", client, "10.1.0.6:80", viaWaypoint(svc("guarded"), "10.1.0.6:80")},
		{"waypoint by service address", client, "10.1.0.8:80", viaWaypoint(svc("byaddress"), "10.1.0.8:80")},
		{"waypoint by pod address", client, "10.1.0.9:80", viaWaypoint(svc("bypod"), "10.1.0.9:80")},
		{"workload behind waypoint", client, "10.0.0.6:80", viaWaypoint(nil, "10.0.0.6:80")},
		{"waypoint not there", client, "10.1.0.7:80", Decision{Action: Refuse, Service: svc("lost"), Waypoint: true, Why: NoWaypoint}},
		{"a waypoint does not go through itself", wl("waypoint"), "10.0.0.6:80", Decision{Action: HBONE, NextHop: addr("10.0.0.6:15008"),
			Target: addr("10.0.0.6:80"), Authority: "10.0.0.6:80", Destination: wl("guarded"), Expected: []mesh.Identity{identity("guarded")}}},
		{"service without endpoints that others vouch for", client, "10.1.0.13:80", Decision{Action: Refuse, Service: svc("vouched"), Why: NoEndpoint}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := Outbound(snap, tc.source, addr(tc.dst), 0)
			if diff := cmp.Diff(tc.want, got, cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{})); diff != "" {
				t.Errorf("decision (-want +got):\n%s", diff)
			}
		})
	}
}

func TestExpectedIdentitiesOfAService(t *testing.T) {
	s := &mesh.Service{SubjectAltNames: []string{"spiffe://cluster.local/ns/vm/sa/a", "bad"}}
	want := []mesh.Identity{identity("web"), {TrustDomain: "cluster.local", Namespace: "vm", ServiceAccount: "a"}}
	if diff := cmp.Diff(want, expected(pod("web", nil), s)); diff != "" {
		t.Errorf("expected identities (-want +got):\n%s", diff)
	}
}

func TestInbound(t *testing.T) {
	self := pod("web", nil, "10.0.0.1", "fd00::1")
	local := netip.MustParseAddr("10.0.0.1")
	for _, tc := range []struct {
		authority string
		action    Action
		why       Why
	}{
		{"10.0.0.1:80", Deliver, Granted},
		{"[::ffff:10.0.0.1]:80", Deliver, Granted},
		{"[fd00::1]:80", Deliver, Granted},
		{"10.0.0.2:80", Refuse, NotThisWorkload},
		{"127.0.0.1:80", Refuse, NotThisWorkload},
		{"10.0.0.1", Refuse, BadAuthority},
		{"10.0.0.1:0", Refuse, BadAuthority},
		{"web.shop.svc.cluster.local:80", Refuse, BadAuthority},
		{"", Refuse, BadAuthority},
	} {
		t.Run(tc.authority, func(t *testing.T) {
			got := Inbound(self, local, tc.authority)
			if got.Action != tc.action || got.Why != tc.why {
				t.Errorf("%v because %q, want %v because %q", got.Action, got.Why, tc.action, tc.why)
			}
		})
	}
}
