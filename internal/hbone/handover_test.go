package hbone

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"io"
	mrand "math/rand/v2"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/internal/relay"
)

// crossed is what of a frozen tunnel arrives in another process: the value as text, and descriptors of its own.
func crossed(t *testing.T, f *Frozen) (st TunnelState, files []int) {
	t.Helper()
	text, err := json.Marshal(f.State)
	if err == nil {
		err = json.Unmarshal(text, &st)
	}
	if err != nil {
		t.Error(err)
	}
	for _, fd := range f.Files {
		n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Error(err)
		}
		files = append(files, n)
	}
	return st, files
}

// ferry moves tunnels between two pools and two servers until stop is closed; refusals are among the answers.
type ferry struct {
	t       *testing.T
	m       *mesh
	pools   [2]*Pool
	servers [2]*Server
	moved   int
	streams int // moved with them
	waiting int // of these, CONNECTs that nobody had looked at
}

func (f *ferry) run(stop <-chan struct{}) {
	ctx := context.Background()
	for i := 0; ; i = 1 - i {
		select {
		case <-stop:
			return
		case <-time.After(time.Duration(mrand.IntN(10)) * time.Millisecond):
		}
		f.pools[i].Handover(ctx, func(k Key, z *Frozen) bool {
			st, files := crossed(f.t, z)
			a, err := f.pools[1-i].Adopt(k, &st, files)
			return f.answer(a, err, z, &f.m.results)
		})
		f.servers[i].Handover(ctx, func(z *Frozen) bool {
			st, files := crossed(f.t, z)
			a, err := f.servers[1-i].Adopt(ctx, &st, files)
			return f.answer(a, err, z, &f.m.inbound)
		})
	}
}

func (f *ferry) answer(a *Adopted, err error, z *Frozen, results *[]relay.Result) bool {
	if err != nil {
		f.t.Error(err)
		return false
	}
	if mrand.IntN(4) == 0 {
		a.Discard()
		return false
	}
	f.moved++
	for _, s := range z.Streams {
		if f.streams++; s == nil {
			f.waiting++
		}
	}
	a.Start(func(_ int, r relay.Result) {
		f.m.mu.Lock()
		*results = append(*results, r)
		f.m.mu.Unlock()
	})
	return true
}

// newFerry is a mesh whose tunnels can move.
func newFerry(t *testing.T) *ferry {
	m := newMesh(t, newLoops(t, 1), newLoops(t, 2))
	f := &ferry{t: t, m: m}
	_, scfg := identity(t)
	f.pools = [2]*Pool{m.pool, NewPool(PoolConfig{Driver: newLoops(t, 2), MaxStreamsPerTunnel: 300})}
	f.servers = [2]*Server{m.server, NewServer(ServerConfig{Driver: newLoops(t, 1), Handle: m.handle,
		TLS: func(context.Context, *tls.ClientHelloInfo) (*tls.Config, error) { return scfg, nil }})}
	t.Cleanup(func() { f.pools[1].Close(); f.servers[1].Close() })
	return f
}

// TestHandover moves both ends of tunnels to and fro while connections of every kind are carried, and wants every byte,
// end and count to come out as if nothing had happened.
func TestHandover(t *testing.T) {
	f := newFerry(t)
	m := f.m
	stop, done := make(chan struct{}), make(chan struct{})
	go func() { f.run(stop); close(done) }()
	for round := range 3 {
		var wg sync.WaitGroup
		for i := range 12 {
			wg.Go(func() { m.echo(200000+i*1777, i%2 == 0) })
			wg.Go(func() { m.sink('D', 300000+i) })
			wg.Go(func() { m.source(400000+i, false, true) })
		}
		wg.Go(func() { m.sink('W', 10<<20+round) })
		wg.Go(func() { m.source(10<<20+round, true, false) })
		wg.Go(func() { m.echo(40<<20, false) })
		wg.Go(f.pingPong)
		wg.Go(func() {
			for i := range 200 {
				m.echo(i*17, false)
			}
		})
		wg.Wait()
	}
	close(stop)
	<-done
	const connections = 3 * (36 + 3 + 1 + 200)
	await(t, "all ends told", func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return len(m.results) >= connections && len(m.inbound) >= connections
	})
	m.mu.Lock()
	defer m.mu.Unlock()
	for side, results := range map[string][]relay.Result{"outbound": m.results, "inbound": m.inbound} {
		if len(results) != connections {
			t.Errorf("%s: %d ends of %d connections", side, len(results), connections)
		}
		for _, r := range results {
			if r.Err != nil || r.Reset {
				t.Errorf("%s: %+v", side, r)
			}
		}
	}
	var out, in int64
	for i := range m.results {
		out += m.results[i].Sent + m.results[i].Received
		in += m.inbound[i].Sent + m.inbound[i].Received
	}
	if out != in {
		t.Errorf("%d bytes counted outbound, %d inbound", out, in)
	}
	t.Logf("%d tunnels moved with %d streams, %d of them not looked at", f.moved, f.streams, f.waiting)
	if f.moved < 20 || f.streams < 50 {
		t.Errorf("only %d tunnels moved with %d streams", f.moved, f.streams)
	}
}

// pingPong exchanges small messages on one connection.
func (f *ferry) pingPong() {
	c := f.m.dial('E', 0)
	defer c.Close()
	var got [8]byte
	for i := range 1000 {
		want := pattern(i, 8)
		c.Write(want)
		if _, err := io.ReadFull(c, got[:]); err != nil || !bytes.Equal(got[:], want) {
			f.t.Errorf("round %d: %x, %v", i, got, err)
			return
		}
	}
	c.CloseWrite()
	io.Copy(io.Discard, c)
}

// TestHandoverOfResets: a reset that one end of a tunnel that moves has to pass on is passed on.
func TestHandoverOfResets(t *testing.T) {
	f := newFerry(t)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() { f.run(stop); close(done) }()
	for range 30 {
		c := f.m.dial('r', 0)
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Millisecond)
		c.SetLinger(0)
		c.Close()
		if err := <-f.m.resets; !isReset(err) {
			t.Errorf("the backend saw %v", err)
		}
		c = f.m.dial('R', 0)
		if _, err := io.Copy(io.Discard, c); !isReset(err) {
			t.Errorf("the application saw %v", err)
		}
		c.Close()
	}
	close(stop)
	<-done
}

// TestHandoverOfWaitingConnects: a CONNECT that comes while another one is being set up goes along without an answer.
func TestHandoverOfWaitingConnects(t *testing.T) {
	f := newFerry(t)
	first, release := true, make(chan struct{})
	f.m.incoming = func(*Incoming) bool {
		if first {
			first = false
			<-release
		}
		return false
	}
	var clients sync.WaitGroup
	clients.Go(func() { f.m.echo(1000, false) })
	await(t, "the first is being set up", func() bool { return f.servers[0].active() == 1 })
	moved := make(chan int)
	go f.servers[0].Handover(t.Context(), func(z *Frozen) bool {
		st, files := crossed(t, z)
		a, err := f.servers[1].Adopt(t.Context(), &st, files)
		if err != nil {
			t.Error(err)
			return false
		}
		waiting := 0
		for _, s := range a.Streams {
			if s == nil {
				waiting++
			}
		}
		a.Start(func(int, relay.Result) {})
		moved <- waiting
		return true
	})
	time.Sleep(20 * time.Millisecond)
	clients.Go(func() { f.m.echo(2000, false) })
	time.Sleep(20 * time.Millisecond)
	close(release)
	if n := <-moved; n != 1 {
		t.Errorf("%d CONNECTs went along without an answer, want 1", n)
	}
	clients.Wait()
}

func (s *Server) active() (n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for sv := range s.tunnels {
		n += sv.handlers.Load()
	}
	return n
}

func isReset(err error) bool {
	op, ok := err.(*net.OpError)
	return ok && op.Unwrap() != nil && bytes.Contains([]byte(op.Error()), []byte(syscall.ECONNRESET.Error()))
}

// TestHandoverOfGoroutines: what cannot be moved stays and goes on.
func TestHandoverOfGoroutines(t *testing.T) {
	m := newMesh(t, Goroutines(), Goroutines())
	c := m.dial('E', 0)
	m.pool.Handover(t.Context(), func(Key, *Frozen) bool { t.Error("frozen"); return false })
	c.Write([]byte("still"))
	c.CloseWrite()
	if got, err := io.ReadAll(c); string(got) != "still" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
}

// FuzzAdopt: what another process hands over gives an error or a tunnel, whatever it says.
func FuzzAdopt(f *testing.F) {
	d := newLoops(f, 1).(*LoopDriver)
	seed := `{"TLS":{"Suite":4865,"In":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=","Out":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="},` +
		`"HTTP2":{"Config":{"Server":true,"StreamWindow":65535,"ConnWindow":65535,"MaxFrame":16384,"MaxHeaderList":1000,"MaxStreams":3},` +
		`"Begun":true,"NextID":1,"PeerFrame":16384,"PeerStreams":3,"PeerTable":4096,"Streams":[{"ID":1}]},` +
		`"Partial":"FwMDABIA","Unsent":"AAAA","Streams":[{"Authority":"a:1","Queue":"AAA="}]}`
	f.Add([]byte(seed), true)
	f.Add([]byte(seed), false)
	f.Fuzz(func(t *testing.T, value []byte, relayed bool) {
		var st TunnelState
		if json.Unmarshal(value, &st) != nil {
			return
		}
		a, b := tcpPair(t)
		defer b.Close()
		raw, _ := a.File()
		defer raw.Close()
		a.Close()
		files := []int{int(raw.Fd())}
		if relayed {
			files = append(files, files[0])
		}
		for i := range files {
			files[i], _ = unix.Dup(files[i])
		}
		s := NewServer(ServerConfig{Driver: d, Handle: func(in *Incoming) { in.Reject(503, "") }})
		adopted, err := s.Adopt(t.Context(), &st, files)
		if err != nil {
			for _, fd := range files {
				unix.Close(fd)
			}
			return
		}
		adopted.Start(func(int, relay.Result) {})
		s.Close()
	})
}
