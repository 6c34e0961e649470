package hbone

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/fairlead-mesh/fairlead/internal/relay"
)

// hold keeps a driver's loops from doing anything until the function it returns is called.
func hold(t *testing.T, d Driver) (release func()) {
	ch := make(chan struct{})
	release = sync.OnceFunc(func() { close(ch) })
	t.Cleanup(release)
	for _, w := range d.(*LoopDriver).workers {
		w.loop.Post(func() { <-ch })
	}
	return release
}

// echoed is a connection to the backend that echoes, over a tunnel that can move.
func (f *ferry) echoed() *net.TCPConn {
	c := f.m.dial('E', 0)
	c.Write([]byte("x"))
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		f.t.Fatal(err)
	}
	return c
}

// TestAdoptedTunnelIsNotUsedTooSoon: a new stream that finds an adopted tunnel, from the moment it can be found, sends
// after the records that the other process left unsent.
func TestAdoptedTunnelIsNotUsedTooSoon(t *testing.T) {
	up := pattern(1, 3<<20)
	f := newFerry(t)
	f.m.sendBuffer.Store(16 << 10)
	c := f.echoed()
	defer c.Close()
	peerReads := hold(t, f.servers[0].cfg.Driver) // so that the tunnel has records which its socket does not take
	go func() { c.Write(up); c.CloseWrite() }()
	opened := make(chan error, 1)
	another := func(context.Context) (net.Conn, *tls.Config, error) { return nil, nil, errTest }
	for adopted := false; !adopted; time.Sleep(time.Millisecond) { // in which it goes on
		f.pools[0].Handover(t.Context(), func(k Key, z *Frozen) bool {
			if len(z.State.Unsent) == 0 {
				return false // the connection has not filled the socket yet
			}
			st, files := crossed(t, z)
			a, err := f.pools[1].Adopt(k, &st, files)
			if err != nil {
				t.Error(err)
				return false
			}
			go func() { // takes the tunnel as soon as it can be found
				for f.pools[1].Tunnels() == 0 {
					time.Sleep(time.Millisecond)
				}
				f.pools[1].Start(t.Context(), 20*time.Second, k, another, Request{Authority: f.m.backend.Addr().String()}, -1,
					func(s *Stream, err error) {
						if err == nil {
							s.Reset()
						}
						opened <- err
					})
			}()
			a.enlist(func() {
				time.Sleep(50 * time.Millisecond) // nobody may find it yet
				a.start(func(int, relay.Result) {})
			})
			adopted = true
			return true
		})
		if t.Failed() {
			return
		}
	}
	peerReads()
	if err := <-opened; err != nil {
		t.Errorf("the new stream: %v", err)
	}
	if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, up) {
		t.Errorf("the connection that moved was answered %d bytes of %d, %v", len(got), len(up), err)
	}
}

// TestAdoptedTunnelIsCut: a server whose context has ended takes a tunnel, and cuts it in order.
func TestAdoptedTunnelIsCut(t *testing.T) {
	f := newFerry(t)
	c := f.echoed()
	defer c.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	results := make(chan relay.Result, 2)
	for adopted := false; !adopted; time.Sleep(time.Millisecond) {
		f.servers[0].Handover(t.Context(), func(z *Frozen) bool {
			st, files := crossed(t, z)
			a, err := f.servers[1].Adopt(ctx, &st, files)
			if err != nil {
				t.Error(err)
				return false
			}
			a.enlist(func() {
				time.Sleep(20 * time.Millisecond)
				a.start(func(_ int, r relay.Result) { results <- r })
			})
			adopted = true
			return true
		})
		if t.Failed() {
			return
		}
	}
	if r := <-results; r.Err == nil || !r.Reset {
		t.Errorf("the connection ended with %+v", r)
	}
	if _, err := io.ReadAll(c); !isReset(err) {
		t.Errorf("the application saw %v", err)
	}
	await(t, "the tunnel's end", func() bool {
		f.servers[1].mu.Lock()
		defer f.servers[1].mu.Unlock()
		return len(f.servers[1].tunnels) == 0
	})
}

// TestRefusedTunnelIsCut: a cut while a tunnel stands still for another process that then refuses it is not forgotten.
func TestRefusedTunnelIsCut(t *testing.T) {
	for name, cut := range map[string]func(f *ferry){
		"pool":   func(f *ferry) { f.m.pool.Close() },
		"server": func(f *ferry) { f.m.server.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			f := newFerry(t)
			c := f.echoed()
			defer c.Close()
			frozen := false
			refuse := func(*Frozen) bool {
				frozen = true
				cut(f)
				return false
			}
			for ; !frozen; time.Sleep(time.Millisecond) {
				if name == "pool" {
					f.m.pool.Handover(t.Context(), func(_ Key, z *Frozen) bool { return refuse(z) })
				} else {
					f.m.server.Handover(t.Context(), refuse)
				}
			}
			if _, err := io.ReadAll(c); !isReset(err) {
				t.Errorf("the application saw %v", err)
			}
			await(t, "the ends", func() bool {
				f.m.mu.Lock()
				defer f.m.mu.Unlock()
				return len(f.m.results) == 1 && len(f.m.inbound) == 1
			})
		})
	}
}
