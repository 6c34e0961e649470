package waypoint

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/fairlead-mesh/fairlead/internal/hbone"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

func TestGRPC(t *testing.T) {
	w := newWorld(t)
	server := grpc.NewServer()
	service := health.NewServer()
	service.SetServingStatus("shop", healthpb.HealthCheckResponse_SERVING)
	healthpb.RegisterHealthServer(server, service)
	p := &pod{workload: w.workload("health", mesh.ProtocolHBONE)}
	conns := newQueue()
	go func() { _ = server.Serve(conns) }()
	t.Cleanup(server.Stop)
	w.tunnelled(p, p.workload.Identity(), func(in *hbone.Incoming) {
		if s, err := in.Accept(); err == nil {
			conns.conns <- s
		}
	})
	w.service("health", "10.96.0.1", "grpc", 50051, false, p)
	w.policy(`
metadata: {name: no-strangers, namespace: shop}
spec:
  action: DENY
  targetRefs: [{kind: Service, group: "", name: health}]
  rules: [{from: [{source: {serviceAccounts: [shop/stranger]}}]}]
`)
	w.update()
	dial := func(account string) healthpb.HealthClient {
		c, err := grpc.NewClient("passthrough:///health", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return w.dial(account, "10.96.0.1:50051") }))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return healthpb.NewHealthClient(c)
	}
	client := dial("client")
	resp, err := client.Check(w.ctx, &healthpb.HealthCheckRequest{Service: "shop"})
	if err != nil || resp.Status != healthpb.HealthCheckResponse_SERVING {
		t.Fatalf("Check: %v, %v", resp, err)
	}
	if _, err := client.Check(w.ctx, &healthpb.HealthCheckRequest{Service: "no such"}); status.Code(err) != codes.NotFound {
		t.Errorf("status in trailers: %v", err)
	}
	if _, err := dial("stranger").Check(w.ctx, &healthpb.HealthCheckRequest{}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("denied: %v", err)
	}
	// A stream whose messages come one by one.
	watch, err := client.Watch(w.ctx, &healthpb.HealthCheckRequest{Service: "shop"})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []healthpb.HealthCheckResponse_ServingStatus{healthpb.HealthCheckResponse_SERVING, healthpb.HealthCheckResponse_NOT_SERVING} {
		got, err := watch.Recv()
		if err != nil || got.Status != want {
			t.Fatalf("Watch: %v, %v, want %v", got, err, want)
		}
		service.SetServingStatus("shop", healthpb.HealthCheckResponse_NOT_SERVING)
	}
}

func TestTCP(t *testing.T) {
	w := newWorld(t)
	p := &pod{workload: w.workload("echo", mesh.ProtocolHBONE)}
	w.tunnelled(p, p.workload.Identity(), func(in *hbone.Incoming) {
		s, err := in.Accept()
		if err != nil {
			return
		}
		_, _ = io.WriteString(s, "hello ")
		_, _ = io.Copy(s, s)
		_ = s.CloseWrite()
	})
	w.service("echo", "10.96.0.1", "tcp", 7, false, p)
	w.service("auto", "10.96.0.2", "", 7, false, p)
	w.input.Services[0].Endpoints[0].Services[w.input.Services[0].Service.Key()] = []mesh.Port{{ServicePort: 7, TargetPort: 8080}}
	w.policy(`
metadata: {name: no-strangers, namespace: shop}
spec:
  action: DENY
  targetRefs: [{kind: Gateway, group: gateway.networking.k8s.io, name: gate}]
  rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/stranger]}}]}]
`)
	w.update()
	for _, authority := range []string{"10.96.0.1:7", "10.96.0.2:7"} {
		s, err := w.dial("client", authority)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(s, "\x00\x01 binary"); err != nil {
			t.Fatal(err)
		}
		if err := s.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(s)
		if err != nil || string(got) != "hello \x00\x01 binary" {
			t.Errorf("%s: %q, %v", authority, got, err)
		}
	}
	var refused *hbone.StatusError
	if _, err := w.dial("stranger", "10.96.0.1:7"); !errors.As(err, &refused) || refused.Code != 401 ||
		!strings.Contains(refused.Reason, "denied by policy shop/no-strangers") {
		t.Errorf("a connection that policy denies: %v", err)
	}
	// A policy that comes later cuts what is open.
	open, err := w.dial("client", "10.96.0.1:7")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(open, make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	w.policy(`
metadata: {name: nobody, namespace: shop}
spec: {action: DENY, targetRefs: [{kind: Gateway, group: gateway.networking.k8s.io, name: gate}], rules: [{}]}
`)
	w.update()
	_ = open.SetReadDeadline(time.Now().Add(5 * time.Second))
	var reset *hbone.ResetError
	if _, err := open.Read(make([]byte, 1)); !errors.As(err, &reset) {
		t.Errorf("open connection after a DENY: %v", err)
	}
}

func TestUpgrade(t *testing.T) {
	w := newWorld(t)
	w.service("web", "10.96.0.1", "http", 80, false, w.httpPod("web", http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		c, buffered, err := http.NewResponseController(rw).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		fmt.Fprintf(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", r.Header.Get("Upgrade"))
		line, _ := buffered.ReadString('\n')
		fmt.Fprintf(c, "echo %s", line)
	})))
	w.update()
	s, err := w.dial("client", "10.96.0.1:80")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	fmt.Fprint(s, "GET / HTTP/1.1\r\nHost: web\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	r := bufio.NewReader(s)
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.StatusCode != 101 {
		t.Fatalf("upgrade: %v, %v", resp, err)
	}
	fmt.Fprint(s, "hello\n")
	if line, err := r.ReadString('\n'); line != "echo hello\n" {
		t.Errorf("%q, %v", line, err)
	}
}
