package ztunnel_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// awaitReady waits until the node's proxy says that it is ready.
func (s *shop) awaitReady(n *node) {
	s.t.Helper()
	s.eventually(func() error {
		response, err := http.Get("http://" + n.ready + "/healthz/ready")
		if err != nil {
			return err
		}
		response.Body.Close()
		if response.StatusCode != http.StatusOK {
			return fmt.Errorf("status %d", response.StatusCode)
		}
		return nil
	}, n.name+" ready")
}

// replace starts a successor of a node's proxy and ends the proxy when that is ready, as a rolling update does. It returns
// when the old one has ended.
func (s *shop) replace(n *node, env map[string]string) *node {
	s.t.Helper()
	all := map[string]string{"INPOD_UDS": n.socket}
	for k, v := range env {
		all[k] = v
	}
	next := s.world.node(n.name, all)
	next.socket = n.socket // of the one agent
	s.awaitReady(next)
	n.end()
	s.eventually(func() error {
		conn, err := net.Dial("tcp", n.stats)
		if err != nil {
			return nil
		}
		conn.Close()
		return errors.New("it still runs")
	}, "the end of the former proxy of "+n.name)
	return next
}

// ways are the ways that a connection can take through the proxies.
func (s *shop) ways() map[string]struct {
	from *os.File
	to   string
	line map[string]any
} {
	return map[string]struct {
		from *os.File
		to   string
		line map[string]any
	}{
		"tunnel":    {s.client.ns, s.vip4, map[string]any{"path": "hbone"}},
		"same node": {s.client.ns, s.near4, map[string]any{"path": "node"}},
		"plain out": {s.client.ns, fabric4 + ":8080", map[string]any{"path": "plain", "direction": "outbound"}},
		"plain in":  {s.fabric, s.far4, map[string]any{"path": "plain", "direction": "inbound"}},
	}
}

// TestHandover: connections of every kind, idle, in conversation and in bulk, live through the replacement of the proxies
// of both nodes, twice; the one line of each is written by the proxy that sees its end, with whole totals.
func TestHandover(t *testing.T) {
	s := newShop(t, map[string]string{"TERMINATION_GRACE_PERIOD": "30s"})
	env := map[string]string{"TERMINATION_GRACE_PERIOD": "30s"}
	s.awaitReady(s.node1)
	s.awaitReady(s.node2)
	idle, half := map[string]*net.TCPConn{}, map[string]*net.TCPConn{}
	var busy sync.WaitGroup
	stop := make(chan struct{})
	for name, way := range s.ways() {
		idle[name], half[name] = s.greeted(way.from, way.to), s.greeted(way.from, way.to)
		half[name].SetDeadline(time.Time{})
		if _, err := half[name].Write([]byte("said before ")); err != nil {
			t.Fatal(err)
		}
		talk, bulk := s.greeted(way.from, way.to), s.greeted(way.from, way.to)
		busy.Go(func() { pingPong(t, name, talk, stop) })
		busy.Go(func() { echo(t, name, bulk, 100<<20) })
	}
	first, second := s.node1, s.node2
	for range 2 {
		s.node1 = s.replace(s.node1, env)
		s.node2 = s.replace(s.node2, env)
	}
	close(stop)
	busy.Wait()
	for name, way := range s.ways() {
		for _, conn := range []*net.TCPConn{idle[name], half[name]} {
			conn.SetDeadline(time.Now().Add(10 * time.Second))
			if _, err := conn.Write([]byte("and after")); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			conn.CloseWrite()
		}
		if got, err := io.ReadAll(idle[name]); string(got) != "and after" || err != nil {
			t.Errorf("%s, idle: %q, %v", name, got, err)
		}
		if got, err := io.ReadAll(half[name]); string(got) != "said before and after" || err != nil {
			t.Errorf("%s: %q, %v", name, got, err)
		}
		for _, n := range []*node{s.node1, s.node2} {
			if name == "tunnel" || (n == s.node2) == (name == "plain in") {
				line := map[string]any{"bytes_recv": int64(len("said before and after")), "response_flags": "-"}
				for k, v := range way.line {
					line[k] = v
				}
				n.line(t, line)
			}
		}
	}
	for _, n := range []*node{first, second} {
		for _, entry := range n.logs.All() {
			t.Errorf("%s, which ended while all were open, has written %v", n.name, entry.ContextMap())
		}
	}
}

// pingPong exchanges messages until stop is closed.
func pingPong(t *testing.T, name string, conn *net.TCPConn, stop <-chan struct{}) {
	var got [16]byte
	for rounds := 0; ; rounds++ {
		select {
		case <-stop:
			conn.Close()
			if rounds < 20 {
				t.Errorf("%s: only %d rounds", name, rounds)
			}
			return
		case <-time.After(time.Millisecond):
		}
		want := fmt.Appendf(nil, "message %08d", rounds)
		conn.SetDeadline(time.Now().Add(10 * time.Second))
		conn.Write(want)
		if _, err := io.ReadFull(conn, got[:]); err != nil || !bytes.Equal(got[:], want) {
			t.Errorf("%s, round %d: %q, %v", name, rounds, got, err)
			return
		}
	}
}

// echo sends n bytes, of which some wait in every buffer on the way, and wants them back.
func echo(t *testing.T, name string, conn *net.TCPConn, n int) {
	conn.SetDeadline(time.Now().Add(time.Minute))
	block := make([]byte, 1<<20)
	rand.Read(block)
	go func() {
		for range n >> 20 {
			conn.Write(block)
		}
		conn.CloseWrite()
	}()
	got := make([]byte, len(block))
	for i := range n >> 20 {
		if _, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, block) {
			t.Errorf("%s: MiB %d: %v", name, i, err)
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	if k, err := conn.Read(got); err != io.EOF {
		t.Errorf("%s: %d bytes and %v behind the end", name, k, err)
	}
}

// TestHandoverAsksPolicies: the successor cuts what it took over when its policies say so.
func TestHandoverAsksPolicies(t *testing.T) {
	s := newShop(t, map[string]string{"TERMINATION_GRACE_PERIOD": "30s"})
	tunnel, near := s.greeted(s.client.ns, s.vip4), s.greeted(s.client.ns, s.near4)
	s.awaitReady(s.node1)
	s.awaitReady(s.node2)
	s.node1, s.node2 = s.replace(s.node1, nil), s.replace(s.node2, nil)
	s.push(s.workloads, s.services, []*mesh.Authorization{deny("client")})
	for name, conn := range map[string]*net.TCPConn{"tunnel": tunnel, "same node": near} {
		conn.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: read gives %v after the policy change, want it cut", name, err)
		}
	}
	cut := map[string]any{"direction": "inbound", "response_flags": "DENY", "policy": "shop/deny"}
	s.node1.line(t, cut)
	s.node2.line(t, cut)
	checkMetrics(t, s.node2, "istio_tcp_connections_opened_total{", `reporter="destination"`, `source_workload="client"`)
	checkMetrics(t, s.node2, "istio_tcp_connections_closed_total{", `reporter="destination"`, `source_workload="client"`)
}

// TestProxyThatLeavesIsNotAsked: a proxy that still serves what it cannot hand over is the agent's no more; new connections
// are its successor's, whatever the agent does meanwhile.
func TestProxyThatLeavesIsNotAsked(t *testing.T) {
	s := newShop(t, map[string]string{"TERMINATION_GRACE_PERIOD": "30s", "FAIRLEAD_GOROUTINES": "true"})
	old := s.node1
	kept := s.greeted(s.client.ns, s.vip4)
	s.awaitReady(old)
	next := s.world.node(old.name, map[string]string{"INPOD_UDS": old.socket})
	s.awaitReady(next)
	old.end()
	s.eventually(func() error {
		if n := len(old.agent.Peers()); n != 1 {
			return fmt.Errorf("%d proxies are connected to the agent", n)
		}
		return nil
	}, "the former proxy has left")
	if answer, err := call(t, s.client.ns, s.near4); err != nil {
		t.Errorf("a new connection: %q, %v", answer, err)
	}
	next.line(t, map[string]any{"direction": "outbound", "path": "node"})
	kept.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := kept.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	if _, err := io.ReadFull(kept, make([]byte, 1)); err != nil {
		t.Errorf("what the former proxy serves: %v", err)
	}
}

// TestNoHandover: the control of TestHandover. Without a successor to give it to, a connection is cut when the grace
// period is over.
func TestNoHandover(t *testing.T) {
	s := newShop(t, map[string]string{"TERMINATION_GRACE_PERIOD": "300ms"})
	for name, way := range s.ways() {
		if name == "plain in" {
			continue // through the other node
		}
		conn := s.greeted(way.from, way.to)
		defer func() {
			if _, err := io.Copy(io.Discard, conn); err == nil {
				t.Errorf("%s: ended in order", name)
			}
		}()
	}
	s.node1.end()
}
