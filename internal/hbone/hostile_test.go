package hbone

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/fairlead-mesh/fairlead/internal/tlsrecord"
)

// rawPeer is a client with its own records, so that a test can send what no sane client would.
type rawPeer struct {
	t   *testing.T
	nc  net.Conn
	rec *tlsrecord.Conn
	in  []byte
	fr  *http2.Framer
}

func newRawPeer(t *testing.T, p *pair) *rawPeer {
	t.Helper()
	nc, cfg, err := p.dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(10 * time.Second))
	rec, _, early, err := tlsrecord.Handshake(t.Context(), nc, cfg, false)
	if err != nil {
		t.Fatal(err)
	}
	r := &rawPeer{t: t, nc: nc, rec: rec, in: early}
	r.fr = http2.NewFramer(r, r)
	r.Write([]byte(http2.ClientPreface))
	r.fr.WriteSettings()
	return r
}

func (r *rawPeer) seal(p []byte) []byte {
	b := make([]byte, tlsrecord.HeaderLen+len(p)+tlsrecord.TailLen)
	copy(b[tlsrecord.HeaderLen:], p)
	r.rec.Seal(b, len(p))
	return b
}

func (r *rawPeer) Write(p []byte) (int, error) {
	_, err := r.nc.Write(r.seal(p))
	return len(p), err
}

func (r *rawPeer) Read(p []byte) (int, error) {
	for {
		n, err := r.rec.Length(r.in)
		if err != nil {
			return 0, err
		}
		if n > 0 && len(r.in) >= n {
			data, err := r.rec.Open(bytes.Clone(r.in[:n]))
			if r.in = r.in[n:]; err != nil {
				return 0, err
			}
			if len(data) > len(p) { // give the rest back as it cannot be: the tests read with big buffers
				r.t.Fatal("short buffer")
			}
			if len(data) > 0 {
				return copy(p, data), nil
			}
			continue
		}
		b := make([]byte, 32<<10)
		k, err := r.nc.Read(b)
		r.in = append(r.in, b[:k]...)
		if err != nil {
			return 0, err
		}
	}
}

// frames reads until the connection ends or f says that it has seen enough.
func (r *rawPeer) frames(f func(http2.Frame) bool) error {
	fr := http2.NewFramer(nil, &buffered{r: r})
	for {
		frame, err := fr.ReadFrame()
		if err != nil {
			return err
		}
		if f(frame) {
			return nil
		}
	}
}

// buffered gives rawPeer the big reads it needs.
type buffered struct {
	r io.Reader
	b []byte
}

func (b *buffered) Read(p []byte) (int, error) {
	if len(b.b) == 0 {
		buf := make([]byte, 64<<10)
		n, err := b.r.Read(buf)
		if err != nil {
			return 0, err
		}
		b.b = buf[:n]
	}
	n := copy(p, b.b)
	b.b = b.b[n:]
	return n, nil
}

func (r *rawPeer) connect(id uint32) {
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	e.WriteField(hpack.HeaderField{Name: ":method", Value: "CONNECT"})
	e.WriteField(hpack.HeaderField{Name: ":authority", Value: "a:1"})
	r.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, EndHeaders: true, BlockFragment: b.Bytes()})
}

// TestHostilePeerCostsItsOwnConnection checks that what one peer does wrong ends its connection, is told to it where it
// can be, and leaves a well-behaved tunnel of the same server alone.
func TestHostilePeerCostsItsOwnConnection(t *testing.T) {
	alert := func(want tls.AlertError) func(error) bool {
		return func(err error) bool {
			var a *tlsrecord.AlertError
			return errors.As(err, &a) && a.Alert == want
		}
	}
	for name, tt := range map[string]struct {
		do  func(r *rawPeer)
		end func(error) bool
	}{
		"not HTTP/2":       {func(r *rawPeer) { r.Write(make([]byte, 100)) }, nil},
		"tampered record":  {func(r *rawPeer) { b := r.seal([]byte("x")); b[7] ^= 1; r.nc.Write(b) }, alert(20)},
		"giant record":     {func(r *rawPeer) { r.nc.Write([]byte{23, 3, 3, 0xff, 0xff}) }, alert(22)},
		"cleartext":        {func(r *rawPeer) { r.nc.Write([]byte{22, 3, 3, 0, 20, 24: 0}) }, nil},
		"truncated record": {func(r *rawPeer) { r.nc.Write(r.seal(make([]byte, 100))[:50]); r.nc.(*net.TCPConn).CloseWrite() }, nil},
		"reset":            {func(r *rawPeer) { r.nc.(*net.TCPConn).SetLinger(0); r.nc.Close() }, nil},
		"rapid reset": {func(r *rawPeer) {
			for i := range uint32(3000) {
				r.connect(2*i + 1)
				r.fr.WriteRSTStream(2*i+1, 8)
			}
		}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			drivers(t, func(t *testing.T, client, server Driver) {
				p := newPair(t, client, server, PoolConfig{}, nil)
				good, err := p.open(t.Context(), Request{Authority: "a:1"})
				if err != nil {
					t.Fatal(err)
				}
				r := newRawPeer(t, p)
				tt.do(r)
				err = r.frames(func(http2.Frame) bool { return false })
				if errors.Is(err, context.DeadlineExceeded) || tt.end != nil && !tt.end(err) {
					t.Errorf("the peer sees %v", err)
				}
				await(t, "the server lets go", func() bool {
					p.server.mu.Lock()
					defer p.server.mu.Unlock()
					return len(p.server.tunnels) == 1
				})
				good.Write([]byte("still here"))
				if _, err := io.ReadFull(good, make([]byte, 10)); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// TestKeyUpdates has a peer that changes its key and asks for a change before every frame.
func TestKeyUpdates(t *testing.T) {
	drivers(t, func(t *testing.T, client, server Driver) {
		p := newPair(t, client, server, PoolConfig{}, nil)
		r := newRawPeer(t, p)
		r.connect(1)
		var got []byte
		for i := range 20 {
			b, err := r.rec.AppendKeyUpdate(nil, true)
			if err != nil {
				t.Fatal(err)
			}
			r.nc.Write(b)
			r.fr.WriteData(1, false, pattern(i, 1000))
			want := len(got) + 1000
			if err := r.frames(func(f http2.Frame) bool {
				if d, ok := f.(*http2.DataFrame); ok {
					got = append(got, d.Data()...)
				}
				return len(got) >= want
			}); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got[want-1000:], pattern(i, 1000)) {
				t.Fatalf("round %d: other bytes", i)
			}
		}
	})
}

// TestSilentHandshake has a peer that connects and says nothing.
func TestSilentHandshake(t *testing.T) {
	drivers(t, func(t *testing.T, client, server Driver) {
		p := newPairOf(t, client, server, PoolConfig{}, ServerConfig{HandshakeTimeout: 50 * time.Millisecond})
		nc, err := net.Dial("tcp", p.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		nc.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := nc.Read(make([]byte, 1)); err == nil || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
	})
}

// TestBlockedHandlersAreBounded has a peer that opens and resets streams whose handlers take their time.
func TestBlockedHandlersAreBounded(t *testing.T) {
	drivers(t, func(t *testing.T, client, server Driver) {
		running := make(chan struct{}, 10000)
		stop := make(chan struct{})
		p := newPairOf(t, client, server, PoolConfig{}, ServerConfig{MaxStreams: 20,
			Handle: func(in *Incoming) { running <- struct{}{}; <-stop }})
		defer close(stop)
		r := newRawPeer(t, p)
		for i := range uint32(500) {
			r.connect(2*i + 1)
			r.fr.WriteRSTStream(2*i+1, 8)
		}
		r.fr.WritePing(false, [8]byte{})
		if err := r.frames(func(f http2.Frame) bool { p, ok := f.(*http2.PingFrame); return ok && p.IsAck() }); err != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
		if n := len(running); n > 40 {
			t.Errorf("%d handlers run for a peer that may have 20 streams", n)
		}
	})
}
