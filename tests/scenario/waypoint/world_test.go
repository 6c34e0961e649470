// Package waypoint drives a whole waypoint process over loopback: configured by translated Kubernetes objects through a
// real xDS server, certified by a real certificate service, called and answered over HBONE.
package waypoint

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"go.uber.org/zap"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/anypb"
	ca "istio.io/api/security/v1alpha1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	"sigs.k8s.io/yaml"

	"github.com/fairlead-mesh/fairlead/internal/hbone"
	"github.com/fairlead-mesh/fairlead/internal/identity"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/testenv"
	"github.com/fairlead-mesh/fairlead/internal/xds"
	"github.com/fairlead-mesh/fairlead/istiod-lite/translate"
	"github.com/fairlead-mesh/fairlead/waypoint"
)

const scope = "shop/gate"

// world is one waypoint and what is around it.
type world struct {
	t       *testing.T
	ctx     context.Context
	ca      *identity.SelfSigned
	certs   *identity.Certificates
	xds     *xds.Server
	input   translate.WaypointInput
	pool    *hbone.Pool
	address netip.AddrPort // of the waypoint's tunnels
	admin   string
	stats   string
	hbone   uint16 // port that endpoints' proxies listen on
	pods    byte
}

func newWorld(t *testing.T) *world {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	self, err := identity.NewSelfSigned("cluster.local", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, ctx: ctx, ca: self, certs: identity.NewCertificates(ctx, self, zap.NewNop()),
		pool: hbone.NewPool(hbone.PoolConfig{}), hbone: netip.MustParseAddrPort(testenv.FreeAddr(t)).Port()}
	w.input.Gateway = &gatewayv1.Gateway{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "gate", UID: "u"},
		Spec: gatewayv1.GatewaySpec{GatewayClassName: "istio-waypoint",
			Listeners: []gatewayv1.Listener{{Name: "mesh", Port: 15008, Protocol: "HBONE"}}}}
	w.xds = xds.NewServer(xds.ServerConfig{Log: zap.NewNop(), Order: []string{translate.ClusterType, translate.EndpointType, translate.ListenerType, translate.RouteType},
		Scope: func(_ context.Context, node *core.Node, _ string) (string, error) {
			m := node.GetMetadata().GetFields()
			return m["NAMESPACE"].GetStringValue() + "/" + m["GATEWAY_NAME"].GetStringValue(), nil
		}})
	server := grpc.NewServer(xds.ServerOptions()...)
	discovery.RegisterAggregatedDiscoveryServiceServer(server, w.xds)
	gate := mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "gate"}
	ca.RegisterIstioCertificateServiceServer(server, identity.NewServer(identity.ServerConfig{
		Authenticator: caller{gate}, Authority: self, Log: zap.NewNop()}))
	ln := listen(t, "127.0.0.1:0")
	go func() { _ = server.Serve(ln) }()

	control := identity.ControlPlane{Address: "http://" + ln.Addr().String()}
	cfg := waypoint.Config{GatewayName: "gate", PodName: "gate-0", PodNamespace: "shop", ServiceAccount: "gate", ClusterID: "Kubernetes",
		TrustDomain: "cluster.local", XDS: control, CA: control, HBONEAddr: testenv.FreeAddr(t), StatsAddr: testenv.FreeAddr(t),
		ReadinessAddr: testenv.FreeAddr(t), AdminAddr: testenv.FreeAddr(t),
		HBONEPort: w.hbone, TerminationGrace: time.Second, LogLevel: "error"}
	w.address, w.admin, w.stats = netip.MustParseAddrPort(cfg.HBONEAddr), cfg.AdminAddr, cfg.StatsAddr
	done := make(chan error, 1)
	running, stop := context.WithCancel(context.Background())
	go func() { done <- waypoint.Run(running, cfg) }()
	t.Cleanup(func() {
		w.pool.Close()
		stop()
		if err := <-done; err != nil {
			t.Errorf("waypoint ended: %v", err)
		}
		server.Stop()
		cancel()
		w.certs.Wait()
	})
	w.push()
	w.eventually("the waypoint is ready", func() bool {
		resp, err := http.Get("http://" + cfg.ReadinessAddr + "/healthz/ready")
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
	return w
}

// caller authenticates everybody as one identity.
type caller struct{ id mesh.Identity }

func (c caller) Authenticate(context.Context) (identity.Caller, error) {
	return identity.Caller{Identity: c.id}, nil
}

func listen(t *testing.T, address string) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

func (w *world) eventually(what string, ok func() bool) {
	w.t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
	}
	w.t.Fatalf("not in 10 s: %s", what)
}

// push translates the input and sends it.
func (w *world) push() translate.WaypointOutput {
	w.t.Helper()
	out := translate.Waypoint(w.input)
	w.input.Previous = out.Memory
	resources, err := out.Resources()
	if err != nil {
		w.t.Fatal(err)
	}
	w.send(resources)
	return out
}

func (w *world) send(all map[string]map[string]*anypb.Any) {
	for typeURL, byName := range all {
		var list []xds.Resource
		for name, body := range byName {
			list = append(list, xds.Resource{Name: name, Body: body})
		}
		w.xds.Set(typeURL, scope, list)
	}
}

// settled waits until the waypoint has answered everything sent.
func (w *world) settled() {
	w.t.Helper()
	time.Sleep(30 * time.Millisecond) // the server gathers changes for a while
	w.eventually("all pushes answered", func() bool {
		for _, c := range w.xds.Clients() {
			for _, s := range c.Types {
				if s.Pending {
					return false
				}
			}
		}
		return true
	})
}

// update pushes and waits for it to be in force.
func (w *world) update() translate.WaypointOutput {
	w.t.Helper()
	out := w.push()
	w.settled()
	return out
}

// rejected are the texts of nacks.
func (w *world) rejected() string {
	var out []string
	for _, c := range w.xds.Clients() {
		for _, s := range c.Types {
			if s.Rejected != "" {
				out = append(out, s.Rejected)
			}
		}
	}
	return strings.Join(out, "; ")
}

func (w *world) route(text string) {
	w.input.HTTPRoutes = append(w.input.HTTPRoutes, parse[gatewayv1.HTTPRoute](w.t, text))
}

func (w *world) policy(text string) {
	w.input.Policies = append(w.input.Policies, parse[securityv1.AuthorizationPolicy](w.t, text))
}

func parse[T any](t *testing.T, text string) *T {
	t.Helper()
	o := new(T)
	if err := yaml.UnmarshalStrict([]byte(text), o); err != nil {
		t.Fatal(err)
	}
	return o
}

// service adds a service of one port to the world. It is attached to the waypoint unless backend is set.
func (w *world) service(name, vip, portName string, port uint16, backend bool, pods ...*pod) {
	s := translate.WaypointService{
		Service: &mesh.Service{Name: name, Namespace: "shop", Hostname: name + ".shop.svc.cluster.local",
			Addresses: []mesh.NetworkAddress{{Address: netip.MustParseAddr(vip)}}, Ports: []mesh.Port{{ServicePort: port, TargetPort: 8080}}},
		Object: &corev1.Service{Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Name: portName, Port: int32(port)}}}},
	}
	for _, p := range pods {
		p.workload.Services = map[mesh.NamespacedHostname][]mesh.Port{s.Service.Key(): {{ServicePort: port, TargetPort: 8080}}}
		s.Endpoints = append(s.Endpoints, p.workload)
	}
	if backend {
		w.input.Backends = append(w.input.Backends, s)
	} else {
		w.input.Services = append(w.input.Services, s)
	}
}

// pod is an endpoint behind an HBONE server of its own, or for protocol none a plain TCP one.
type pod struct {
	workload *mesh.Workload
	mu       sync.Mutex
	connects []connect
	requests []*http.Request
}

// connect is a CONNECT that a pod's proxy was asked for.
type connect struct {
	peer      mesh.Identity
	authority string
	source    string
}

func (w *world) workload(name string, protocol mesh.Protocol) *mesh.Workload {
	w.pods++
	return &mesh.Workload{UID: "Kubernetes//Pod/shop/" + name, Name: name, Namespace: "shop", ServiceAccount: name, WorkloadName: name,
		CanonicalName: name, CanonicalRevision: "latest", ClusterID: "Kubernetes", Protocol: protocol, Healthy: true,
		Addresses: []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 9, w.pods})}}
}

// httpPod answers requests by handler.
func (w *world) httpPod(name string, handler http.Handler) *pod {
	p := &pod{workload: w.workload(name, mesh.ProtocolHBONE)}
	server := w.httpServer(p, handler)
	w.tunnelled(p, p.workload.Identity(), func(in *hbone.Incoming) {
		s, err := in.Accept()
		if err != nil {
			return
		}
		server <- s
	})
	return p
}

// httpServer serves the connections put in its channel, HTTP/1 and HTTP/2.
func (w *world) httpServer(p *pod, handler http.Handler) chan<- net.Conn {
	conns := newQueue()
	protocols := &http.Protocols{}
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	server := &http.Server{Protocols: protocols, Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		p.requests = append(p.requests, r)
		p.mu.Unlock()
		handler.ServeHTTP(rw, r)
	})}
	go func() { _ = server.Serve(conns) }()
	w.t.Cleanup(func() { server.Close() })
	return conns.conns
}

// queue is a listener whose connections are put in by the test.
type queue struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newQueue() *queue { return &queue{conns: make(chan net.Conn), closed: make(chan struct{})} }

func (q *queue) Accept() (net.Conn, error) {
	select {
	case c := <-q.conns:
		return c, nil
	case <-q.closed:
		return nil, net.ErrClosed
	}
}

func (q *queue) Close() error {
	q.once.Do(func() { close(q.closed) })
	return nil
}

func (q *queue) Addr() net.Addr { return &net.TCPAddr{} }

// tunnelled runs the HBONE server of a pod, proving id.
func (w *world) tunnelled(p *pod, id mesh.Identity, handle func(*hbone.Incoming)) {
	tlsConfig := identity.ServerTLS(w.ctx, w.certs, id)
	server := hbone.NewServer(hbone.ServerConfig{
		TLS: func(_ context.Context, hello *tls.ClientHelloInfo) (*tls.Config, error) {
			return tlsConfig.GetConfigForClient(hello)
		},
		Handle: func(in *hbone.Incoming) {
			peer, err := identity.FromTLS(*in.Peer)
			if err != nil {
				w.t.Error(err)
			}
			p.mu.Lock()
			p.connects = append(p.connects, connect{peer, in.Authority, in.Get("x-istio-source")})
			p.mu.Unlock()
			handle(in)
		}})
	ln := listen(w.t, netip.AddrPortFrom(p.workload.Addresses[0], w.hbone).String())
	go func() { _ = server.Serve(w.ctx, ln) }()
	w.t.Cleanup(server.Close)
}

// dial opens a stream to the waypoint as a client pod's proxy would.
func (w *world) dial(account, authority string) (*hbone.Stream, error) {
	id := mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: account}
	gate := mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "gate"}
	return w.pool.Open(w.ctx, hbone.Key{Source: id.String(), Destination: gate.String(), Addr: w.address},
		func(ctx context.Context) (net.Conn, *tls.Config, error) {
			bundle, err := w.certs.Certificate(ctx, id)
			if err != nil {
				return nil, nil, err
			}
			c, err := (&net.Dialer{}).DialContext(ctx, "tcp", w.address.String())
			return c, identity.ClientTLS(bundle, []mesh.Identity{gate}), err
		},
		hbone.Request{Authority: authority, Header: []hpack.HeaderField{
			{Name: "baggage", Value: "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=" + account + ",service.name=" + account},
			{Name: "forwarded", Value: `for="10.9.9.9:4711"`}}})
}

// client is an HTTP client whose every connection is a stream to one authority.
func (w *world) client(account, authority string, http2 bool) *http.Client {
	protocols := &http.Protocols{}
	protocols.SetHTTP1(!http2)
	protocols.SetUnencryptedHTTP2(http2)
	transport := &http.Transport{Protocols: protocols, DialContext: func(context.Context, string, string) (net.Conn, error) {
		s, err := w.dial(account, authority)
		if err != nil {
			return nil, err
		}
		return s, nil
	}}
	w.t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 10 * time.Second,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

type answer struct {
	status int
	body   string
	header http.Header
}

// do sends one request and reads the whole response.
func (w *world) do(c *http.Client, method, url, body string, header ...string) answer {
	w.t.Helper()
	var content io.Reader
	if body != "" {
		content = strings.NewReader(body)
	}
	req, err := http.NewRequestWithContext(w.ctx, method, url, content)
	if err != nil {
		w.t.Fatal(err)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Add(header[i], header[i+1])
	}
	resp, err := c.Do(req)
	if err != nil {
		w.t.Fatalf("%s %s: %v", method, url, err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		w.t.Fatalf("%s %s: read: %v", method, url, err)
	}
	return answer{resp.StatusCode, string(got), resp.Header}
}

// says answers every request with its name, and tells what it was asked.
func says(name string) http.Handler {
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		rw.Header().Set("X-Pod", name)
		fmt.Fprintf(rw, "%s %s %s %s", name, r.Method, r.URL.RequestURI(), body)
	})
}

// dump is the waypoint's /config_dump.
func (w *world) dump() map[string]any {
	w.t.Helper()
	resp, err := http.Get("http://" + w.admin + "/config_dump")
	if err != nil {
		w.t.Fatal(err)
	}
	defer resp.Body.Close()
	var out map[string]any
	if err := json.NewDecoder(resp.Body).Decode(&out); err != nil {
		w.t.Fatal(err)
	}
	return out
}

// metric finds the lines of the waypoint's metrics that contain all of parts.
func (w *world) metric(parts ...string) []string {
	w.t.Helper()
	resp, err := http.Get("http://" + w.stats + "/metrics")
	if err != nil {
		w.t.Fatal(err)
	}
	defer resp.Body.Close()
	all, err := io.ReadAll(resp.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	var out []string
	for line := range bytes.Lines(all) {
		match := true
		for _, p := range parts {
			match = match && bytes.Contains(line, []byte(p))
		}
		if match {
			out = append(out, strings.TrimSpace(string(line)))
		}
	}
	return out
}
