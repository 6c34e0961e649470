package hbone

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"io"
	"math/big"
	mrand "math/rand/v2"
	"net"
	"net/netip"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fairlead-mesh/fairlead/internal/relay"
)

// identity makes a certificate authority and two SPIFFE certificates; the configurations verify each other.
func identity(t testing.TB) (client, server *tls.Config) {
	t.Helper()
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true,
		NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	caCert, _ := x509.ParseCertificate(caDER)
	roots.AddCert(caCert)
	leaf := func(sa string) tls.Certificate {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		id, _ := url.Parse("spiffe://cluster.local/ns/default/sa/" + sa)
		der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(2),
			NotAfter: time.Now().Add(time.Hour), URIs: []*url.URL{id}, KeyUsage: x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}, caCert, &key.PublicKey, caKey)
		if err != nil {
			t.Fatal(err)
		}
		return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	}
	verify := func(raw [][]byte, _ [][]*x509.Certificate) error {
		c, err := x509.ParseCertificate(raw[0])
		if err != nil {
			return err
		}
		_, err = c.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
		return err
	}
	base := tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, InsecureSkipVerify: true,
		VerifyPeerCertificate: verify, SessionTicketsDisabled: true}
	client, server = base.Clone(), base.Clone()
	client.Certificates = []tls.Certificate{leaf("client")}
	server.Certificates = []tls.Certificate{leaf("server")}
	server.ClientAuth = tls.RequireAnyClientCert
	return client, server
}

// tcpPair is two ends of one TCP connection over loopback.
func tcpPair(t testing.TB) (a, b *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	ch := make(chan net.Conn, 1)
	go func() { c, _ := ln.Accept(); ch <- c }()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return c.(*net.TCPConn), (<-ch).(*net.TCPConn)
}

// mesh is application -> outbound listener -> Pool ⇢ Server -> backend, as two node proxies would be.
type mesh struct {
	t        testing.TB
	out      net.Listener // where applications connect
	backend  net.Listener
	pool     *Pool
	server   *Server
	resets   chan error // what backend 'r' saw
	mu       sync.Mutex
	results  []relay.Result // of the outbound relays
	inbound  []relay.Result
	incoming func(in *Incoming) bool // true = handled
	streams  chan *Stream            // outbound streams, when not nil

	sendBuffer atomic.Int32 // of the tunnels' sockets on the client's side, bytes; 0 = the kernel's choice
}

func newMesh(t testing.TB, client, server Driver) *mesh {
	t.Helper()
	m := &mesh{t: t, resets: make(chan error, 1000)}
	ccfg, scfg := identity(t)
	listen := func() net.Listener {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ln.Close() })
		return ln
	}
	m.out, m.backend = listen(), listen()
	hb := listen()
	m.pool = NewPool(PoolConfig{Driver: client, MaxStreamsPerTunnel: 300})
	m.server = NewServer(ServerConfig{Driver: server, Handle: m.handle,
		TLS: func(context.Context, *tls.ClientHelloInfo) (*tls.Config, error) { return scfg, nil }})
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(func() { cancel(); m.pool.Close(); m.server.Close() })
	go m.server.Serve(ctx, hb)
	watchTurns(t, client)
	watchTurns(t, server)
	key := Key{Addr: hb.Addr().(*net.TCPAddr).AddrPort()}
	dial := func(ctx context.Context) (net.Conn, *tls.Config, error) {
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", hb.Addr().String())
		if n := int(m.sendBuffer.Load()); err == nil && n > 0 {
			c.(*net.TCPConn).SetWriteBuffer(n)
		}
		return c, ccfg, err
	}
	go accept(m.out, func(c *net.TCPConn) {
		s, err := m.pool.Open(ctx, key, dial, Request{Authority: m.backend.Addr().String()})
		if err != nil {
			c.SetLinger(0)
			c.Close()
			return
		}
		if m.streams != nil {
			m.streams <- s
		}
		s.Relay(c, func(r relay.Result) { m.mu.Lock(); m.results = append(m.results, r); m.mu.Unlock() })
	})
	go accept(m.backend, m.serve)
	return m
}

func accept(ln net.Listener, f func(*net.TCPConn)) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go f(c.(*net.TCPConn))
	}
}

func (m *mesh) handle(in *Incoming) {
	if m.incoming != nil && m.incoming(in) {
		return
	}
	c, err := (&net.Dialer{}).DialContext(in.Context(), "tcp", in.Authority)
	if err != nil {
		in.Reject(503, err.Error())
		return
	}
	s, err := in.Accept()
	if err != nil {
		c.Close()
		return
	}
	s.Relay(c.(*net.TCPConn), func(r relay.Result) { m.mu.Lock(); m.inbound = append(m.inbound, r); m.mu.Unlock() })
}

// serve is the backend: nine bytes say what to do.
func (m *mesh) serve(c *net.TCPConn) {
	defer c.Close()
	var h [9]byte
	if _, err := io.ReadFull(c, h[:1]); err != nil {
		return
	}
	if h[0] == 'B' {
		return
	}
	if _, err := io.ReadFull(c, h[1:]); err != nil {
		return
	}
	n := int(binary.BigEndian.Uint64(h[1:]))
	switch h[0] {
	case 'E': // echo
		io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
	case 'S': // sends n bytes while it reads
		done := make(chan struct{})
		go func() { c.Write(pattern(n, n)); c.CloseWrite(); close(done) }()
		io.Copy(io.Discard, struct{ io.Reader }{c})
		<-done
	case 'D': // reads all, then answers with it reduced
		sum := newSum()
		io.Copy(sum, struct{ io.Reader }{c})
		c.Write(sum.Sum(nil))
	case 'W': // the same, slowly
		sum := newSum()
		b := make([]byte, 64<<10)
		for {
			k, err := c.Read(b)
			sum.Write(b[:k])
			if err != nil {
				break
			}
			time.Sleep(time.Millisecond)
		}
		c.Write(sum.Sum(nil))
	case 'R': // resets
		c.SetLinger(0)
	case 'r': // says that it is there, then reports how it was ended
		c.Write([]byte("k"))
		_, err := io.Copy(io.Discard, c)
		m.resets <- err
	case 'F': // server speaks first, after the header only this harness needs
		c.Write([]byte("hello"))
		io.Copy(io.Discard, c)
	}
}

func (m *mesh) dial(mode byte, n int) *net.TCPConn {
	m.t.Helper()
	c, err := net.Dial("tcp", m.out.Addr().String())
	if err != nil {
		m.t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(60 * time.Second))
	if _, err := c.Write(binary.BigEndian.AppendUint64([]byte{mode}, uint64(n))); err != nil {
		m.t.Error(err)
	}
	return c.(*net.TCPConn)
}

// pattern is n reproducible bytes.
func pattern(seed, n int) []byte {
	b := make([]byte, n)
	mrand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)}).Read(b)
	return b
}

// await waits until ok or fails the test.
func await(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in 10 s: %s", what)
		}
	}
}

// start makes a tunnel of the driver under test whose peer is the raw TLS connection that is returned.
func dialKey(addr net.Addr) Key {
	ap, _ := netip.ParseAddrPort(addr.String())
	return Key{Addr: ap}
}

var errTest = errors.New("cut by the test")
