package xds

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"sync"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const (
	stringType = "type.googleapis.com/google.protobuf.StringValue"
	boolType   = "type.googleapis.com/google.protobuf.BoolValue"
)

func res(name, value string, aliases ...string) Resource {
	r, err := NewResource(name, wrapperspb.String(value), aliases...)
	if err != nil {
		panic(err)
	}
	return r
}

// plane is a server on a pipe, which can be cut and come back.
type plane struct {
	t      *testing.T
	server *Server

	mu       sync.Mutex
	listener *bufconn.Listener
	grpc     *grpc.Server
}

func newPlane(t *testing.T, cfg ServerConfig) *plane {
	t.Helper()
	cfg.Log = zap.NewNop()
	if cfg.Scope == nil {
		cfg.Scope = func(context.Context, *core.Node, string) (string, error) { return "", nil }
	}
	if cfg.Coalesce == 0 {
		cfg.Coalesce = time.Millisecond
	}
	p := &plane{t: t, server: NewServer(cfg)}
	p.start()
	t.Cleanup(p.stop)
	return p
}

func (p *plane) start() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.listener = bufconn.Listen(1 << 16)
	p.grpc = grpc.NewServer(ServerOptions()...)
	discovery.RegisterAggregatedDiscoveryServiceServer(p.grpc, p.server)
	listener, server := p.listener, p.grpc
	go func() { _ = server.Serve(listener) }()
}

func (p *plane) stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.grpc.Stop()
}

func (p *plane) dial(context.Context) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///bufconn", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			p.mu.Lock()
			listener := p.listener
			p.mu.Unlock()
			return listener.DialContext(ctx)
		}))
}

// holder keeps what a client was sent, and everything that happened.
type holder struct {
	mu       sync.Mutex
	held     map[string]string
	events   []string
	refuse   map[string]bool
	refuseBy error
}

func newHolder() *holder { return &holder{held: map[string]string{}, refuse: map[string]bool{}} }

func (h *holder) Apply(updated []Resource, removed []string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.refuseBy != nil {
		return h.refuseBy
	}
	var errs error
	for _, r := range updated {
		if h.refuse[r.Name] {
			h.events = append(h.events, "!"+r.Name)
			errs = errors.Join(errs, &ResourceError{r.Name, errors.New("not to our taste")})
			continue
		}
		var v wrapperspb.StringValue
		if err := r.Body.UnmarshalTo(&v); err != nil {
			errs = errors.Join(errs, &ResourceError{r.Name, err})
			continue
		}
		h.held[r.Name] = v.Value
		h.events = append(h.events, "+"+r.Name)
	}
	for _, name := range removed {
		delete(h.held, name)
		h.events = append(h.events, "-"+name)
	}
	return errs
}

func (h *holder) snapshot() map[string]string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return maps.Clone(h.held)
}

// take is what happened since it was last called.
func (h *holder) take() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	events := h.events
	h.events = nil
	return events
}

// run starts a client of the types in the order given and ends it with the test.
func (p *plane) run(id string, subscribe func(*Client)) *Client {
	p.t.Helper()
	c := NewClient(ClientConfig{Dial: p.dial, Node: &core.Node{Id: id}, Log: zap.NewNop()})
	subscribe(c)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = c.Run(ctx)
	}()
	p.t.Cleanup(func() {
		cancel()
		<-done
	})
	return c
}

func waitSynced(t *testing.T, c *Client) {
	t.Helper()
	select {
	case <-c.Synced():
	case <-time.After(10 * time.Second):
		t.Fatal("client did not sync in 10 s")
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("not within 10 s: %s", what)
}

// settle gives pushes that should not happen the time to happen.
func settle() { time.Sleep(50 * time.Millisecond) }

func many(n int, size int) []Resource {
	var out []Resource
	for i := range n {
		out = append(out, res(fmt.Sprintf("r%05d", i), fmt.Sprintf("%0*d", size, i)))
	}
	return out
}
