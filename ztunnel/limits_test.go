package ztunnel_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"testing"
	"time"
)

// TestConnectionsAreLimited: a pod has no more connections than it may, in either direction, and others have theirs.
func TestConnectionsAreLimited(t *testing.T) {
	const most = 6
	s := newShop(t, map[string]string{"FAIRLEAD_POD_MAX_CONNECTIONS": fmt.Sprint(most)})
	for _, tc := range []struct {
		name string
		from *os.File
		to   string
		full *node // whose pod is full
		line map[string]any
	}{
		{"out, through a tunnel", s.client.ns, s.vip4, s.node1, map[string]any{"direction": "outbound", "src.addr": contains(s.client.ip4.String())}},
		{"out, outside of the mesh", s.client.ns, fabric4 + ":8080", s.node1, map[string]any{"direction": "outbound", "dst.addr": fabric4 + ":8080"}},
		{"in, plaintext", s.fabric, s.far4, s.node2, map[string]any{"direction": "inbound", "src.addr": contains(fabric4)}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var open []net.Conn
			for range most {
				open = append(open, s.greeted(tc.from, tc.to))
			}
			if answer, err := call(t, tc.from, tc.to); err == nil {
				t.Errorf("one too many was answered %q", answer)
			}
			tc.line["response_flags"], tc.line["error"] = "LIMIT", contains("most connections (6)")
			tc.full.line(t, tc.line)
			if answer, err := call(t, s.near.ns, fabric4+":8080"); err != nil {
				t.Errorf("another pod: %q, %v", answer, err)
			}
			for _, conn := range open {
				conn.Close()
			}
			s.eventually(func() error { _, err := call(t, tc.from, tc.to); return err }, "when the others have ended")
		})
	}
	checkMetrics(t, s.node1, "fairlead_pod_limit_hits_total{", `limit="connections"`, `pod="client"`, `namespace="shop"`)
	checkMetrics(t, s.node2, "fairlead_pod_limit_hits_total{", `limit="connections"`, `pod="far"`)
}

// TestHalfClosedIsReaped: what one end has closed and the other does not use is cut; what is used, or open, is not.
func TestHalfClosedIsReaped(t *testing.T) {
	s := newShop(t, map[string]string{"FAIRLEAD_HALF_CLOSED_TIMEOUT": "400ms"})
	serveStubborn(t, s.far.ns, 8081)
	serveStubborn(t, s.near.ns, 8081)
	for name, to := range map[string]string{
		"through a tunnel": s.far.ip4.String() + ":8081",
		"within the node":  s.near.ip4.String() + ":8081",
	} {
		t.Run(name, func(t *testing.T) {
			idle, busy, open := s.greeted(s.client.ns, to), s.greeted(s.client.ns, to), s.greeted(s.client.ns, to)
			for _, conn := range []*net.TCPConn{idle, busy} {
				if _, err := fmt.Fprintf(conn, "%v\n", conn == busy); err != nil {
					t.Fatal(err)
				}
				if err := conn.CloseWrite(); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := io.ReadAll(idle); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("idle: %v, want it cut", err)
			}
			if n, err := io.Copy(io.Discard, io.LimitReader(busy, 15)); err != nil { // 1.5 s of it
				t.Errorf("busy: %v after %d bytes", err, n)
			}
			open.SetDeadline(time.Now().Add(50 * time.Millisecond))
			if _, err := open.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("open: %v, want nothing to happen", err)
			}
		})
	}
	s.node1.line(t, map[string]any{"direction": "outbound", "response_flags": "IDLE", "path": "node", "error": contains("half closed")})
	s.node2.line(t, map[string]any{"direction": "inbound", "path": "hbone", "dst.addr": s.far.ip4.String() + ":8081"})
}

// serveStubborn greets, and never closes: after a line that says true it sends a byte every 100 ms, else nothing.
func serveStubborn(t *testing.T, ns *os.File, port int) {
	t.Helper()
	stop := make(chan struct{})
	t.Cleanup(func() { close(stop) })
	accept(t, ns, port, func(conn net.Conn) {
		fmt.Fprintln(conn, "hello")
		var busy bool
		if _, err := fmt.Fscanln(conn, &busy); err != nil || !busy {
			<-stop
			return
		}
		for {
			select {
			case <-stop:
				return
			case <-time.After(100 * time.Millisecond):
				if _, err := conn.Write([]byte("x")); err != nil {
					return
				}
			}
		}
	})
}
