package ztunnel_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

func TestPaths(t *testing.T) {
	s := newShop(t, nil)
	client4, client6 := s.client.ip4.String(), s.client.ip6.String()
	for _, tc := range []struct {
		name       string
		from       *os.File
		to, answer string
		out, in    map[string]any // lines of the client's and the server's proxy; nil: there is none
	}{
		{"service on the other node", s.client.ns, s.vip4, client4,
			map[string]any{"direction": "outbound", "path": "hbone", "src.identity": identityOf("client"), "dst.identity": identityOf("far"),
				"dst.service": "web.shop.svc.cluster.local", "dst.hbone_addr": s.far4, "dst.addr": s.far.ip4.String() + ":15008",
				"bytes_recv": int64(5), "response_flags": "-"},
			map[string]any{"direction": "inbound", "path": "hbone", "src.identity": identityOf("client"), "dst.identity": identityOf("far"),
				"dst.service": "web.shop.svc.cluster.local", "src.workload": "client", "dst.addr": s.far4, "bytes_recv": int64(5)}},
		{"the same in IPv6", s.client.ns, s.vip6, client6,
			map[string]any{"direction": "outbound", "path": "hbone", "dst.identity": identityOf("far"), "dst.hbone_addr": fmt.Sprintf("[%v]:8080", s.far.ip6)},
			map[string]any{"direction": "inbound", "path": "hbone", "src.identity": identityOf("client"), "dst.addr": fmt.Sprintf("[%v]:8080", s.far.ip6)}},
		{"pod on the same node", s.client.ns, s.near4, client4,
			map[string]any{"direction": "outbound", "path": "node", "dst.identity": identityOf("near"), "dst.addr": s.near4, "bytes_recv": int64(5)}, nil},
		{"itself through a service", s.far.ns, s.vip4, s.far.ip4.String(), nil,
			map[string]any{"direction": "inbound", "path": "node", "src.identity": identityOf("far"), "dst.identity": identityOf("far")}},
		{"itself directly", s.far.ns, s.far4, s.far.ip4.String(), nil, nil},
		{"outside of the mesh", s.client.ns, fabric4 + ":8080", client4,
			map[string]any{"direction": "outbound", "path": "plain", "dst.addr": fabric4 + ":8080", "bytes_recv": int64(5)}, nil},
		{"from outside of the mesh", s.fabric, s.far4, fabric4, nil,
			map[string]any{"direction": "inbound", "path": "plain", "dst.addr": s.far4, "bytes_recv": int64(5)}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			answer, err := call(t, tc.from, tc.to)
			if want := tc.answer + "\nhello"; err != nil || answer != want {
				t.Errorf("answer %q, %v; want %q", answer, err, want)
			}
			if tc.out != nil {
				s.node1.line(t, tc.out)
			}
			if tc.in != nil {
				s.node2.line(t, tc.in)
			}
		})
	}
	s.node1.line(t, map[string]any{"direction": "inbound", "path": "node", "src.identity": identityOf("client"), "dst.identity": identityOf("near")})
	checkMetrics(t, s.node1, `istio_tcp_connections_closed_total{`, `reporter="source"`, `source_workload="client"`, `destination_workload="far"`,
		`connection_security_policy="mutual_tls"`, `destination_service="web.shop.svc.cluster.local"`, `destination_principal="`+identityOf("far")+`"`)
}

// TestDryRun: a policy on trial is reported and changes nothing.
func TestDryRun(t *testing.T) {
	s := newShop(t, nil)
	trial := deny("client")
	trial.DryRun = true
	s.push(s.workloads, s.services, []*mesh.Authorization{trial})
	s.eventually(func() error {
		if _, err := call(t, s.client.ns, s.near4); err != nil {
			return err
		}
		for _, line := range s.node1.logs.All() {
			if line.ContextMap()["dry_run"] == "DENY shop/deny" {
				return nil
			}
		}
		return errors.New("no line says what the policy would have done")
	}, "dry run")
}

func TestSameNodeThroughATunnelWhenForced(t *testing.T) {
	s := newShop(t, map[string]string{"FAIRLEAD_FORCE_HBONE": "true"})
	answer, err := call(t, s.client.ns, s.near4)
	if want := s.client.ip4.String() + "\nhello"; err != nil || answer != want {
		t.Errorf("answer %q, %v; want %q", answer, err, want)
	}
	s.node1.line(t, map[string]any{"direction": "outbound", "path": "hbone", "dst.identity": identityOf("near")})
	s.node1.line(t, map[string]any{"direction": "inbound", "path": "hbone", "src.identity": identityOf("client")})
	if answer, err := call(t, s.far.ns, s.vip4); err != nil || answer != s.far.ip4.String()+"\nhello" {
		t.Errorf("a pod that calls itself: %q, %v", answer, err)
	}
}

// TestPolicyChangeCutsLiveConnections: a DENY reaches what is open already, and only what it is about.
func TestPolicyChangeCutsLiveConnections(t *testing.T) {
	s := newShop(t, nil)
	targets := map[string]string{"the other node": s.vip4, "this node": s.near4}
	open := map[string]*net.TCPConn{}
	for name, to := range targets {
		open[name] = s.greeted(s.client.ns, to)
	}
	plain := s.greeted(s.fabric, s.far4)

	s.push(s.workloads, s.services, []*mesh.Authorization{deny("client")})
	for name, conn := range open {
		conn.SetDeadline(time.Now().Add(2 * time.Second))
		if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("connection to %s: read gives %v after the policy change, want it cut", name, err)
		}
	}
	if _, err := plain.Write([]byte("x")); err != nil {
		t.Errorf("a connection that the policy is not about: %v", err)
	}
	plain.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.ReadFull(plain, make([]byte, 1)); err != nil {
		t.Errorf("a connection that the policy is not about: %v", err)
	}
	for name, to := range targets {
		if answer, err := call(t, s.client.ns, to); err == nil {
			t.Errorf("%s answered %q under a policy that denies", name, answer)
		}
	}
	cut := map[string]any{"direction": "inbound", "response_flags": "DENY", "policy": "shop/deny"}
	s.node1.line(t, cut)
	s.node2.line(t, cut)
	s.node1.line(t, map[string]any{"direction": "outbound", "path": "hbone", "response_flags": "DENY", "error": contains("401")})

	s.push(s.workloads, s.services, nil)
	for name, to := range targets {
		s.eventually(func() error { _, err := call(t, s.client.ns, to); return err }, name+" after the policy is gone")
	}
}

func TestStrictRefusesPlaintextOnly(t *testing.T) {
	s := newShop(t, nil)
	if _, err := call(t, s.fabric, s.far4); err != nil {
		t.Fatalf("control: plaintext without a policy: %v", err)
	}
	s.push(s.workloads, s.services, []*mesh.Authorization{strict()})
	refused := func() error {
		if answer, err := call(t, s.fabric, s.far4); err == nil {
			return fmt.Errorf("answered %q", answer)
		}
		return nil
	}
	s.eventually(refused, "plaintext under STRICT")
	s.node2.line(t, map[string]any{"direction": "inbound", "path": "plain", "response_flags": "DENY", "policy": "shop/strict"})
	if _, err := call(t, s.client.ns, s.vip4); err != nil {
		t.Errorf("mutual TLS under STRICT: %v", err)
	}
	if _, err := call(t, s.client.ns, s.near4); err != nil {
		t.Errorf("within the node under STRICT: %v", err)
	}
}

// TestBulkBothWays moves random bytes both ways at once on every path, with half close, and compares.
func TestBulkBothWays(t *testing.T) {
	s := newShop(t, nil)
	for name, to := range map[string]string{"tunnel": s.vip4, "node": s.near4, "plain": fabric4 + ":8080"} {
		t.Run(name, func(t *testing.T) {
			var all sync.WaitGroup
			for range 4 {
				conn := s.greeted(s.client.ns, to)
				conn.SetDeadline(time.Now().Add(30 * time.Second))
				var sent [32]byte
				all.Go(func() {
					h := sha256.New()
					source := rand.NewChaCha8([32]byte{1})
					if _, err := io.Copy(io.MultiWriter(conn, h), io.LimitReader(source, 8<<20)); err != nil {
						t.Error(err)
					}
					copy(sent[:], h.Sum(nil))
					conn.CloseWrite()
				})
				all.Go(func() {
					h := sha256.New()
					n, err := io.Copy(h, conn)
					if err != nil || n != 8<<20 {
						t.Errorf("%d bytes came back: %v", n, err)
					}
					got := h.Sum(nil)
					want := sha256.New()
					io.Copy(want, io.LimitReader(rand.NewChaCha8([32]byte{1}), 8<<20))
					if !bytes.Equal(got, want.Sum(nil)) {
						t.Error("the bytes that came back differ")
					}
				})
			}
			all.Wait()
		})
	}
}

// TestWrongIdentityIsRefused: whoever answers at a workload's address must be that workload.
func TestWrongIdentityIsRefused(t *testing.T) {
	s := newShop(t, nil)
	impostor := *s.farWorkload
	impostor.ServiceAccount = "somebody-else"
	s.push([]*mesh.Workload{s.clientWorkload, &impostor}, s.services, nil)
	s.eventually(func() error {
		if answer, err := call(t, s.client.ns, s.vip4); err == nil {
			return fmt.Errorf("answered %q", answer)
		}
		return nil
	}, "a peer with another identity")
	s.node1.line(t, map[string]any{"direction": "outbound", "response_flags": "TLS_FAILURE"})
}

func TestFailures(t *testing.T) {
	s := newShop(t, nil)
	for _, tc := range []struct{ name, to, flag string }{
		{"closed port through a tunnel", s.far.ip4.String() + ":9", "CONNECT"},
		{"closed port on the same node", s.near.ip4.String() + ":9", "CONNECT"},
		{"closed port outside of the mesh", fabric4 + ":9", "CONNECT"},
		{"service port that is not there", "10.96.0.1:81", "NO_ROUTE"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			start := time.Now()
			if answer, err := call(t, s.client.ns, tc.to); err == nil {
				t.Errorf("answered %q", answer)
			} else if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.EPIPE) {
				t.Errorf("error %v", err)
			}
			if took := time.Since(start); took > 2*time.Second {
				t.Errorf("took %v", took)
			}
			s.node1.line(t, map[string]any{"direction": "outbound", "response_flags": tc.flag})
		})
	}
}

// TestStoppedProxyRefuses: when the proxy is gone nothing passes, in or out, and when it is back all does again.
func TestStoppedProxyRefuses(t *testing.T) {
	s := newShop(t, nil)
	if _, err := call(t, s.client.ns, fabric4+":8080"); err != nil {
		t.Fatalf("control: %v", err)
	}
	s.node1.stop()
	if answer, err := call(t, s.client.ns, fabric4+":8080"); err == nil {
		t.Errorf("out: answered %q without a proxy", answer)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if conn, err := dial(ctx, s.fabric, s.near4); err == nil {
		conn.Close()
		t.Error("in: connected without a proxy")
	}
	back := s.world.node("node1", nil)
	for _, p := range []*pod{s.client, s.near} {
		s.enrol(back, p)
	}
	if _, err := call(t, s.client.ns, s.vip4); err != nil {
		t.Errorf("after the proxy is back: %v", err)
	}
}

// TestUnenrolledPodKeepsItsConnections: what is open goes on, and what comes next goes without the proxy.
func TestUnenrolledPodKeepsItsConnections(t *testing.T) {
	s := newShop(t, nil)
	out, in, node := s.greeted(s.client.ns, s.vip4), s.greeted(s.fabric, s.near4), s.greeted(s.client.ns, s.near4)
	for _, p := range []*pod{s.client, s.near} {
		s.must(s.redirector.Release(cookieOf(t, p.ns), p.ns))
		s.must(s.node1.agent.Delete(t.Context(), "uid-"+p.name))
	}
	s.must(s.redirector.Release(cookieOf(t, s.far.ns), s.far.ns))
	s.must(s.node2.agent.Delete(t.Context(), "uid-far"))
	for name, conn := range map[string]*net.TCPConn{"through a tunnel": out, "from outside": in, "within the node": node} {
		if _, err := conn.Write([]byte("x")); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	lines := s.node1.logs.Len()
	if answer, err := call(t, s.client.ns, s.far4); err != nil || answer != s.client.ip4.String()+"\nhello" {
		t.Errorf("a new connection: %q, %v", answer, err)
	}
	if now := s.node1.logs.Len(); now != lines {
		t.Errorf("the proxy wrote %d lines about a pod that it does not serve any more", now-lines)
	}
}

// TestDrain: after SIGTERM the proxy is not ready, but what is open goes on and new connections are still made, until the
// last has ended.
func TestDrain(t *testing.T) {
	s := newShop(t, map[string]string{"TERMINATION_GRACE_PERIOD": "20s"})
	isReady := func() bool {
		response, err := http.Get("http://" + s.node1.ready + "/healthz/ready")
		if err != nil {
			return false
		}
		response.Body.Close()
		return response.StatusCode == http.StatusOK
	}
	s.eventually(func() error {
		if !isReady() {
			return errors.New("not ready")
		}
		return nil
	}, "readiness")
	open := s.greeted(s.client.ns, s.vip4)
	s.node1.end()
	s.eventually(func() error {
		if isReady() {
			return errors.New("still ready")
		}
		return nil
	}, "readiness after the end was asked for")
	if _, err := call(t, s.client.ns, s.vip4); err != nil {
		t.Errorf("a new connection while draining: %v", err)
	}
	if _, err := open.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	if _, err := io.ReadFull(open, make([]byte, 1)); err != nil {
		t.Errorf("an open connection while draining: %v", err)
	}
	start := time.Now()
	open.Close()
	s.node1.stop()
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("it took %v to end after the last connection", took)
	}
}

// TestReplacement: a second proxy takes the node's new connections over without one failing, and when it fails instead
// of the first being ended, the first has them back.
func TestReplacement(t *testing.T) {
	s := newShop(t, map[string]string{"TERMINATION_GRACE_PERIOD": "20s"})
	open := s.greeted(s.client.ns, s.vip4)
	uses := func(n *node, what string) {
		t.Helper()
		before := n.logs.Len()
		s.eventually(func() error {
			if _, err := call(t, s.client.ns, s.vip4); err != nil {
				return err
			}
			if n.logs.Len() == before {
				return errors.New("it carries no connections")
			}
			return nil
		}, what)
	}
	broken := s.world.node("node1", map[string]string{"INPOD_UDS": s.node1.socket})
	uses(broken, "the second proxy")
	broken.stop()
	uses(s.node1, "the first proxy, after the second has gone")

	done, stop := make(chan struct{}), make(chan struct{})
	calls := 0
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
			}
			for _, to := range []string{s.vip4, s.near4} {
				if calls++; !t.Failed() {
					if _, err := call(t, s.client.ns, to); err != nil {
						t.Errorf("call %d failed during the replacement: %v", calls, err)
					}
				}
			}
		}
	}()
	successor := s.world.node("node1", map[string]string{"INPOD_UDS": s.node1.socket})
	uses(successor, "the successor")
	s.node1.end()
	if _, err := open.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	if _, err := io.ReadFull(open, make([]byte, 1)); err != nil {
		t.Errorf("an open connection while its proxy drains: %v", err)
	}
	open.Close()
	time.Sleep(300 * time.Millisecond)
	close(stop)
	<-done
	uses(successor, "the successor, alone")
	t.Logf("%d calls", calls)
}

// TestManyShortConnections: each is served, and nothing of them is left.
func TestManyShortConnections(t *testing.T) {
	s := newShop(t, nil)
	targets := []string{s.vip4, s.near4, fabric4 + ":8080", s.vip6}
	for _, to := range targets {
		if _, err := call(t, s.client.ns, to); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := call(t, s.fabric, s.far4); err != nil {
		t.Fatal(err)
	}
	before := descriptors(t)
	var workers sync.WaitGroup
	for i := range 16 {
		workers.Go(func() {
			for j := range 60 {
				from, to := s.client.ns, targets[j%len(targets)]
				if i%4 == 0 {
					from, to = s.fabric, s.far4
				}
				if answer, err := call(t, from, to); err != nil || !strings.HasSuffix(answer, "hello") {
					t.Errorf("connection to %s: %q, %v", to, answer, err)
					return
				}
			}
		})
	}
	workers.Wait()
	s.eventually(func() error {
		runtime.GC() // net keeps the pipes it splices through until then
		if now := descriptors(t); now > before+4 {
			return fmt.Errorf("%d file descriptors are open, before it were %d", now, before)
		}
		return nil
	}, "after all have ended")
}
