package hbone

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/internal/loop"
	"github.com/fairlead-mesh/fairlead/internal/relay"
)

// outcome is what Start has told.
type outcome struct {
	s   *Stream
	err error
}

// startEarly gives Start an application's socket; the application's end is app.
func (p *pair) startEarly(t *testing.T, app *net.TCPConn, fd int) <-chan outcome {
	t.Helper()
	app.SetDeadline(time.Now().Add(20 * time.Second))
	told := make(chan outcome, 1)
	p.pool.Start(t.Context(), 10*time.Second, p.key, p.dial, Request{Authority: "a:1"}, fd, func(s *Stream, err error) { told <- outcome{s, err} })
	return told
}

// detachedPair is tcpPair with a bare descriptor.
func detachedPair(t *testing.T) (app *net.TCPConn, fd int) {
	t.Helper()
	app, far := tcpPair(t)
	t.Cleanup(func() { app.Close() })
	fd, err := loop.Detach(far)
	if err != nil {
		t.Fatal(err)
	}
	return app, fd
}

// TestEarlyData has a server that answers only when it has seen the application's first bytes, sent before or after the
// request. What follows them, and what did not fit, comes once and in order.
func TestEarlyData(t *testing.T) {
	for name, sendFirst := range map[string]bool{"sent before the request": true, "sent after it": false} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, newLoops(t, 1), newLoops(t, 1), PoolConfig{}, func(in *Incoming) {
				if in.Authority == "b:1" {
					in.Accept()
					return
				}
				await(t, "bytes before the answer", func() bool {
					in.s.mu.Lock()
					defer in.s.mu.Unlock()
					return len(in.s.rq) > 0
				})
				echoHandler(in)
			})
			p.stand(t)
			for _, n := range []int{1, 16 << 10, 100000, 9 << 20} {
				app, fd := detachedPair(t)
				want := pattern(n, n)
				write := func() { go func() { app.Write(want); app.CloseWrite() }() }
				if sendFirst {
					write()
					await(t, "bytes in the socket", func() bool { k, _ := loop.Peek(fd, make([]byte, 1)); return k == 1 })
				}
				told := p.startEarly(t, app, fd)
				if !sendFirst {
					write()
				}
				o := <-told
				if o.err != nil {
					t.Fatal(o.err)
				}
				done := make(chan relay.Result, 1)
				o.s.RelayFD(fd, func(r relay.Result) { done <- r })
				if got, err := io.ReadAll(app); err != nil || string(got) != string(want) {
					t.Errorf("%d bytes: got %d, %v", n, len(got), err)
				}
				if r := <-done; r != (relay.Result{Sent: int64(n), Received: int64(n)}) {
					t.Errorf("%d bytes: %+v", n, r)
				}
			}
		})
	}
}

// TestEarlyDataOnATunnelThatBreaks has a tunnel with a full buffer that turns out to be lost while the CONNECT is sent. The
// connection goes on with the next tunnel.
func TestEarlyDataOnATunnelThatBreaks(t *testing.T) {
	p := newPair(t, newLoops(t, 1), newLoops(t, 1), PoolConfig{}, echoHandler)
	s, err := p.open(t.Context(), Request{Authority: "b:1"})
	if err != nil {
		t.Fatal(err)
	}
	app, fd := detachedPair(t)
	want := pattern(5000, 1)
	app.Write(want)
	tunnel := s.t.(*loopTunnel)
	told := make(chan (<-chan outcome), 1)
	tunnel.w.loop.Post(func() {
		tunnel.flush()
		tunnel.buf = tunnel.w.sendBuffer()
		tunnel.sent, tunnel.sealed = 0, len(tunnel.buf)
		unix.Shutdown(tunnel.fd, unix.SHUT_RDWR)
		told <- p.startEarly(t, app, fd)
	})
	o := <-<-told
	if o.err != nil {
		t.Fatal(o.err)
	}
	o.s.RelayFD(fd, func(relay.Result) {})
	app.CloseWrite()
	if got, err := io.ReadAll(app); err != nil || string(got) != string(want) {
		t.Errorf("got %d bytes, %v", len(got), err)
	}
}

// stand makes the pool's first tunnel.
func (p *pair) stand(t *testing.T) {
	t.Helper()
	s, err := p.open(t.Context(), Request{Authority: "b:1"})
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
}

// scripted is a server of which a test says what it does with each frame.
type scripted struct {
	fr     *http2.Framer
	nc     net.Conn
	tunnel int // counts from 0
}

// serveScript accepts tunnels, one after the other.
func serveScript(t *testing.T, ln net.Listener, cfg *tls.Config, frame func(*scripted, http2.Frame)) {
	for tunnel := 0; ; tunnel++ {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		t.Cleanup(func() { c.Close() })
		go func() {
			tc := tls.Server(c, cfg)
			if _, err := io.ReadFull(tc, make([]byte, len(http2.ClientPreface))); err != nil {
				return
			}
			s := &scripted{fr: http2.NewFramer(tc, tc), nc: c, tunnel: tunnel}
			s.fr.WriteSettings()
			for {
				f, err := s.fr.ReadFrame()
				if err != nil {
					return
				}
				frame(s, f)
			}
		}()
	}
}

func (s *scripted) answer(id uint32, status string, end bool) {
	var b bytes.Buffer
	hpack.NewEncoder(&b).WriteField(hpack.HeaderField{Name: ":status", Value: status})
	s.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, EndHeaders: true, EndStream: end, BlockFragment: b.Bytes()})
}

// TestEarlyDataThatFails has a peer that sees the first bytes of a stream and does not take it: what it has surely not looked
// at goes once more, with the same bytes; all else ends there, with the bytes still in the application's socket.
func TestEarlyDataThatFails(t *testing.T) {
	const message = "of which none may be lost, nor come twice"
	for name, tt := range map[string]struct {
		fate   func(s *scripted, id uint32)
		repeat bool
		is     func(error) bool
	}{
		"refused":            {fate: func(s *scripted, id uint32) { s.fr.WriteRSTStream(id, http2.ErrCodeRefusedStream) }, repeat: true},
		"left out by GOAWAY": {fate: func(s *scripted, id uint32) { s.fr.WriteGoAway(id-2, http2.ErrCodeNo, nil) }, repeat: true},
		"denied": {fate: func(s *scripted, id uint32) { s.answer(id, "401", true) },
			is: func(err error) bool { return statusIs(err, 401) }},
		"cannot connect": {fate: func(s *scripted, id uint32) { s.answer(id, "503", false) },
			is: func(err error) bool { return statusIs(err, 503) }},
		"reset": {fate: func(s *scripted, id uint32) { s.fr.WriteRSTStream(id, http2.ErrCodeCancel) },
			is: func(err error) bool { return errors.Is(err, errConnReset) }},
		"tunnel lost": {fate: func(s *scripted, _ uint32) { s.nc.Close() },
			is: func(err error) bool { var lost *TunnelError; return errors.As(err, &lost) }},
	} {
		t.Run(name, func(t *testing.T) {
			ccfg, scfg := identity(t)
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			var requests atomic.Int32
			again := make(chan string, 10)
			go serveScript(t, ln, scfg, func(s *scripted, f http2.Frame) {
				switch f := f.(type) {
				case *http2.HeadersFrame:
					if n := requests.Add(1); n != 2 { // the first makes the tunnel, the third repeats the second
						s.answer(f.StreamID, "200", false)
					}
				case *http2.DataFrame:
					if requests.Load() == 2 && len(f.Data()) > 0 {
						tt.fate(s, f.StreamID)
					} else {
						again <- string(f.Data())
					}
				}
			})
			p := &pair{pool: NewPool(PoolConfig{Driver: newLoops(t, 1)}), key: dialKey(ln.Addr())}
			defer p.pool.Close()
			p.dial = func(context.Context) (net.Conn, *tls.Config, error) {
				c, err := net.Dial("tcp", ln.Addr().String())
				return c, ccfg, err
			}
			if _, err := p.open(t.Context(), Request{Authority: "a:1"}); err != nil {
				t.Fatal(err)
			}
			app, fd := detachedPair(t)
			app.Write([]byte(message))
			o := <-p.startEarly(t, app, fd)
			if !tt.repeat {
				defer loop.Reset(fd)
				if o.err == nil || !tt.is(o.err) {
					t.Errorf("the outcome is %v", o.err)
				}
				left := make([]byte, 100)
				if n, errno := loop.Peek(fd, left); string(left[:max(n, 0)]) != message {
					t.Errorf("left in the socket: %q, %v", left[:max(n, 0)], errno)
				}
				if n := requests.Load(); n != 2 {
					t.Errorf("%d requests", n)
				}
				return
			}
			if o.err != nil {
				t.Fatal(o.err)
			}
			o.s.RelayFD(fd, func(relay.Result) {})
			app.CloseWrite()
			got := ""
			for len(got) < len(message) {
				select {
				case part := <-again:
					got += part
				case <-time.After(10 * time.Second):
					t.Fatalf("sent again: %q", got)
				}
			}
			if got != message {
				t.Errorf("sent again: %q", got)
			}
		})
	}
}

// TestUnacknowledgedIsRepeated tells what the other end's kernel has from what it has not: of a tunnel that is lost, only
// what never arrived is sent again, and only when the kernel has given the connection up, so that it never will.
func TestUnacknowledgedIsRepeated(t *testing.T) {
	near, far := tcpPair(t)
	defer far.Close()
	far.SetReadBuffer(4096)
	fd, err := loop.Detach(near)
	if err != nil {
		t.Fatal(err)
	}
	defer loop.Reset(fd)
	written := 0
	await(t, "the socket is full", func() bool {
		n, errno := loop.Write(fd, make([]byte, 1<<20))
		written += n
		return errno == syscall.EAGAIN
	})
	lost := &TunnelError{Err: io.EOF}
	check := func(when string, over bool) {
		t.Helper()
		tun := &loopTunnel{fd: fd, written: int64(written)}
		for _, tt := range []struct {
			e      earlyApp
			reused bool
			want   bool
		}{
			{earlyApp{sent: 1, at: int64(written) - 1}, true, true},   // waits in this side's socket
			{earlyApp{sent: 1, at: int64(written) + 9}, true, true},   // not even that
			{earlyApp{sent: 1, at: int64(written) - 1}, false, false}, // a fresh tunnel that breaks is news
			{earlyApp{sent: 1, at: 0}, true, false},                   // arrived
			{earlyApp{sent: 0}, true, true},                           // nothing was sent
		} {
			tt.e.t = tun
			if got := tt.e.mayRepeat(lost, tt.reused); got != (tt.want && (over || tt.e.sent == 0)) {
				t.Errorf("%s: %d of %d bytes before it, reused %v: repeated %v", when, tt.e.at, written, tt.reused, got)
			}
		}
	}
	check("connected", false)
	resetApp(far)
	await(t, "the reset", func() bool { _, errno := loop.Write(fd, []byte{1}); return errno != syscall.EAGAIN })
	check("reset", true)
}
