package hbone

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"hash"
	"io"
	mrand "math/rand/v2"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"
)

func newSum() hash.Hash { return sha256.New() }

// drivers lists every pair of drivers that must understand each other.
func drivers(t *testing.T, f func(t *testing.T, client, server Driver)) {
	all := map[string]func(t *testing.T) Driver{
		"goroutines": func(*testing.T) Driver { return Goroutines() },
		"loop":       func(t *testing.T) Driver { return newLoops(t, 1) },
		"two loops":  func(t *testing.T) Driver { return newLoops(t, 2) },
	}
	for cn, c := range all {
		for sn, s := range all {
			if cn == "two loops" != (sn == "two loops") {
				continue
			}
			t.Run(cn+" to "+sn, func(t *testing.T) { f(t, c(t), s(t)) })
		}
	}
}

func (m *mesh) echo(n int, pieces bool) {
	m.t.Helper()
	c := m.dial('E', n)
	defer c.Close()
	d := pattern(n+7, n)
	go func() {
		for p := d; len(p) > 0; {
			k := len(p)
			if pieces {
				k = min(k, 1+mrand.IntN(40000))
			}
			c.Write(p[:k])
			p = p[k:]
		}
		c.CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, d) {
		m.t.Errorf("echo of %d bytes: got %d, error %v", n, len(got), err)
	}
}

func (m *mesh) sink(mode byte, n int) {
	m.t.Helper()
	c := m.dial(mode, n)
	defer c.Close()
	d := pattern(n+9, n)
	c.Write(d)
	c.CloseWrite()
	got, err := io.ReadAll(c)
	want := sha256.Sum256(d)
	if err != nil || !bytes.Equal(got, want[:]) {
		m.t.Errorf("sink %c of %d bytes: got %x, error %v", mode, n, got, err)
	}
}

func (m *mesh) source(n int, slow, both bool) {
	m.t.Helper()
	c := m.dial('S', n)
	defer c.Close()
	if both {
		go func() { c.Write(pattern(3, n)); c.CloseWrite() }()
	}
	var got bytes.Buffer
	b := make([]byte, 100<<10)
	for {
		k, err := c.Read(b)
		got.Write(b[:k])
		if err == io.EOF {
			break
		}
		if err != nil {
			m.t.Errorf("source of %d bytes: %v after %d", n, err, got.Len())
			return
		}
		if slow {
			time.Sleep(time.Millisecond)
		}
	}
	if !bytes.Equal(got.Bytes(), pattern(n, n)) {
		m.t.Errorf("source of %d bytes: got %d or others", n, got.Len())
	}
}

func TestRelayBytes(t *testing.T) {
	drivers(t, func(t *testing.T, client, server Driver) {
		m := newMesh(t, client, server)
		sizes := []int{0, 1, 100, 1015, 16374, 16375, 16376, 16384, 65535, 65536, 1 << 20, 5<<20 + 3}
		if !testing.Short() {
			sizes = append(sizes, 40<<20+1)
		}
		for _, n := range sizes {
			m.echo(n, false)
			m.echo(n, true)
		}
		var wg sync.WaitGroup
		for i := range 32 {
			wg.Go(func() { m.echo(200000+i*1777, i%2 == 0) })
			wg.Go(func() { m.sink('D', 300000+i) })
			wg.Go(func() { m.source(400000+i, false, true) })
		}
		wg.Wait()
		for i := range 2 {
			wg.Go(func() { m.sink('W', 10<<20+i) })
			wg.Go(func() { m.source(10<<20+i, true, false) })
			wg.Go(func() { m.source(10<<20+i, true, true) })
		}
		for i := range 20 {
			wg.Go(func() { m.echo(1000*i, true) })
		}
		wg.Wait()
		for i := range 8 {
			wg.Go(func() {
				for j := range 50 {
					m.echo(50+i+j, false)
				}
			})
		}
		wg.Wait()
		for i := range 4 { // the connection's window must be whole after all that
			wg.Go(func() { m.echo(30<<20+i, false) })
		}
		wg.Wait()
		await(t, "every relay reports its end", func() bool {
			m.mu.Lock()
			defer m.mu.Unlock()
			return len(m.results) == len(m.inbound) && len(m.results) >= 2*len(sizes)+32*3+6+20+400+4
		})
		for i, r := range m.results {
			if r.Err != nil || r.Reset {
				t.Errorf("relay %d: %+v", i, r)
			}
		}
		if n := m.pool.Tunnels(); n != 1 {
			t.Errorf("%d tunnels, want 1", n)
		}
	})
}

func TestRelayStalledReaders(t *testing.T) {
	drivers(t, func(t *testing.T, client, server Driver) {
		m := newMesh(t, client, server)
		const n = 12 << 20
		stalled := make([]*net.TCPConn, 6) // the first three hold 12 of the connection's 16 MiB; others must still move
		for i := range stalled[:3] {
			stalled[i] = m.dial('S', n)
		}
		time.Sleep(200 * time.Millisecond)
		m.echo(100000, true)
		for i := range stalled[3:] { // now all of it is held, until three give up
			stalled[3+i] = m.dial('S', n)
		}
		time.Sleep(100 * time.Millisecond)
		for _, c := range stalled[:3] {
			c.SetLinger(0)
			c.Close()
		}
		for _, c := range stalled[3:] {
			c.CloseWrite()
			got, err := io.ReadAll(c)
			if err != nil || !bytes.Equal(got, pattern(n, n)) {
				t.Errorf("stalled: %d bytes, error %v", len(got), err)
			}
			c.Close()
		}
		m.echo(20<<20, false)
	})
}

func TestRelayReset(t *testing.T) {
	drivers(t, func(t *testing.T, client, server Driver) {
		m := newMesh(t, client, server)
		for range 50 {
			c := m.dial('R', 0)
			if _, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the backend's RST is seen as %v", err)
			}
			c.Close()
		}
		for range 50 {
			c := m.dial('r', 0)
			c.Write(make([]byte, 1000))
			io.ReadFull(c, make([]byte, 1)) // else the RST could overtake the header
			c.SetLinger(0)
			c.Close()
			select {
			case err := <-m.resets:
				if err != nil && !errors.Is(err, syscall.ECONNRESET) || err == nil {
					t.Errorf("the client's RST is seen as %v", err)
				}
			case <-time.After(5 * time.Second):
				t.Fatal("the client's RST is not seen")
			}
		}
		reported := func(n int) func() bool {
			return func() bool {
				m.mu.Lock()
				defer m.mu.Unlock()
				return len(m.results) == n && len(m.inbound) == n
			}
		}
		await(t, "every reset relay reports its end", reported(100))
		m.echo(1000, false)
		await(t, "the whole relay reports its end", reported(101))
		for i, r := range m.results[:100] {
			if r.Err == nil || !r.Reset {
				t.Errorf("relay %d: %+v, want a reset", i, r)
			}
		}
	})
}

func TestRelayServerFirst(t *testing.T) {
	drivers(t, func(t *testing.T, client, server Driver) {
		m := newMesh(t, client, server)
		c := m.dial('F', 0)
		defer c.Close()
		var b [5]byte
		if _, err := io.ReadFull(c, b[:]); err != nil || string(b[:]) != "hello" {
			t.Errorf("got %q, error %v", b, err)
		}
	})
}

func TestRelayAbort(t *testing.T) {
	drivers(t, func(t *testing.T, client, server Driver) {
		m := newMesh(t, client, server)
		m.streams = make(chan *Stream, 1)
		c := m.dial('r', 0)
		s := <-m.streams
		await(t, "the counters move", func() bool { n, _ := s.Counters(); return n == 9 })
		io.ReadFull(c, make([]byte, 1))
		s.Abort(errTest)
		if _, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the client sees %v, want a reset", err)
		}
		if err := <-m.resets; !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the backend sees %v, want a reset", err)
		}
		await(t, "the relay reports its end", func() bool { m.mu.Lock(); defer m.mu.Unlock(); return len(m.results) == 1 })
		if r := m.results[0]; !errors.Is(r.Err, errTest) || r.Sent != 9 || !r.Reset {
			t.Errorf("result %+v", r)
		}
	})
}

func newLoops(t testing.TB, n int) Driver {
	d, err := Loops(n)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Stop)
	return d
}
