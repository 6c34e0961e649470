package waypoint

import (
	"errors"
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/anypb"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"

	"github.com/fairlead-mesh/fairlead/internal/hbone"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/istiod-lite/translate"
)

func TestServiceWithoutRoutes(t *testing.T) {
	w := newWorld(t)
	v1 := w.httpPod("v1", says("v1"))
	w.service("web", "10.96.0.1", "http", 80, false, v1)
	w.update()
	for _, authority := range []string{"10.96.0.1:80", "web.shop.svc.cluster.local:80"} {
		for _, http2 := range []bool{false, true} {
			got := w.do(w.client("client", authority, http2), "POST", "http://web/a%2Fb?q=1&q=2;", "hello")
			if got.status != 200 || got.body != "v1 POST /a%2Fb?q=1&q=2; hello" {
				t.Errorf("%s, http2 %v: %d %q", authority, http2, got.status, got.body)
			}
		}
	}
	v1.mu.Lock()
	defer v1.mu.Unlock()
	want := connect{peer: mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "gate"},
		authority: v1.workload.Addresses[0].String() + ":8080", source: "waypoint"}
	if diff := cmp.Diff(want, v1.connects[0], cmp.AllowUnexported(connect{})); diff != "" {
		t.Errorf("CONNECT at the endpoint (-want +got):\n%s", diff)
	}
	for _, r := range v1.requests {
		if r.Host != "web" || r.Header.Get("X-Request-Id") == "" || r.Header.Get("X-Forwarded-Proto") != "http" {
			t.Errorf("request at the endpoint: host %q, header %v", r.Host, r.Header)
		}
	}
	if lines := w.metric("istio_requests_total{", `reporter="waypoint"`, `response_code="200"`, `source_workload="client"`,
		`source_principal="spiffe://cluster.local/ns/shop/sa/client"`, `destination_workload="v1"`,
		`destination_service="web.shop.svc.cluster.local"`); len(lines) != 2 {
		t.Errorf("istio_requests_total: want a line for http and one for http2, got %q", lines)
	}
}

const splitRoute = `
metadata: {name: split, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: web}]
  rules:
  - backendRefs: [{name: v1, port: 80, weight: 90}, {name: v2, port: 80, weight: 10}]
`

func TestWeights(t *testing.T) {
	w := newWorld(t)
	v1, v2 := w.httpPod("v1", says("v1")), w.httpPod("v2", says("v2"))
	w.service("web", "10.96.0.1", "http", 80, false, w.httpPod("web", says("web")))
	w.service("v1", "10.96.0.2", "http", 80, true, v1)
	w.service("v2", "10.96.0.3", "http", 80, true, v2)
	w.route(splitRoute)
	w.update()
	c := w.client("client", "10.96.0.1:80", false)
	counts := map[string]int{}
	for range 2000 {
		counts[w.do(c, "GET", "http://web/", "").header.Get("X-Pod")]++
	}
	// 10 % of 2,000 is 200, with a standard deviation of 13.4: five of them either way.
	if counts["v2"] < 133 || counts["v2"] > 267 || counts["v1"]+counts["v2"] != 2000 {
		t.Errorf("90/10 of 2000: %v", counts)
	}
}

func TestRoutes(t *testing.T) {
	w := newWorld(t)
	w.service("web", "10.96.0.1", "", 80, false, w.httpPod("web", says("web")))
	w.service("v2", "10.96.0.3", "http", 80, true, w.httpPod("v2", says("v2")))
	w.service("gone", "10.96.0.4", "http", 80, true)
	w.route(`
metadata: {name: all, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: web}]
  rules:
  - matches: [{path: {type: PathPrefix, value: /api}}]
    backendRefs: [{name: web, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /api/v2}}, {path: {type: PathPrefix, value: /api}, headers: [{name: X-Version, value: "2"}]}]
    backendRefs:
    - name: v2
      port: 80
      filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: x-backend, value: v2}]}}]
    filters:
    - {type: ResponseHeaderModifier, responseHeaderModifier: {add: [{name: x-route, value: "50%"}], remove: [x-pod]}}
  - matches: [{path: {type: PathPrefix, value: /old}}]
    filters: [{type: RequestRedirect, requestRedirect: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /new}, statusCode: 301}}]
  - matches: [{path: {type: PathPrefix, value: /strip}}]
    filters: [{type: URLRewrite, urlRewrite: {hostname: other.example, path: {type: ReplacePrefixMatch, replacePrefixMatch: /}}}]
    backendRefs: [{name: web, port: 80}]
  - matches: [{path: {type: Exact, value: /full}}]
    filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath, replaceFullPath: /else}}}]
    backendRefs: [{name: web, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /gone}}]
    backendRefs: [{name: gone, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /nobody}}]
    backendRefs: [{name: nobody, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /slow}}]
    timeouts: {request: 50ms}
    backendRefs: [{name: slow, port: 80}]
`)
	w.service("slow", "10.96.0.5", "http", 80, true, w.httpPod("slow", http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		<-r.Context().Done()
	})))
	w.update()
	c := w.client("client", "10.96.0.1:80", false)
	for _, tc := range []struct {
		path, header string
		status       int
		body         string
	}{
		{"/api", "", 200, "web GET /api "},
		{"/api/v1?x=y", "", 200, "web GET /api/v1?x=y "},
		{"/api/v2/x", "", 200, "v2 GET /api/v2/x "},
		{"/api/x", "2", 200, "v2 GET /api/x "},
		{"/apis", "", 404, ""},
		{"/api/../secret", "", 404, ""},
		{"/%61pi", "", 200, "web GET /api "},
		{"/strip/a/b", "", 200, "web GET /a/b "},
		{"/strip", "", 200, "web GET / "},
		{"/full", "", 200, "web GET /else "},
		{"/old/x?y=1", "", 301, ""},
		{"/gone", "", 503, "no healthy upstream"},
		{"/nobody", "", 500, ""},
		{"/slow", "", 504, "upstream request timeout"},
	} {
		var header []string
		if tc.header != "" {
			header = []string{"x-version", tc.header}
		}
		got := w.do(c, "GET", "http://web"+tc.path, "", header...)
		if got.status != tc.status || got.body != tc.body {
			t.Errorf("%s: %d %q, want %d %q", tc.path, got.status, got.body, tc.status, tc.body)
		}
		switch tc.path {
		case "/old/x?y=1":
			if l := got.header.Get("Location"); l != "http://web/new/x?y=1" {
				t.Errorf("Location = %q", l)
			}
		case "/api/v2/x":
			if got.header.Get("X-Route") != "50%" || got.header.Get("X-Pod") != "" {
				t.Errorf("response header %v", got.header)
			}
		}
	}
}

func TestAuthorization(t *testing.T) {
	w := newWorld(t)
	w.service("web", "10.96.0.1", "http", 80, false, w.httpPod("web", says("web")))
	w.policy(`
metadata: {name: reads, namespace: shop}
spec:
  targetRefs: [{kind: Service, group: "", name: web}]
  rules:
  - from: [{source: {principals: [cluster.local/ns/shop/sa/client]}}]
    to: [{operation: {methods: [GET, HEAD]}}]
  - from: [{source: {principals: [cluster.local/ns/shop/sa/writer]}}]
`)
	w.policy(`
metadata: {name: no-admin, namespace: shop}
spec:
  action: DENY
  targetRefs: [{kind: Gateway, group: gateway.networking.k8s.io, name: gate}]
  rules:
  - to: [{operation: {paths: ["/admin", "/admin/*"]}}]
    when: [{key: "request.headers[x-break-glass]", notValues: ["yes"]}]
`)
	w.update()
	for _, tc := range []struct {
		account, method, path, glass string
		status                       int
	}{
		{"client", "GET", "/", "", 200},
		{"client", "POST", "/", "", 403},
		{"writer", "POST", "/", "", 200},
		{"stranger", "GET", "/", "", 403},
		{"writer", "GET", "/admin", "", 403},
		{"writer", "GET", "/admin/x", "", 403},
		{"writer", "GET", "/./%61dmin/x", "", 403},
		{"writer", "GET", "/a/..//admin/x", "", 200}, // another path: doubled slashes stay
		{"writer", "GET", "/a/../admin/x", "", 403},
		{"writer", "GET", "/admin", "yes", 200},
		{"writer", "GET", "/administrator", "", 200},
	} {
		for _, http2 := range []bool{false, true} {
			body := ""
			if tc.method == "POST" {
				body = "x"
			}
			var header []string
			if tc.glass != "" {
				header = []string{"x-break-glass", tc.glass}
			}
			got := w.do(w.client(tc.account, "10.96.0.1:80", http2), tc.method, "http://web"+tc.path, body, header...)
			if got.status != tc.status || (tc.status == 403 && got.body != "RBAC: access denied") {
				t.Errorf("%s %s %s (http2 %v): %d %q, want %d", tc.account, tc.method, tc.path, http2, got.status, got.body, tc.status)
			}
		}
	}
	// A change reaches connections that are open.
	c := w.client("client", "10.96.0.1:80", false)
	if got := w.do(c, "GET", "http://web/", ""); got.status != 200 {
		t.Fatalf("before: %d", got.status)
	}
	w.policy(`
metadata: {name: nobody, namespace: shop}
spec: {action: DENY, targetRefs: [{kind: Gateway, group: gateway.networking.k8s.io, name: gate}], rules: [{}]}
`)
	w.update()
	if got := w.do(c, "GET", "http://web/", ""); got.status != 403 {
		t.Errorf("after a DENY: %d", got.status)
	}
}

func TestUnknownIsRefused(t *testing.T) {
	w := newWorld(t)
	w.service("web", "10.96.0.1", "http", 80, false, w.httpPod("web", says("web")))
	w.update()
	for _, authority := range []string{"10.96.0.2:80", "10.96.0.1:81", "web.other.svc.cluster.local:80", "no authority"} {
		var refused *hbone.StatusError
		s, err := w.dial("client", authority)
		if !errors.As(err, &refused) || (refused.Code != 404 && refused.Code != 400) {
			t.Errorf("%s: %v, %v", authority, s, err)
		}
	}
}

func TestRetriesWhereNothingWasSent(t *testing.T) {
	w := newWorld(t)
	good := w.httpPod("good", says("good"))
	dead := &pod{workload: w.workload("dead", mesh.ProtocolHBONE)}       // nobody listens
	refuses := &pod{workload: w.workload("refuses", mesh.ProtocolHBONE)} // its application does not
	w.tunnelled(refuses, refuses.workload.Identity(), func(in *hbone.Incoming) { in.Reject(503, "connection refused") })
	w.service("web", "10.96.0.1", "http", 80, false, good, dead, refuses)
	w.update()
	for i := range 20 {
		c := w.client("client", "10.96.0.1:80", i%2 == 0)
		if got := w.do(c, "POST", "http://web/", "payload"); got.status != 200 || got.body != "good POST / payload" {
			t.Errorf("%d: %d %q", i, got.status, got.body)
		}
	}
}

func TestEndpointMustProveItsIdentity(t *testing.T) {
	w := newWorld(t)
	liar := &pod{workload: w.workload("honest", mesh.ProtocolHBONE)}
	w.tunnelled(liar, mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "liar"}, func(in *hbone.Incoming) {
		t.Error("a request reached the wrong identity")
	})
	w.service("web", "10.96.0.1", "http", 80, false, liar)
	w.update()
	if got := w.do(w.client("client", "10.96.0.1:80", false), "GET", "http://web/", ""); got.status != 503 {
		t.Errorf("%d %q", got.status, got.body)
	}
}

func TestPlainEndpoint(t *testing.T) {
	w := newWorld(t)
	p := &pod{workload: w.workload("plain", mesh.ProtocolNone)}
	ln := listen(t, p.workload.Addresses[0].String()+":8080")
	server := w.httpServer(p, says("plain"))
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			server <- c
		}
	}()
	w.service("web", "10.96.0.1", "http", 80, false, p)
	w.update()
	if got := w.do(w.client("client", "10.96.0.1:80", false), "GET", "http://web/", ""); got.body != "plain GET / " {
		t.Errorf("%d %q", got.status, got.body)
	}
}

func TestWorkloadItself(t *testing.T) {
	w := newWorld(t)
	p := w.httpPod("web", says("web"))
	w.input.Workloads = []*mesh.Workload{p.workload}
	w.policy(`
metadata: {name: reads, namespace: shop}
spec: {targetRefs: [{kind: Gateway, group: gateway.networking.k8s.io, name: gate}], rules: [{to: [{operation: {methods: [GET]}}]}]}
`)
	w.update()
	c := w.client("client", p.workload.Addresses[0].String()+":9090", false)
	if got := w.do(c, "GET", "http://web/", ""); got.body != "web GET / " {
		t.Errorf("%d %q", got.status, got.body)
	}
	if got := w.do(c, "POST", "http://web/", ""); got.status != 403 {
		t.Errorf("%d %q", got.status, got.body)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if got, want := p.connects[0].authority, p.workload.Addresses[0].String()+":9090"; got != want {
		t.Errorf("authority at the endpoint = %q, want %q", got, want)
	}
}

// What cannot be understood is refused, and what was in force stays.
func TestBadConfigurationKeepsTheOld(t *testing.T) {
	w := newWorld(t)
	w.service("web", "10.96.0.1", "http", 80, false, w.httpPod("web", says("web")))
	out := w.update()
	c := w.client("client", "10.96.0.1:80", false)
	works := func(when string) {
		t.Helper()
		if got := w.do(c, "GET", "http://web/", ""); got.status != 200 {
			t.Errorf("%s: %d %q", when, got.status, got.body)
		}
	}
	works("before")

	name := "inbound-vip|80|http|web.shop.svc.cluster.local"
	bad, err := anypb.New(&routev3.RouteConfiguration{Name: name, VirtualHosts: []*routev3.VirtualHost{{Name: "x", Domains: []string{"*"},
		Routes: []*routev3.Route{{Match: &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{Regex: "("}}},
			Action: &routev3.Route_DirectResponse{DirectResponse: &routev3.DirectResponseAction{Status: 418}}}}}}})
	if err != nil {
		t.Fatal(err)
	}
	w.send(map[string]map[string]*anypb.Any{translate.RouteType: {name: bad}})
	w.settled()
	if got := w.rejected(); !strings.Contains(got, name) || !strings.Contains(got, "missing closing )") {
		t.Errorf("nack = %q", got)
	}
	works("after a route table that does not parse")

	// A listener that names a route table which never comes.
	next := w.input
	next.Services = append(next.Services[:1:1], translate.WaypointService{Service: &mesh.Service{Name: "api", Namespace: "shop",
		Hostname: "api.shop.svc.cluster.local", Addresses: next.Services[0].Service.Addresses, Ports: []mesh.Port{{ServicePort: 80}}}})
	resources, err := translate.Waypoint(next).Resources()
	if err != nil {
		t.Fatal(err)
	}
	w.send(map[string]map[string]*anypb.Any{translate.ListenerType: resources[translate.ListenerType]})
	w.settled()
	if lacks := w.dump()["resources"].(map[string]any)["not_in_force"]; lacks == nil {
		t.Error("the dump does not say that the newest configuration is not in force")
	}
	works("after a listener that lacks its routes")

	good, err := out.Resources()
	if err != nil {
		t.Fatal(err)
	}
	w.send(good)
	w.settled()
	if got := w.rejected(); got != "" {
		t.Errorf("nack after recovery = %q", got)
	}
	works("after recovery")
}

// An object that becomes invalid stays in force as it was, and says so.
func TestInvalidObjectsStayInForce(t *testing.T) {
	w := newWorld(t)
	w.service("web", "10.96.0.1", "http", 80, false, w.httpPod("web", says("web")))
	w.policy(`
metadata: {name: reads, namespace: shop}
spec: {targetRefs: [{kind: Service, group: "", name: web}], rules: [{to: [{operation: {methods: [GET]}}]}]}
`)
	w.route(`
metadata: {name: only, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: web}]
  rules: [{matches: [{path: {type: PathPrefix, value: /a}}], backendRefs: [{name: web, port: 80}]}]
`)
	w.update()
	w.input.Policies, w.input.HTTPRoutes = nil, nil
	w.policy(`
metadata: {name: reads, namespace: shop, generation: 2}
spec: {targetRefs: [{kind: Service, group: "", name: web}], rules: [{from: [{source: {ipBlocks: [nonsense]}}]}]}
`)
	w.route(`
metadata: {name: only, namespace: shop, generation: 2}
spec:
  parentRefs: [{group: "", kind: Service, name: web}]
  rules: [{matches: [{path: {type: RegularExpression, value: "("}}], backendRefs: [{name: web, port: 80}]}]
`)
	out := w.update()
	conditions := map[string]translate.WaypointCondition{}
	for _, c := range out.Conditions {
		conditions[c.Kind+" "+c.Type] = c
	}
	if c := conditions["AuthorizationPolicy WaypointAccepted"]; c.Status || c.Generation != 2 ||
		!strings.Contains(c.Message, `rules[0].from[0].source.ipBlocks[0] "nonsense" is neither`) || !strings.Contains(c.Message, "stays in force") {
		t.Errorf("policy condition: %+v", c)
	}
	if c := conditions["HTTPRoute Accepted"]; c.Status || !strings.Contains(c.Message, "rules[0].matches[0]") {
		t.Errorf("route condition: %+v", c)
	}
	c := w.client("client", "10.96.0.1:80", false)
	for _, tc := range []struct {
		method, path string
		status       int
	}{{"GET", "/a", 200}, {"POST", "/a", 403}, {"GET", "/b", 404}} {
		if got := w.do(c, tc.method, "http://web"+tc.path, ""); got.status != tc.status {
			t.Errorf("%s %s: %d, want %d", tc.method, tc.path, got.status, tc.status)
		}
	}
}
