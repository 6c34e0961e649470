package xds

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func expect(t *testing.T, what string, want, got any) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

func TestPushesWhatChanged(t *testing.T) {
	p := newPlane(t, ServerConfig{})
	p.server.Set(stringType, "", []Resource{res("a", "1"), res("b", "1")})
	h := newHolder()
	c := p.run("n", func(c *Client) { c.Subscribe(stringType, h) })
	waitSynced(t, c)
	expect(t, "first answer", []string{"+a", "+b"}, h.take())

	p.server.Update(stringType, "", []Resource{res("b", "2"), res("a", "1"), res("c", "1")}, []string{"nobody"})
	eventually(t, "c", func() bool { return h.snapshot()["c"] == "1" })
	expect(t, "second answer", []string{"+b", "+c"}, h.take())

	p.server.Set(stringType, "", []Resource{res("c", "1")})
	eventually(t, "removals", func() bool { return len(h.snapshot()) == 1 })
	expect(t, "third answer", []string{"-a", "-b"}, h.take())

	p.server.Set(stringType, "", []Resource{res("c", "1")})
	settle()
	expect(t, "after no change", []string(nil), h.take())
}

func TestSyncedWaitsForEveryType(t *testing.T) {
	p := newPlane(t, ServerConfig{})
	p.server.Set(stringType, "", nil)
	h := newHolder()
	c := p.run("n", func(c *Client) {
		c.Subscribe(stringType, h)
		c.Subscribe(boolType, h)
	})
	eventually(t, "connection", c.Connected)
	settle()
	select {
	case <-c.Synced():
		t.Fatal("synced while one type is unknown to the server")
	default:
	}
	p.server.Set(boolType, "", nil)
	waitSynced(t, c)
}

func TestReconnectResendsNothing(t *testing.T) {
	p := newPlane(t, ServerConfig{})
	p.server.Set(stringType, "", []Resource{res("a", "1"), res("b", "1"), res("c", "1")})
	h := newHolder()
	c := p.run("n", func(c *Client) { c.Subscribe(stringType, h) })
	waitSynced(t, c)
	h.take()

	p.stop()
	// What changes while the client is away, and only that, is sent when it is back; also by a server that starts anew.
	p.server = NewServer(p.server.cfg)
	p.server.Set(stringType, "", []Resource{res("a", "1"), res("b", "2")})
	p.start()
	eventually(t, "b", func() bool { return h.snapshot()["b"] == "2" })
	expect(t, "after reconnect", []string{"+b", "-c"}, h.take())

	p.stop()
	p.start()
	eventually(t, "second reconnect", func() bool {
		clients := p.server.Clients()
		return len(clients) == 1 && len(clients[0].Types) == 1 && !clients[0].Types[0].Acked.IsZero()
	})
	expect(t, "after a reconnect without changes", []string(nil), h.take())
}

func TestNackKeepsGoing(t *testing.T) {
	p := newPlane(t, ServerConfig{})
	p.server.Set(stringType, "", []Resource{res("good", "1"), res("bad", "1")})
	h := newHolder()
	c := p.run("n", func(c *Client) { c.Subscribe(stringType, h) })
	waitSynced(t, c)
	h.mu.Lock()
	h.refuse["bad"] = true
	h.events = nil
	h.mu.Unlock()

	p.server.Update(stringType, "", []Resource{res("good", "2"), res("bad", "2")}, nil)
	rejected := func() string {
		for _, client := range p.server.Clients() {
			return client.Types[0].Rejected
		}
		return ""
	}
	eventually(t, "nack", func() bool { return strings.Contains(rejected(), `resource "bad": not to our taste`) })
	expect(t, "in force", map[string]string{"good": "2", "bad": "1"}, h.snapshot())

	p.server.Update(stringType, "", []Resource{res("good", "3")}, nil)
	eventually(t, "good 3", func() bool { return h.snapshot()["good"] == "3" })
	eventually(t, "acked", func() bool { return rejected() == "" })
	expect(t, "events", []string{"!bad", "+good", "+good"}, h.take())

	// The refused one is still owed: a new stream is sent it, and nothing else.
	h.mu.Lock()
	h.refuse = nil
	h.mu.Unlock()
	p.stop()
	p.start()
	eventually(t, "bad 2", func() bool { return h.snapshot()["bad"] == "2" })
	expect(t, "events", []string{"+bad"}, h.take())
}

func TestRefused(t *testing.T) {
	a, b := &ResourceError{"a", errors.New("x")}, &ResourceError{"b", errors.New("y")}
	for _, tc := range []struct {
		err  error
		want map[string]bool
		all  bool
	}{
		{nil, map[string]bool{}, false},
		{a, map[string]bool{"a": true}, false},
		{errors.Join(a, fmt.Errorf("wrapped: %w", b)), map[string]bool{"a": true, "b": true}, false},
		{errors.Join(a, errors.New("whole")), map[string]bool{"a": true}, true},
	} {
		names, all := refused(tc.err)
		expect(t, fmt.Sprint(tc.err), tc.want, names)
		if all != tc.all {
			t.Errorf("%v: all %v, want %v", tc.err, all, tc.all)
		}
	}
}

func TestScopes(t *testing.T) {
	p := newPlane(t, ServerConfig{Scope: func(_ context.Context, node *core.Node, _ string) (string, error) {
		if node.GetId() == "stranger" {
			return "", errors.New("not a node of this mesh")
		}
		return node.GetId(), nil
	}})
	p.server.Set(stringType, "n1", []Resource{res("a", "1")})
	p.server.Set(stringType, "n2", []Resource{res("b", "1")})
	h1, h2, h3 := newHolder(), newHolder(), newHolder()
	c1 := p.run("n1", func(c *Client) { c.Subscribe(stringType, h1) })
	c2 := p.run("n2", func(c *Client) { c.Subscribe(stringType, h2) })
	p.run("stranger", func(c *Client) { c.Subscribe(stringType, h3) })
	waitSynced(t, c1)
	waitSynced(t, c2)
	p.server.Update(stringType, "n1", []Resource{res("c", "1")}, nil)
	eventually(t, "c", func() bool { return h1.snapshot()["c"] == "1" })
	settle()
	expect(t, "n2", []string{"+b"}, h2.take())
	expect(t, "stranger", []string(nil), h3.take())
}

func TestScopeRefusalIsPermissionDenied(t *testing.T) {
	s := NewServer(ServerConfig{Scope: func(context.Context, *core.Node, string) (string, error) { return "", errors.New("no") }})
	if _, err := s.scope(context.Background(), nil, stringType); status.Code(err) != codes.PermissionDenied {
		t.Errorf("error %v, want PermissionDenied", err)
	}
}

func TestOnDemand(t *testing.T) {
	p := newPlane(t, ServerConfig{})
	p.server.Set(stringType, "", []Resource{res("a", "1", "net/10.0.0.1"), res("b", "1"), res("c", "1")})
	h := newHolder()
	c := p.run("n", func(c *Client) { c.Subscribe(stringType, h, "b") })
	waitSynced(t, c)
	expect(t, "by name", []string{"+b"}, h.take())

	c.Want(stringType, "net/10.0.0.1", "net/10.0.0.9")
	eventually(t, "alias", func() bool { return h.snapshot()["a"] == "1" })
	expect(t, "by alias, and one that is nobody's", []string{"+a", "-net/10.0.0.9"}, h.take())

	p.server.Update(stringType, "", []Resource{res("a", "2", "net/10.0.0.1"), res("c", "2"), res("d", "1", "net/10.0.0.9")}, []string{"b"})
	eventually(t, "a 2", func() bool { return h.snapshot()["a"] == "2" })
	settle()
	expect(t, "changes of what is wanted", []string{"+a", "+d", "-b"}, h.take())

	// The alias moves away: what is no longer wanted is taken back.
	p.server.Update(stringType, "", []Resource{res("a", "2")}, nil)
	eventually(t, "removal", func() bool { _, ok := h.snapshot()["a"]; return !ok })

	p.stop()
	p.start()
	p.server.Update(stringType, "", []Resource{res("b", "5")}, nil)
	eventually(t, "wanted after reconnect", func() bool { return h.snapshot()["b"] == "5" })
	if _, ok := h.snapshot()["c"]; ok {
		t.Error("c was sent without being wanted")
	}
}

func TestOrder(t *testing.T) {
	p := newPlane(t, ServerConfig{Order: []string{stringType, boolType}, Coalesce: 50 * time.Millisecond})
	p.server.Set(boolType, "", nil)
	p.server.Set(stringType, "", nil)
	order := make(chan string, 10)
	note := func(name string) Handler {
		return HandlerFunc(func([]Resource, []string) error { order <- name; return nil })
	}
	c := p.run("n", func(c *Client) {
		c.Subscribe(boolType, note("bool"))
		c.Subscribe(stringType, note("string"))
	})
	waitSynced(t, c)
	eventually(t, "acks", func() bool {
		for _, typ := range p.server.Clients()[0].Types {
			if typ.Pending {
				return false
			}
		}
		return true
	})
	b := res("x", "1")
	b.Body.TypeUrl = boolType
	// Both within one coalescing interval, in the wrong order.
	p.server.Set(boolType, "", []Resource{b})
	p.server.Set(stringType, "", []Resource{res("x", "1")})
	if first, second := <-order, <-order; first != "string" || second != "bool" {
		t.Errorf("pushed %s before %s", first, second)
	}
}

func TestSplitPush(t *testing.T) {
	p := newPlane(t, ServerConfig{MaxResponse: 10_000})
	p.server.Set(stringType, "", many(200, 1000))
	var largest, calls int
	h := newHolder()
	c := p.run("n", func(c *Client) {
		c.Subscribe(stringType, HandlerFunc(func(updated []Resource, removed []string) error {
			calls++
			largest = max(largest, len(updated))
			select {
			case <-c.Synced():
				t.Error("synced before the whole push was there")
			default:
			}
			return h.Apply(updated, removed)
		}))
	})
	waitSynced(t, c)
	if len(h.snapshot()) != 200 || largest > 9 || calls < 20 {
		t.Errorf("%d resources in %d responses of at most %d, want 200 in some 23 of at most 9", len(h.snapshot()), calls, largest)
	}
}

// TestReconnectOfALargeMesh: naming all it has must not exceed a message size, and both ends send much at once.
func TestReconnectOfALargeMesh(t *testing.T) {
	p := newPlane(t, ServerConfig{})
	resources := many(60_000, 10)
	for i := range resources {
		resources[i].Name = fmt.Sprintf("Kubernetes//Pod/some-longer-namespace/deployment-%05d-7d9c6b5f4-abcde", i)
	}
	p.server.Set(stringType, "", resources)
	h := newHolder()
	c := p.run("n", func(c *Client) { c.Subscribe(stringType, h) })
	waitSynced(t, c)
	eventually(t, "all", func() bool { return len(h.snapshot()) == len(resources) })
	h.take()
	p.stop()
	p.server.Update(stringType, "", []Resource{res("late", "1")}, nil)
	p.start()
	eventually(t, "late", func() bool { return h.snapshot()["late"] == "1" })
	expect(t, "after reconnect", []string{"+late"}, h.take())
}

// TestEndsEqual: whatever changes in whatever order, and with cuts, the client ends with what the server has.
func TestEndsEqual(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	p := newPlane(t, ServerConfig{})
	p.server.Set(stringType, "", nil)
	h := newHolder()
	p.run("n", func(c *Client) { c.Subscribe(stringType, h) })
	want := map[string]string{}
	for i := range 300 {
		name, value := fmt.Sprint("r", r.IntN(20)), fmt.Sprint(i)
		switch r.IntN(20) {
		case 0:
			p.stop()
			p.start()
		case 1, 2, 3, 4, 5:
			p.server.Update(stringType, "", nil, []string{name})
			delete(want, name)
		default:
			p.server.Update(stringType, "", []Resource{res(name, value)}, nil)
			want[name] = value
		}
		time.Sleep(time.Duration(r.IntN(2)) * time.Millisecond)
	}
	deadline := time.Now().Add(20 * time.Second)
	for !cmp.Equal(want, h.snapshot()) {
		if time.Now().After(deadline) {
			t.Fatalf("seed %d (-want +got):\n%s", seed, cmp.Diff(want, h.snapshot()))
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// TestLogIsBounded: changes for ever do not grow the collection, and who is far behind is still told right.
func TestLogIsBounded(t *testing.T) {
	c := newCollection(1 << 32)
	for i := range 100_000 {
		c.set(res("a", fmt.Sprint(i)))
	}
	if len(c.log) > 3000 {
		t.Errorf("log of %d changes for one resource", len(c.log))
	}
	if _, ok := c.since(1 << 32); ok {
		t.Error("the first change is still known")
	}
	names, ok := c.since(c.now() - 1)
	expect(t, "last change", map[string]struct{}{"a": {}}, names)
	if !ok {
		t.Error("the last change is not known")
	}
	if _, ok := c.since(5); ok {
		t.Error("a change of another collection is taken for one of this")
	}
}

// TestNamedSubscriptions drives the server as Envoy does: names that come and go.
func TestNamedSubscriptions(t *testing.T) {
	p := newPlane(t, ServerConfig{})
	p.server.Set(stringType, "", []Resource{res("a", "1"), res("b", "1")})
	conn, err := p.dial(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	send := func(r *discovery.DeltaDiscoveryRequest) {
		t.Helper()
		r.TypeUrl = stringType
		if err := stream.Send(r); err != nil {
			t.Fatal(err)
		}
	}
	receive := func() (names, removed []string) {
		t.Helper()
		response, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range response.Resources {
			names = append(names, r.Name)
		}
		send(&discovery.DeltaDiscoveryRequest{ResponseNonce: response.Nonce})
		return names, response.RemovedResources
	}
	send(&discovery.DeltaDiscoveryRequest{Node: &core.Node{Id: "envoy"}, ResourceNamesSubscribe: []string{"a", "gone"}})
	names, removed := receive()
	expect(t, "subscribed", []string{"a"}, names)
	expect(t, "not there", []string{"gone"}, removed)

	send(&discovery.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"a"}})
	names, _ = receive()
	expect(t, "subscribed again", []string{"a"}, names)

	send(&discovery.DeltaDiscoveryRequest{ResourceNamesUnsubscribe: []string{"a"}, ResourceNamesSubscribe: []string{"b"}})
	names, removed = receive()
	expect(t, "other name", []string{"b"}, names)
	expect(t, "unsubscribed is not removed", []string(nil), removed)

	p.server.Update(stringType, "", []Resource{res("a", "2"), res("gone", "1")}, nil)
	names, _ = receive()
	expect(t, "appeared", []string{"gone"}, names)
}

// TestEndsWhileAResponseComes: a client ends when it is told to, also when the reader has a response at that moment.
func TestEndsWhileAResponseComes(t *testing.T) {
	p := newPlane(t, ServerConfig{Coalesce: time.Microsecond})
	p.server.Set(stringType, "", nil)
	for i := range 300 {
		c := NewClient(ClientConfig{Dial: p.dial, Node: &core.Node{Id: "n"}, Log: zap.NewNop()})
		c.Subscribe(stringType, newHolder())
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = c.Run(ctx)
		}()
		waitSynced(t, c)
		p.server.Update(stringType, "", []Resource{res("a", fmt.Sprint(i))}, nil)
		time.Sleep(time.Duration(rand.IntN(300)) * time.Microsecond)
		cancel()
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			t.Fatalf("round %d: the client did not end", i)
		}
	}
}
