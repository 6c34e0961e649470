package hbone

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/fairlead-mesh/fairlead/internal/hbone/machine"
)

// victim plays ping-pong on a stream of its own tunnel until stop, which reports how it went.
func victim(t *testing.T, p *pair) (stop func()) {
	t.Helper()
	s, err := p.open(t.Context(), Request{Authority: "a:1"})
	if err != nil {
		t.Fatal(err)
	}
	end := make(chan struct{})
	var playing sync.WaitGroup
	var rounds int
	var longest time.Duration
	var failed error
	playing.Go(func() {
		defer s.Close()
		b := make([]byte, 64)
		for {
			start := time.Now()
			s.SetDeadline(start.Add(5 * time.Second))
			if _, failed = s.Write(b); failed == nil {
				_, failed = io.ReadFull(s, b)
			}
			if failed != nil {
				return
			}
			rounds++
			longest = max(longest, time.Since(start))
			select {
			case <-end:
				return
			case <-time.After(time.Millisecond):
			}
		}
	})
	return func() {
		t.Helper()
		close(end)
		playing.Wait()
		if failed != nil {
			t.Errorf("the victim beside it: %v after %d rounds", failed, rounds)
		}
		t.Logf("the victim beside it: %d rounds, the longest took %v", rounds, longest)
	}
}

// block is a header block of a CONNECT, and what else is said.
func block(more ...hpack.HeaderField) []byte {
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	for _, f := range append([]hpack.HeaderField{{Name: ":method", Value: "CONNECT"}, {Name: ":authority", Value: "a:1"}}, more...) {
		e.WriteField(f)
	}
	return b.Bytes()
}

// fits is how much of a header block goes in a frame that fits a record.
const fits = 8 << 10

// bigHeaders sends a header list of 8 KiB fields, in as many frames as it takes.
func (r *rawPeer) bigHeaders(id uint32, fields int) {
	var more []hpack.HeaderField
	for i := range fields {
		more = append(more, hpack.HeaderField{Name: fmt.Sprint("x-", i), Value: strings.Repeat("~", 8<<10)})
	}
	b := block(more...)
	r.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: b[:fits]})
	for b = b[fits:]; len(b) > 0; {
		n := min(fits, len(b))
		if r.fr.WriteContinuation(id, n == len(b), b[:n]) != nil {
			return
		}
		b = b[n:]
	}
}

// repeat does f until the connection breaks, for long enough to use up what a peer may do.
func repeat(f func(i int) error) func(r *rawPeer) {
	return func(*rawPeer) {
		for i := range 200000 {
			if f(i) != nil {
				return
			}
		}
	}
}

// TestHostileFrames has a peer in a tunnel of its own that breaks or abuses HTTP/2. It is told what it did wrong, or it
// is carried on with where that costs little; a victim on another tunnel of the same server plays on.
func TestHostileFrames(t *testing.T) {
	const carriedOn = 1 << 31 // no GOAWAY: the connection lives
	flood := func(f func(r *rawPeer, i int) error) func(*rawPeer) {
		return func(r *rawPeer) { repeat(func(i int) error { return f(r, i) })(r) }
	}
	for name, tt := range map[string]struct {
		do   func(r *rawPeer)
		want uint32 // code of the GOAWAY
	}{
		"giant headers": {func(r *rawPeer) { r.bigHeaders(1, 40) }, machine.CodeCalm},
		"too big headers": {func(r *rawPeer) {
			r.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true,
				BlockFragment: block(hpack.HeaderField{Name: "x", Value: strings.Repeat("~", 9<<10)})}) // Huffman makes it fit
			var b bytes.Buffer
			e := hpack.NewEncoder(&b)
			e.WriteField(hpack.HeaderField{Name: "x", Value: strings.Repeat("a", 3000)})
			bomb := append(block(), b.Bytes()...)
			for range 4000 { // each byte names the field that was put in the table
				bomb = append(bomb, 0x80|62)
			}
			r.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 3, EndHeaders: true, BlockFragment: bomb})
		}, carriedOn},
		"not HPACK": {func(r *rawPeer) {
			r.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, BlockFragment: []byte{0xff, 0xff, 0xff, 0xff, 0xff}})
		}, machine.CodeCompression},
		"CONTINUATION flood": {func(r *rawPeer) {
			r.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block()})
			repeat(func(int) error { return r.fr.WriteContinuation(1, false, nil) })(r)
		}, machine.CodeCalm},
		"CONTINUATION of another stream": {func(r *rawPeer) {
			r.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block()})
			r.connect(3)
		}, machine.CodeProtocol},
		"SETTINGS flood": {flood(func(r *rawPeer, i int) error {
			return r.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: uint32(i % 2 * 65535)})
		}), machine.CodeCalm},
		"PING flood":           {flood(func(r *rawPeer, _ int) error { return r.fr.WritePing(false, [8]byte{}) }), machine.CodeCalm},
		"PRIORITY flood":       {flood(func(r *rawPeer, _ int) error { return r.fr.WritePriority(1, http2.PriorityParam{}) }), machine.CodeCalm},
		"unknown frames flood": {flood(func(r *rawPeer, _ int) error { return r.fr.WriteRawFrame(99, 0, 0, nil) }), machine.CodeCalm},
		"empty DATA flood": {func(r *rawPeer) {
			r.connect(1)
			repeat(func(int) error { return r.fr.WriteData(1, false, nil) })(r)
		}, machine.CodeCalm},
		"stream flood": {flood(func(r *rawPeer, i int) error {
			return r.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: uint32(2*i + 1), EndHeaders: true, BlockFragment: block()})
		}), machine.CodeCalm},
		"tiny window updates": {func(r *rawPeer) {
			r.connect(1)
			repeat(func(int) error { return r.fr.WriteWindowUpdate(0, 1) })(r)
		}, machine.CodeCalm},
		"window updates of streams that are over": {func(r *rawPeer) {
			r.connect(1)
			r.fr.WriteRSTStream(1, machine.CodeCancel)
			repeat(func(int) error { return r.fr.WriteWindowUpdate(1, 1000) })(r)
		}, machine.CodeCalm},
		"window overflow":           {func(r *rawPeer) { r.fr.WriteWindowUpdate(0, 1<<31-1) }, machine.CodeFlowControl},
		"window of a stream beyond": {func(r *rawPeer) { r.connect(1); r.fr.WriteWindowUpdate(1, 1<<31-1) }, carriedOn},
		"window made too large": {func(r *rawPeer) {
			r.connect(1)
			r.fr.WriteWindowUpdate(1, 1<<30)
			r.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1<<31 - 1})
		}, machine.CodeFlowControl},
		"window by nothing": {func(r *rawPeer) { r.fr.WriteRawFrame(http2.FrameWindowUpdate, 0, 0, make([]byte, 4)) }, machine.CodeProtocol},
		"DATA beyond the window": {func(r *rawPeer) {
			r.connect(1)
			r.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}) // the echo stays where it is
			repeat(func(int) error { return r.fr.WriteData(1, false, make([]byte, fits)) })(r)
		}, machine.CodeFlowControl},
		"frame too long":       {func(r *rawPeer) { r.Write([]byte{0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1}) }, machine.CodeFrameSize},
		"DATA of no stream":    {func(r *rawPeer) { r.fr.WriteData(9, false, []byte("x")) }, machine.CodeProtocol},
		"reset of no stream":   {func(r *rawPeer) { r.fr.WriteRSTStream(9, 0) }, machine.CodeProtocol},
		"a push":               {func(r *rawPeer) { r.fr.WriteRawFrame(http2.FramePushPromise, 4, 1, make([]byte, 8)) }, machine.CodeProtocol},
		"half a frame for now": {func(r *rawPeer) { r.connect(1) }, carriedOn},
	} {
		t.Run(name, func(t *testing.T) {
			servers(t, func(t *testing.T, server Driver) {
				p := newPairOf(t, Goroutines(), server, PoolConfig{}, ServerConfig{MaxStreams: 100})
				defer victim(t, p)()
				r := newRawPeer(t, p)
				seen := make(chan error, 1)
				go func() { seen <- r.fate(tt.want) }()
				tt.do(r)
				if tt.want == carriedOn {
					r.fr.WritePing(false, [8]byte{})
				}
				if err := <-seen; err != nil {
					t.Error(err)
				}
				r.nc.Close()
				await(t, "the server lets go", func() bool { return p.admitted() == 1 })
			})
		})
	}
}

// fate reads until a GOAWAY with the code, or until a PING is answered when that is none.
func (r *rawPeer) fate(code uint32) error {
	var answered bool
	var got *http2.GoAwayFrame
	err := r.frames(func(f http2.Frame) bool {
		switch f := f.(type) {
		case *http2.GoAwayFrame:
			got = f
		case *http2.PingFrame:
			answered = answered || f.IsAck() && code > 1<<30
		}
		return got != nil || answered
	})
	switch {
	case code > 1<<30 && answered:
		return nil
	case got != nil && uint32(got.ErrCode) == code:
		return nil
	case got != nil:
		return fmt.Errorf("GOAWAY with %v (%s), want code %d", got.ErrCode, got.DebugData(), code)
	}
	return fmt.Errorf("%w without a GOAWAY, want code %d", err, code)
}

// servers runs f with each driver as the server's.
func servers(t *testing.T, f func(t *testing.T, server Driver)) {
	t.Run("goroutines", func(t *testing.T) { f(t, Goroutines()) })
	t.Run("loop", func(t *testing.T) {
		d, err := Loops(1)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(d.Stop)
		f(t, d)
	})
}

// TestHostileBeforeTheTunnel has peers that never get as far as a tunnel: each loses its own connection within the
// handshake's time, and a victim beside them plays on.
func TestHostileBeforeTheTunnel(t *testing.T) {
	for name, do := range map[string]func(nc net.Conn){
		"plain HTTP":      func(nc net.Conn) { io.WriteString(nc, "GET / HTTP/1.1\r\nHost: a\r\n\r\n") },
		"HTTP/2 in clear": func(nc net.Conn) { io.WriteString(nc, http2.ClientPreface) },
		"a truncated hello": func(nc net.Conn) {
			nc.Write([]byte{22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3})
			nc.(*net.TCPConn).CloseWrite()
		},
		"a hello of 16 MiB": func(nc net.Conn) {
			nc.Write([]byte{22, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff})
			nc.Write(make([]byte, 1<<20))
		},
		"silence": func(net.Conn) {},
		"a byte at a time": func(nc net.Conn) {
			for _, b := range append([]byte{22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3}, make([]byte, 500)...) {
				if _, err := nc.Write([]byte{b}); err != nil {
					return
				}
				time.Sleep(10 * time.Millisecond)
			}
		},
		"empty records": func(nc net.Conn) {
			for range 100000 {
				if _, err := nc.Write([]byte{22, 3, 1, 0, 0}); err != nil {
					return
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			servers(t, func(t *testing.T, server Driver) {
				p := newPairOf(t, Goroutines(), server, PoolConfig{}, ServerConfig{HandshakeTimeout: 300 * time.Millisecond})
				// The handshake of the victim has its time too, also on a machine that has much to do.
				defer victim(t, p)()
				var peers sync.WaitGroup
				for range 20 {
					nc, err := (&net.Dialer{}).DialContext(context.Background(), "tcp", p.addr)
					if err != nil {
						t.Fatal(err)
					}
					peers.Go(func() { defer nc.Close(); do(nc); awaitEnd(t, nc) })
				}
				peers.Wait()
				await(t, "the server lets go", func() bool { return p.admitted() == 1 })
			})
		})
	}
}

// awaitEnd wants the other side to end the connection.
func awaitEnd(t *testing.T, nc net.Conn) {
	nc.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.Copy(io.Discard, nc); isTimeout(err) {
		t.Error("the connection is still open")
	}
}
