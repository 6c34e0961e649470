package hbone

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/net/nettest"
)

// pair is a Pool and a Server over loopback; handle may be nil: echo of the stream.
type pair struct {
	pool   *Pool
	server *Server
	key    Key
	dial   Dialer
	addr   string
	dials  int
	mu     sync.Mutex
}

func newPair(t testing.TB, client, server Driver, pc PoolConfig, handle func(*Incoming)) *pair {
	t.Helper()
	return newPairOf(t, client, server, pc, ServerConfig{Handle: handle})
}

func newPairOf(t testing.TB, client, server Driver, pc PoolConfig, sc ServerConfig) *pair {
	t.Helper()
	ccfg, scfg := identity(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if sc.Handle == nil {
		sc.Handle = echoHandler
	}
	pc.Driver, sc.Driver = client, server
	sc.TLS = func(context.Context, *tls.ClientHelloInfo) (*tls.Config, error) { return scfg, nil }
	p := &pair{pool: NewPool(pc), addr: ln.Addr().String(), key: dialKey(ln.Addr())}
	p.server = NewServer(sc)
	p.dial = func(ctx context.Context) (net.Conn, *tls.Config, error) {
		p.mu.Lock()
		p.dials++
		p.mu.Unlock()
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", p.addr)
		return c, ccfg, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(func() { p.pool.Close(); p.server.Close(); cancel() })
	go p.server.Serve(ctx, ln)
	return p
}

func (p *pair) open(ctx context.Context, req Request) (*Stream, error) {
	return p.pool.Open(ctx, p.key, p.dial, req)
}

func echoHandler(in *Incoming) {
	s, err := in.Accept()
	if err != nil {
		return
	}
	defer s.Close()
	io.Copy(struct{ io.Writer }{s}, struct{ io.Reader }{s})
}

func TestOpenCarriesTheRequest(t *testing.T) {
	drivers(t, func(t *testing.T, client, server Driver) {
		type seen struct {
			Authority, ID string
			Header        []hpack.HeaderField
			Addrs         bool
		}
		got := make(chan seen, 1)
		p := newPair(t, client, server, PoolConfig{}, func(in *Incoming) {
			got <- seen{in.Authority, in.Peer.PeerCertificates[0].URIs[0].String(), in.Header,
				in.RemoteAddr.IsValid() && in.LocalAddr.IsValid()}
			echoHandler(in)
		})
		h := []hpack.HeaderField{{Name: "forwarded", Value: `for="10.0.0.1:80"`}, {Name: "baggage", Value: strings.Repeat("x", 20000)}}
		s, err := p.open(t.Context(), Request{Authority: "10.1.2.3:80", Header: h})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		want := seen{"10.1.2.3:80", "spiffe://cluster.local/ns/default/sa/client", h, true}
		if d := cmp.Diff(want, <-got); d != "" {
			t.Error(d)
		}
		if id := s.ConnectionState().PeerCertificates[0].URIs[0].String(); id != "spiffe://cluster.local/ns/default/sa/server" {
			t.Errorf("server is %s", id)
		}
		if c := s.ConnectionState().CurveID; c != tls.X25519MLKEM768 {
			t.Errorf("curve %v, want the post-quantum hybrid", c)
		}
	})
}

func TestOpenErrors(t *testing.T) {
	drivers(t, func(t *testing.T, client, server Driver) {
		p := newPair(t, client, server, PoolConfig{}, func(in *Incoming) { in.Reject(401, `policy "deny\all" é`) })
		_, err := p.open(t.Context(), Request{Authority: "a:1"})
		var status *StatusError
		if !errors.As(err, &status) || status.Code != 401 || status.Reason != `policy "deny\all" ?` {
			t.Errorf("rejected stream gives %v", err)
		}
		refused := func(context.Context) (net.Conn, *tls.Config, error) { return nil, nil, syscall.ECONNREFUSED }
		_, err = p.pool.Open(t.Context(), Key{Source: "other"}, refused, Request{Authority: "a:1"})
		var dial *DialError
		if !errors.As(err, &dial) || !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("failed dial gives %v", err)
		}
		stranger, _ := identity(t)
		wrong := func(ctx context.Context) (net.Conn, *tls.Config, error) {
			c, _, err := p.dial(ctx)
			return c, stranger, err
		}
		_, err = p.pool.Open(t.Context(), Key{Source: "third"}, wrong, Request{Authority: "a:1"})
		var tlsErr *TLSError
		if !errors.As(err, &tlsErr) {
			t.Errorf("failed handshake gives %v", err)
		}
	})
}

func TestOpenGivesUp(t *testing.T) {
	drivers(t, func(t *testing.T, client, server Driver) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		gone := make(chan struct{})
		p := newPair(t, client, server, PoolConfig{}, func(in *Incoming) { cancel(); <-in.Context().Done(); close(gone) })
		if _, err := p.open(ctx, Request{Authority: "a:1"}); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
		select {
		case <-gone:
		case <-time.After(5 * time.Second):
			t.Error("the server was not told")
		}
	})
}

func TestStreamsShareATunnel(t *testing.T) {
	drivers(t, func(t *testing.T, client, server Driver) {
		p := newPair(t, client, server, PoolConfig{MaxStreamsPerTunnel: 10}, nil)
		var wg sync.WaitGroup
		for i := range 25 {
			wg.Go(func() {
				s, err := p.open(t.Context(), Request{Authority: "a:1"})
				if err != nil {
					t.Error(err)
					return
				}
				fmt.Fprintf(s, "hello %d", i)
				s.CloseWrite()
				if b, err := io.ReadAll(s); err != nil || string(b) != fmt.Sprintf("hello %d", i) {
					t.Errorf("got %q, %v", b, err)
				}
				time.Sleep(100 * time.Millisecond) // hold on, so that all are open at once
				s.Close()
			})
		}
		wg.Wait()
		if p.dials > 3 {
			t.Errorf("%d dials for 25 streams of 10 each", p.dials)
		}
	})
}

// TestBurstMakesTunnelsAtOnce: streams that need several tunnels do not wait for one handshake after the other.
func TestBurstMakesTunnelsAtOnce(t *testing.T) {
	drivers(t, func(t *testing.T, client, server Driver) {
		p := newPair(t, client, server, PoolConfig{MaxStreamsPerTunnel: 2}, nil)
		var underWay sync.WaitGroup
		underWay.Add(3)
		dial := func(ctx context.Context) (net.Conn, *tls.Config, error) {
			underWay.Done()
			underWay.Wait()
			return p.dial(ctx)
		}
		opened := make(chan error, 6)
		for range cap(opened) {
			go func() {
				_, err := p.pool.Open(t.Context(), p.key, dial, Request{Authority: "a:1"})
				opened <- err
			}()
		}
		for range cap(opened) {
			select {
			case err := <-opened:
				if err != nil {
					t.Error(err)
				}
			case <-time.After(20 * time.Second):
				t.Fatal("the handshakes wait for each other")
			}
		}
	})
}

func TestIdleTunnelIsReleased(t *testing.T) {
	drivers(t, func(t *testing.T, client, server Driver) {
		p := newPair(t, client, server, PoolConfig{IdleTimeout: 20 * time.Millisecond}, nil)
		s, err := p.open(t.Context(), Request{Authority: "a:1"})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(60 * time.Millisecond)
		if p.pool.Tunnels() != 1 {
			t.Error("released although a stream is open")
		}
		s.CloseWrite()
		io.ReadAll(s)
		await(t, "the idle tunnel is released", func() bool { return p.pool.Tunnels() == 0 })
		await(t, "the server has let go", func() bool {
			p.server.mu.Lock()
			defer p.server.mu.Unlock()
			return len(p.server.tunnels) == 0
		})
	})
}

func TestDrain(t *testing.T) {
	drivers(t, func(t *testing.T, client, server Driver) {
		p := newPair(t, client, server, PoolConfig{}, nil)
		s, err := p.open(t.Context(), Request{Authority: "a:1"})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if err := p.server.Drain(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("drain with an open stream gives %v", err)
		}
		if _, err := p.open(t.Context(), Request{Authority: "a:1"}); err == nil {
			t.Error("a stream was opened on a server that drains")
		}
		io.WriteString(s, "still here")
		s.CloseWrite()
		if b, err := io.ReadAll(s); err != nil || string(b) != "still here" {
			t.Errorf("open stream during the drain: %q, %v", b, err)
		}
		if err := p.server.Drain(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestPeerIsAskedForLife(t *testing.T) {
	drivers(t, func(t *testing.T, client, server Driver) {
		p := newPair(t, client, server, PoolConfig{PingInterval: 20 * time.Millisecond, PingTimeout: 100 * time.Millisecond}, nil)
		a, b := tcpPair(t) // a middle box that can fall silent
		ccfg, silent := (*tls.Config)(nil), make(chan struct{})
		dial := func(ctx context.Context) (net.Conn, *tls.Config, error) {
			c, cfg, err := p.dial(ctx)
			ccfg = cfg
			go io.Copy(b, c)
			go func() {
				buf := make([]byte, 32<<10)
				for {
					n, err := b.Read(buf)
					if err != nil {
						return
					}
					select {
					case <-silent:
					default:
						c.Write(buf[:n])
					}
				}
			}()
			return a, ccfg, err
		}
		s, err := p.pool.Open(t.Context(), p.key, dial, Request{Authority: "a:1"})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(300 * time.Millisecond)
		if p.pool.Tunnels() != 1 {
			t.Fatal("a tunnel that answers was given up")
		}
		close(silent)
		var lost *TunnelError
		if _, err := s.Read(make([]byte, 1)); !errors.As(err, &lost) {
			t.Errorf("got %v", err)
		}
	})
}

func TestStreamIsANetConn(t *testing.T) {
	drivers(t, func(t *testing.T, client, server Driver) {
		nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
			other := make(chan *Stream, 1)
			p := newPair(t, client, server, PoolConfig{}, func(in *Incoming) {
				s, _ := in.Accept()
				other <- s
			})
			s, err := p.open(context.Background(), Request{Authority: "a:1"})
			if err != nil {
				return nil, nil, nil, err
			}
			o := <-other
			return s, o, func() { s.Close(); o.Close(); p.pool.Close(); p.server.Close() }, nil
		})
	})
}

// TestManyStreamsOfRests reads on each of many streams less than makes the driver tell the peer at once: all of it
// together must not use up the connection's window.
func TestManyStreamsOfRests(t *testing.T) {
	drivers(t, func(t *testing.T, client, server Driver) {
		p := newPair(t, client, server, PoolConfig{MaxStreamsPerTunnel: 300}, nil)
		var open []*Stream
		for range 120 {
			s, err := p.open(t.Context(), Request{Authority: "a:1"})
			if err != nil {
				t.Fatal(err)
			}
			open = append(open, s)
			s.SetDeadline(time.Now().Add(20 * time.Second))
			want := pattern(1, 300<<10)
			go s.Write(want)
			got := make([]byte, len(want))
			if _, err := io.ReadFull(s, got); err != nil || string(got) != string(want) {
				t.Fatalf("stream %d: %v", len(open), err)
			}
		}
	})
}

func TestDeadline(t *testing.T) {
	drivers(t, func(t *testing.T, client, server Driver) {
		p := newPair(t, client, server, PoolConfig{}, func(in *Incoming) {
			s, _ := in.Accept()
			<-in.Context().Done()
			_ = s
		})
		s, err := p.open(t.Context(), Request{Authority: "a:1"})
		if err != nil {
			t.Fatal(err)
		}
		s.SetDeadline(time.Now().Add(20 * time.Millisecond))
		if _, err := s.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("Read gives %v", err)
		}
	})
}

// TestServesNetHTTP2Client has golang.org/x/net/http2's transport as the client.
func TestServesNetHTTP2Client(t *testing.T) {
	drivers(t, func(t *testing.T, _, server Driver) {
		p := newPair(t, Goroutines(), server, PoolConfig{}, func(in *Incoming) {
			if in.Authority == "denied:1" {
				in.Reject(401, "")
				return
			}
			echoHandler(in)
		})
		tr := &http2.Transport{DialTLSContext: func(ctx context.Context, _, _ string, _ *tls.Config) (net.Conn, error) {
			c, cfg, err := p.dial(ctx)
			if err != nil {
				return nil, err
			}
			tc := tls.Client(c, cfg)
			return tc, tc.HandshakeContext(ctx)
		}}
		defer tr.CloseIdleConnections()
		for _, n := range []int{0, 1, 70000, 9 << 20} {
			body := pattern(n, n)
			r, w := io.Pipe()
			go func() { w.Write(body); w.Close() }()
			res, err := tr.RoundTrip(&http.Request{Method: "CONNECT", URL: &url.URL{Scheme: "https", Host: p.addr}, Host: "10.0.0.1:80",
				Header: http.Header{}, Body: r, ContentLength: -1})
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(res.Body)
			if err != nil || res.StatusCode != 200 || string(got) != string(body) {
				t.Errorf("%d bytes: status %d, %d came back, %v", n, res.StatusCode, len(got), err)
			}
		}
		res, err := tr.RoundTrip(&http.Request{Method: "CONNECT", URL: &url.URL{Scheme: "https", Host: p.addr}, Host: "denied:1", Header: http.Header{}})
		if err != nil || res.StatusCode != 401 {
			t.Errorf("denied: %v, %v", res, err)
		}
	})
}

// newHTTP2Peer is a pool whose peer is golang.org/x/net/http2's server. It gives the connections that the server has.
func newHTTP2Peer(t *testing.T, client Driver, handler http.HandlerFunc) (*pair, <-chan net.Conn) {
	t.Helper()
	ccfg, scfg := identity(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	conns := make(chan net.Conn, 10)
	go accept(ln, func(c *net.TCPConn) {
		tc := tls.Server(c, scfg)
		if tc.Handshake() != nil {
			return
		}
		conns <- c
		(&http2.Server{}).ServeConn(tc, &http2.ServeConnOpts{Handler: handler})
	})
	p := &pair{pool: NewPool(PoolConfig{Driver: client}), key: dialKey(ln.Addr())}
	p.dial = func(context.Context) (net.Conn, *tls.Config, error) {
		c, err := net.Dial("tcp", ln.Addr().String())
		return c, ccfg, err
	}
	t.Cleanup(func() { p.pool.Close(); ln.Close() })
	return p, conns
}

// TestUsesNetHTTP2Server has golang.org/x/net/http2's server as the peer.
func TestUsesNetHTTP2Server(t *testing.T) {
	drivers(t, func(t *testing.T, client, _ Driver) {
		p, _ := newHTTP2Peer(t, client, func(w http.ResponseWriter, r *http.Request) {
			if r.Host == "denied:1" {
				w.WriteHeader(401)
				return
			}
			w.WriteHeader(200)
			rc := http.NewResponseController(w)
			rc.Flush()
			b := make([]byte, 30000)
			for {
				n, err := r.Body.Read(b)
				w.Write(b[:n])
				rc.Flush()
				if err != nil {
					return
				}
			}
		})
		for _, n := range []int{0, 1, 70000, 9 << 20} {
			s, err := p.open(t.Context(), Request{Authority: "10.0.0.1:80"})
			if err != nil {
				t.Fatal(err)
			}
			body := pattern(n, n)
			go func() { s.Write(body); s.CloseWrite() }()
			if got, err := io.ReadAll(s); err != nil || string(got) != string(body) {
				t.Errorf("%d bytes: %d came back, %v", n, len(got), err)
			}
		}
		_, err := p.open(t.Context(), Request{Authority: "denied:1"})
		var status *StatusError
		if !errors.As(err, &status) || status.Code != 401 {
			t.Errorf("denied gives %v", err)
		}
	})
}
