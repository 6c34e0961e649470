package netns

import (
	"maps"
	"testing"

	"github.com/fairlead-mesh/fairlead/tests/netns/lab"
)

const split = `apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {namespace: shop, name: orders}
spec:
  parentRefs: [{group: "", kind: Service, name: orders, port: 80}]
  rules:
  - backendRefs:
    - {name: orders-v1, port: 80, weight: 90}
    - {name: orders-v2, port: 80, weight: 10}
`

const onlyGet = `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {namespace: shop, name: only-get}
spec:
  targetRefs: [{group: "", kind: Service, name: orders}]
  action: ALLOW
  rules:
  - to: [{operation: {methods: [GET]}}]
`

func (f *fixture) http(method string, count int) lab.Call {
	return lab.Call{
		To: f.orders.Addr(lab.ServicePortHTTP, false), HTTP: true, Method: method, Host: "orders.shop", Count: count,
		SameConnection: true, Size: 500,
	}
}

// enrolWaypoint makes a waypoint and sends the namespace's services through it.
func (f *fixture) enrolWaypoint() *lab.Pod {
	f.t.Helper()
	pod, err := f.Waypoint(f.ctx, shop, "waypoint", 0)
	f.must(err)
	f.useWaypoint()
	return pod
}

func (f *fixture) useWaypoint() {
	f.t.Helper()
	labels := maps.Clone(ambient)
	labels["istio.io/use-waypoint"] = "waypoint"
	f.must(f.Namespace(shop, labels))
}

// mustBeThroughWaypoint wants what a call took to be a way through the waypoint, as the client's proxy says and the
// server's has counted; the waypoint's own connections stay open, and have no line in a log yet.
func (f *fixture) mustBeThroughWaypoint(o lab.Observation) {
	f.t.Helper()
	const waypoint = "spiffe://cluster.local/ns/shop/sa/waypoint"
	if o.Outbound == nil || o.Outbound.Path != "waypoint" || o.Outbound.DestinationIdentity != waypoint {
		f.t.Errorf("the client's proxy logged %+v, want the waypoint's path and identity", o.Outbound)
	}
	n, err := f.Nodes[1].Accepted(f.ctx, waypoint, f.v1.Identity())
	f.must(err)
	if n == 0 {
		f.t.Error("the server's proxy has not let the waypoint in")
	}
}

func TestWaypointSplitsAndAuthorizes(t *testing.T) {
	const count = 2000
	f := newFixture(t, ambient)
	f.service("orders-v1", map[string]string{"app": "orders", "version": "v1"})
	f.service("orders-v2", map[string]string{"app": "orders", "version": "v2"})
	f.must(f.Apply("split", split))
	f.must(f.Apply("only-get", onlyGet))

	// The control: nothing at layer 7 without a waypoint.
	f.until(f.web, f.http("POST", 1), lab.Answer.OK)
	if o := f.observe(f.web, f.http("GET", 1), 2); o.Outbound == nil || o.Outbound.Path != "hbone" {
		t.Errorf("without a waypoint the client's proxy logged %+v", o.Outbound)
	}

	f.enrolWaypoint()
	f.until(f.web, f.http("POST", 1), func(a lab.Answer) bool { return a.Last().Status == 403 })
	if body := f.call(f.web, f.http("POST", 1)).Last().Body; body != "RBAC: access denied" {
		t.Errorf("body of the refusal: %q", body)
	}
	o := f.observe(f.web, f.http("GET", count), 1)
	if !o.Answer.OK() || len(o.Answer.Attempts) != count {
		t.Fatalf("%d requests: %s", count, o.Answer)
	}
	if o.Wire.Clear != 0 || o.Wire.Markers != 0 || o.Wire.Tunnel == 0 {
		t.Errorf("captured %+v, want all in the tunnel", o.Wire)
	}
	f.mustBeThroughWaypoint(o)
	// Six standard deviations of 2,000 draws with a chance of one in ten are 80.
	if n := o.Answer.Servers()[f.v2.Name]; n < 120 || n > 280 {
		t.Errorf("v2 answered %d of %d requests, want a tenth", n, count)
	}
}

// TestWaypointThatIsAwayFailsClosed: a service that asks for a waypoint is not reached past it.
func TestWaypointThatIsAwayFailsClosed(t *testing.T) {
	f := newFixture(t, ambient)
	f.until(f.web, f.http("GET", 1), lab.Answer.OK)
	f.useWaypoint() // there is none
	f.until(f.web, f.http("GET", 1), lab.Answer.Failed)

	waypoint, err := f.Waypoint(f.ctx, shop, "waypoint", 0)
	f.must(err)
	f.until(f.web, f.http("GET", 1), lab.Answer.OK)
	f.must(f.RemovePod(f.ctx, waypoint))
	f.until(f.web, f.http("GET", 1), lab.Answer.Failed)
	f.mustAnswer(f.web, tcp(f.v1)) // calls to pods do not go through it
}
