package ztunnel_test

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fairlead-mesh/fairlead/internal/identity"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/netns"
	"github.com/fairlead-mesh/fairlead/internal/zds"
)

// pingPong plays over a connection of its own until stop, which reports how it went.
func (s *shop) pingPong(t *testing.T, to string) (stop func()) {
	t.Helper()
	conn := s.greeted(s.client.ns, to)
	end, done := make(chan struct{}), make(chan error, 1)
	var rounds int
	var longest time.Duration
	go func() {
		b := make([]byte, 64)
		for {
			start := time.Now()
			conn.SetDeadline(start.Add(5 * time.Second))
			_, err := conn.Write(b)
			if err == nil {
				_, err = io.ReadFull(conn, b)
			}
			if err != nil {
				done <- err
				return
			}
			rounds++
			longest = max(longest, time.Since(start))
			select {
			case <-end:
				done <- nil
				return
			case <-time.After(time.Millisecond):
			}
		}
	}()
	return func() {
		t.Helper()
		close(end)
		if err := <-done; err != nil {
			t.Errorf("the victim beside it: %v after %d rounds", err, rounds)
		}
		t.Logf("the victim beside it: %d rounds, the longest took %v", rounds, longest)
	}
}

// TestHostileClients: whoever cannot prove an identity of this mesh gets no tunnel, however often it tries, and those
// that can play on. The control is a client whose only difference is a good certificate.
func TestHostileClients(t *testing.T) {
	s := newShop(t, nil)
	client := mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "client"}
	server := mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "far"}
	other, err := identity.NewSelfSigned("cluster.local", 0)
	s.must(err)
	bundle := func(from *identity.SelfSigned, id mesh.Identity) *identity.Bundle {
		b, err := from.Fetch(t.Context(), id)
		s.must(err)
		return b
	}
	good := bundle(s.authority, client)
	another := *good
	another.Certificate = bundle(other, client).Certificate
	foreign := *good
	foreign.Certificate = bundle(s.authority, mesh.Identity{TrustDomain: "elsewhere.local", Namespace: "shop", ServiceAccount: "client"}).Certificate
	none := *good
	none.Certificate = tls.Certificate{}
	for _, tc := range []struct {
		name   string
		config *tls.Config // nil: no TLS at all
		wanted bool
	}{
		{"control", identity.ClientTLS(good, []mesh.Identity{server}), true},
		{"no certificate", identity.ClientTLS(&none, []mesh.Identity{server}), false},
		{"certificate of another root", identity.ClientTLS(&another, []mesh.Identity{server}), false},
		{"another trust domain", identity.ClientTLS(&foreign, []mesh.Identity{server}), false},
		{"no TLS", nil, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			defer s.pingPong(t, s.vip4)()
			var peers sync.WaitGroup
			for range 8 {
				peers.Go(func() {
					for range 25 {
						if err := s.knock(tc.config); (err == nil) != tc.wanted {
							t.Errorf("a tunnel: %v, wanted %v", err, tc.wanted)
						}
					}
				})
			}
			peers.Wait()
		})
	}
}

// knock tries to open a tunnel to the far pod; it stands when the server has begun to speak HTTP/2 in it.
func (s *shop) knock(config *tls.Config) error {
	ctx, cancel := context.WithTimeout(s.t.Context(), 10*time.Second)
	defer cancel()
	conn, err := netns.Dial(ctx, s.fabric, netns.DialOptions{}, netip.AddrPortFrom(s.far.ip4, 15008))
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	var nc net.Conn = conn
	if config != nil {
		secured := tls.Client(conn, config)
		if err := secured.HandshakeContext(ctx); err != nil {
			return err
		}
		nc = secured
	} else if _, err := io.WriteString(nc, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"); err != nil {
		return err
	}
	// A server speaks first; one that sends an alert instead ends the connection.
	b := make([]byte, 9)
	_, err = io.ReadFull(nc, b)
	if err == nil && b[3] != 4 { // the type of a SETTINGS frame
		err = io.ErrUnexpectedEOF
	}
	return err
}

// TestHostileAgent: whoever poses as the agent and hands over something that is no network namespace is told so, whatever it
// calls the pod, and the pods that are served go on.
func TestHostileAgent(t *testing.T) {
	s := newShop(t, nil)
	reader, writer, err := os.Pipe()
	s.must(err)
	defer reader.Close()
	defer writer.Close()
	for name, path := range map[string]string{"a file": "/etc/passwd", "a directory": "/", "another kind of namespace": "/proc/self/ns/uts", "a pipe": ""} {
		descriptor := reader
		if path != "" {
			descriptor, err = os.Open(path)
			s.must(err)
			defer descriptor.Close()
		}
		for _, uid := range []string{"uid-new", "uid-" + s.client.name} {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			err := s.node1.agent.Add(ctx, zds.Workload{UID: uid, Name: "../" + name, Namespace: "shop", ServiceAccount: "sa", Netns: descriptor})
			if err == nil || !strings.Contains(err.Error(), "namespace") || ctx.Err() != nil {
				t.Errorf("%s as %s: %v", name, uid, err)
			}
			cancel()
		}
	}
	s.greeted(s.client.ns, s.far4).Close()
}
