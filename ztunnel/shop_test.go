package ztunnel_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// serveEcho answers on port inside ns with the client's address and a newline, and then with what it is sent.
func serveEcho(t *testing.T, ns *os.File, port int) {
	t.Helper()
	accept(t, ns, port, func(conn net.Conn) {
		peer := conn.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
		fmt.Fprintln(conn, peer)
		io.Copy(conn, conn)
	})
}

// accept serves each connection to port inside ns.
func accept(t *testing.T, ns *os.File, port int, serve func(net.Conn)) {
	t.Helper()
	err := netns.Do(ns, func() error {
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer conn.Close()
					serve(conn)
				}()
			}
		}()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// dial connects from inside ns as an application does.
func dial(ctx context.Context, ns *os.File, to string) (*net.TCPConn, error) {
	return netns.Dial(ctx, ns, netns.DialOptions{}, netip.MustParseAddrPort(to))
}

// call connects, says hello, ends its direction, and returns what the server answered.
func call(t *testing.T, ns *os.File, to string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	conn, err := dial(ctx, ns, to)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(conn, "hello"); err != nil {
		return "", err
	}
	if err := conn.CloseWrite(); err != nil && !errors.Is(err, syscall.ENOTCONN) { // it was reset meanwhile: reading says so
		return "", err
	}
	answer, err := io.ReadAll(conn)
	return string(answer), err
}

func identityOf(name string) string { return "spiffe://cluster.local/ns/shop/sa/" + name }

// shop is a world with a client and a server on node1, another server on node2, a service over the latter, and an
// unmeshed peer.
type shop struct {
	*world
	node1, node2                *node
	client, near, far           *pod
	workloads                   []*mesh.Workload
	services                    []*mesh.Service
	vip4, vip6, far4, near4     string
	farWorkload, clientWorkload *mesh.Workload
}

func newShop(t *testing.T, env map[string]string) *shop {
	t.Helper()
	w := newWorld(t)
	s := &shop{world: w, client: w.pod("client", 2), near: w.pod("near", 3), far: w.pod("far", 4)}
	host := mesh.NamespacedHostname{Namespace: "shop", Hostname: "web.shop.svc.cluster.local"}
	s.farWorkload = s.far.workload("node2", func(w *mesh.Workload) {
		w.Services[host] = []mesh.Port{{ServicePort: 80, TargetPort: 8080}}
	})
	s.clientWorkload = s.client.workload("node1", nil)
	s.workloads = []*mesh.Workload{s.clientWorkload, s.near.workload("node1", nil), s.farWorkload}
	s.services = []*mesh.Service{{
		Name: "web", Namespace: "shop", Hostname: host.Hostname, Ports: []mesh.Port{{ServicePort: 80, TargetPort: 8080}},
		Addresses: []mesh.NetworkAddress{{Address: netip.MustParseAddr("10.96.0.1")}, {Address: netip.MustParseAddr("fd96::1")}},
	}}
	s.vip4, s.vip6, s.far4, s.near4 = "10.96.0.1:80", "[fd96::1]:80", s.far.ip4.String()+":8080", s.near.ip4.String()+":8080"
	for _, ns := range []*os.File{s.near.ns, s.far.ns, s.fabric} {
		serveEcho(t, ns, 8080)
	}
	s.node1, s.node2 = w.node("node1", env), w.node("node2", env)
	s.push(s.workloads, s.services, nil)
	w.enrol(s.node1, s.client)
	w.enrol(s.node1, s.near)
	w.enrol(s.node2, s.far)
	return s
}

// deny is a policy that stops the client at every workload of the namespace.
func deny(names ...string) *mesh.Authorization {
	match := mesh.Match{}
	for _, name := range names {
		match.Principals = append(match.Principals, mesh.StringMatch{Value: "cluster.local/ns/shop/sa/" + name})
	}
	return &mesh.Authorization{
		Name: "deny", Namespace: "shop", Scope: mesh.ScopeNamespace, Action: mesh.ActionDeny,
		Rules: []mesh.Rule{{Clauses: []mesh.Clause{{Matches: []mesh.Match{match}}}}},
	}
}

// strict is what the control plane makes of a strict PeerAuthentication.
func strict() *mesh.Authorization {
	return &mesh.Authorization{
		Name: "strict", Namespace: "shop", Scope: mesh.ScopeNamespace, Action: mesh.ActionDeny,
		Rules: []mesh.Rule{{Clauses: []mesh.Clause{{Matches: []mesh.Match{{NotPrincipals: []mesh.StringMatch{{Kind: mesh.MatchPresence}}}}}}}},
	}
}

// checkMetrics wants one line with all of these in the node's metrics.
func checkMetrics(t *testing.T, n *node, want ...string) {
	t.Helper()
	response, err := http.Get("http://" + n.stats + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
next:
	for line := range strings.Lines(string(body)) {
		for _, part := range want {
			if !strings.Contains(line, part) {
				continue next
			}
		}
		return
	}
	t.Errorf("no metric with %q in\n%s", want, body)
}

// greeted opens a connection and reads the server's greeting.
func (s *shop) greeted(ns *os.File, to string) *net.TCPConn {
	s.t.Helper()
	conn, err := dial(s.t.Context(), ns, to)
	s.must(err)
	s.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	b := make([]byte, 1)
	for b[0] != '\n' {
		_, err := io.ReadFull(conn, b)
		s.must(err)
	}
	return conn
}

func (s *shop) eventually(try func() error, what string) {
	s.t.Helper()
	var err error
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if err = try(); err == nil {
			return
		}
	}
	s.t.Errorf("%s: %v", what, err)
}

func cookieOf(t *testing.T, ns *os.File) uint64 {
	t.Helper()
	cookie, err := netns.Cookie(ns)
	if err != nil {
		t.Fatal(err)
	}
	return cookie
}

func descriptors(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}
