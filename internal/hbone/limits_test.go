package hbone

import (
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"
)

// hits counts how often each limit was hit.
type hits struct {
	mu sync.Mutex
	n  map[Limit]int
}

func (h *hits) add(l Limit) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.n == nil {
		h.n = map[Limit]int{}
	}
	h.n[l]++
}

func (h *hits) of(l Limit) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.n[l]
}

// TestTunnelsAreLimited has a peer that opens connections and never ends its handshakes: beyond the limit they are closed
// at once, those that were there before live on, and a place that becomes free can be taken.
func TestTunnelsAreLimited(t *testing.T) {
	for name, tt := range map[string]struct {
		cfg  ServerConfig
		want Limit
	}{
		"of one peer": {ServerConfig{MaxPeerTunnels: 3}, LimitPeerTunnels},
		"of all":      {ServerConfig{MaxTunnels: 3}, LimitTunnels},
	} {
		t.Run(name, func(t *testing.T) {
			drivers(t, func(t *testing.T, client, server Driver) {
				var h hits
				tt.cfg.Limited = h.add
				p := newPairOf(t, client, server, PoolConfig{}, tt.cfg)
				good, err := p.open(t.Context(), Request{Authority: "a:1"})
				if err != nil {
					t.Fatal(err)
				}
				var silent []net.Conn
				for range 2 {
					nc, err := net.Dial("tcp", p.addr)
					if err != nil {
						t.Fatal(err)
					}
					defer nc.Close()
					silent = append(silent, nc)
				}
				await(t, "the silent ones are counted", func() bool { return p.admitted() == 3 })
				nc, err := net.Dial("tcp", p.addr)
				if err != nil {
					t.Fatal(err)
				}
				defer nc.Close()
				nc.SetDeadline(time.Now().Add(5 * time.Second))
				if _, err := nc.Read(make([]byte, 1)); err == nil || errors.Is(err, unix.ETIMEDOUT) || isTimeout(err) {
					t.Errorf("one too many: %v, want it closed", err)
				}
				if n := h.of(tt.want); n != 1 {
					t.Errorf("limit %s was hit %d times, want 1", tt.want, n)
				}
				silent[0].Close()
				await(t, "a place is free", func() bool { return p.admitted() == 2 })
				newRawPeer(t, p).fr.WritePing(false, [8]byte{})
				good.Write([]byte("still here"))
				if _, err := io.ReadFull(good, make([]byte, 10)); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

func (p *pair) admitted() int {
	p.server.mu.Lock()
	defer p.server.mu.Unlock()
	return p.server.admitted.all
}

func isTimeout(err error) bool {
	var timeout interface{ Timeout() bool }
	return errors.As(err, &timeout) && timeout.Timeout()
}

// TestBuffersAreShared has two peers that send much while there is room for one big window: it goes to one of them, the
// other is carried all the same, and the room is free again afterwards.
func TestBuffersAreShared(t *testing.T) {
	drivers(t, func(t *testing.T, client, server Driver) {
		var h hits
		const room = connWindow - leastWindow + 1000
		b := NewBuffers(room, h.add)
		p := newPairOf(t, client, server, PoolConfig{}, ServerConfig{Buffers: b})
		first, second := newRawPeer(t, p), newRawPeer(t, p)
		granted := map[*rawPeer]int{}
		for _, r := range []*rawPeer{first, second} {
			r.connect(1)
			sent, back, taken := 0, 0, false
			for sent < 3*growAfter {
				r.fr.WriteData(1, false, make([]byte, 8<<10))
				sent += 8 << 10
			}
			r.fr.WritePing(false, [8]byte{1})
			if err := r.frames(func(f http2.Frame) bool {
				switch f := f.(type) {
				case *http2.WindowUpdateFrame:
					if f.StreamID == 0 {
						granted[r] += int(f.Increment)
					}
				case *http2.DataFrame:
					back += len(f.Data())
				case *http2.PingFrame:
					taken = f.IsAck() // all that was sent before it
				}
				return taken && (back == 65535 || back == sent) // the echo may wait for a window that this peer never opens
			}); err != nil {
				t.Fatal(err)
			}
		}
		const big = firstUnderWay - 65535 // of the big window, as much as a peer may have on its way
		if granted[first] < big {
			t.Errorf("the first peer was given %d bytes, want %d", granted[first], big)
		}
		if granted[second] >= big {
			t.Errorf("the second peer was given %d bytes although there was no room", granted[second])
		}
		if h.of(LimitBufferedBytes) == 0 {
			t.Error("nobody was told that the room is used up")
		}
		first.nc.Close()
		await(t, "the room is free", func() bool { return b.left.Load() == room })
	})
}

// TestPeerThatNeverReads has the kernel give up a peer that acknowledges nothing of what it is sent.
func TestPeerThatNeverReads(t *testing.T) {
	drivers(t, func(t *testing.T, client, server Driver) {
		p := newPairOf(t, client, server, PoolConfig{}, ServerConfig{PingInterval: 200 * time.Millisecond, PingTimeout: 300 * time.Millisecond,
			Handle: func(in *Incoming) {
				if s, err := in.Accept(); err == nil {
					s.Write(make([]byte, 64<<20))
				}
			}})
		r := newRawPeer(t, p)
		r.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 30})
		r.fr.WriteWindowUpdate(0, 1<<30)
		r.connect(1)
		stop := make(chan struct{})
		var pings sync.WaitGroup
		pings.Go(func() { // it shows life all the while
			for {
				select {
				case <-stop:
					return
				case <-time.After(50 * time.Millisecond):
					r.fr.WritePing(true, [8]byte{})
				}
			}
		})
		defer pings.Wait()
		defer close(stop)
		await(t, "the server lets go", func() bool { return p.admitted() == 0 })
	})
}
