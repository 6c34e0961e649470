package ztunnel

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/internal/accesslog"
	"github.com/fairlead-mesh/fairlead/internal/authz"
	"github.com/fairlead-mesh/fairlead/internal/handover"
	"github.com/fairlead-mesh/fairlead/internal/hbone"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/state"
	"github.com/fairlead-mesh/fairlead/internal/zds"
)

// taker is a proxy that serves one pod, as far as taking over goes.
func taker(t testing.TB) *Proxy {
	loops, err := hbone.Loops(1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(loops.Stop)
	p := &Proxy{log: zap.NewNop(), store: state.New(), running: t.Context(), metrics: newMetrics(prometheus.NewRegistry()),
		pool: hbone.NewPool(hbone.PoolConfig{Driver: loops})}
	p.connections = newConnections(accesslog.New(zap.NewNop()), p.metrics, defaultLimits)
	p.pods = newPods(p)
	p.pods.byUID["u"] = &pod{Workload: zds.Workload{UID: "u"}, server: hbone.NewServer(hbone.ServerConfig{Driver: loops})}
	return p
}

// sockets are n descriptors of one TCP connection, and its other end.
func sockets(t testing.TB, n int) (files []int, other net.Conn) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if other, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	f, err := a.(*net.TCPConn).File()
	if err != nil {
		t.Fatal(err)
	}
	a.Close()
	defer f.Close()
	for range n {
		fd, err := unix.Dup(int(f.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, fd)
	}
	return files, other
}

// TestConnectionState: what one process says of a connection is what another one knows.
func TestConnectionState(t *testing.T) {
	p := taker(t)
	c := p.connections.open(p.pods.byUID["u"], inbound, netip.MustParseAddrPort("10.0.0.1:4000"), netip.MustParseAddrPort("10.0.0.2:80"))
	c.source, c.service = &mesh.Workload{UID: "w", Name: "n", Namespace: "ns", WorkloadName: "d"}, &mesh.Service{Name: "s", Hostname: "s.ns"}
	c.sourceID, c.path, c.policy, c.dryRun = mesh.Identity{Namespace: "ns", ServiceAccount: "sa"}, pathHBONE, "ns/p", []string{"ns/q"}
	c.check = &authz.Connection{Source: c.sourceID, Destination: c.asked}
	text, err := json.Marshal(c.export())
	if err != nil {
		t.Fatal(err)
	}
	var st connectionState
	if err := json.Unmarshal(text, &st); err != nil {
		t.Fatal(err)
	}
	got, err := p.adopt(&st)
	if err != nil {
		t.Fatal(err)
	}
	want, is := c.record(nil, 3, 4), got.record(nil, 3, 4)
	want.Duration, is.Duration = 0, 0
	if w, g := jsonOf(t, want), jsonOf(t, is); w != g {
		t.Errorf("the line would be\n%s, want\n%s", g, w)
	}
	if got.check == nil || *got.check != *c.check || got.start.Sub(c.start) != 0 {
		t.Errorf("asked %+v since %v, want %+v since %v", got.check, got.start, c.check, c.start)
	}
}

// exhausted is a socket whose process is out of descriptors at first.
type exhausted struct {
	predecessors
	failures int
}

func (e *exhausted) AcceptUnix() (*net.UnixConn, error) {
	if e.failures > 0 {
		e.failures--
		return nil, &net.OpError{Op: "accept", Net: "unix", Err: os.NewSyscallError("accept4", syscall.EMFILE)}
	}
	return e.predecessors.AcceptUnix()
}

// TestPredecessorIsAwaitedOutOfDescriptors: who could not be accepted at once is later; the proxy does not end for it.
func TestPredecessorIsAwaitedOutOfDescriptors(t *testing.T) {
	p := taker(t)
	socket := filepath.Join(t.TempDir(), "s")
	l, err := handover.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		p.awaitPredecessors(t.Context(), &exhausted{l, 2})
	}()
	g, err := handover.Dial(socket)
	if err != nil {
		t.Fatal(err)
	}
	var refused *handover.RefusedError
	if err := g.Give("not an offer", nil); !errors.As(err, &refused) {
		t.Errorf("%v in place of an answer", err)
	}
	g.Close()
	l.Close()
	<-ended
}

// unsynced is a control plane that has said nothing yet.
type unsynced struct{ configuration }

func (unsynced) Synced() <-chan struct{} { return nil }

// TestAcceptedIsRegistered: what a listener has given the proxy is seen by who asks, right then, whether all have ended.
func TestAcceptedIsRegistered(t *testing.T) {
	p := taker(t)
	running, end := context.WithCancel(t.Context())
	defer end()
	p.running, p.source = running, unsynced{}
	files, other := sockets(t, 1)
	defer other.Close()
	p.servePassthrough(p.pods.get("u"), &listener{slots: true}, files[0], netip.MustParseAddrPort("192.0.2.1:1"))
	select {
	case <-p.connections.drained():
		t.Error("no connection is open")
	default:
	}
	end()
	<-p.connections.drained()
}

func jsonOf(t *testing.T, v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// FuzzOffer: whatever a predecessor offers gives an error or something that starts and ends.
func FuzzOffer(f *testing.F) {
	p := taker(f)
	for _, seed := range []string{
		`{"Relay":{"Up":{"Held":"AAAA"},"Down":{"Ended":true}},"Connections":[{"Pod":"u","Direction":1,"Path":"plain"}]}`,
		`{"Pod":"u","Tunnel":{},"Connections":[]}`, `{"Pod":"u","Key":{},"Tunnel":{"Streams":[{"Relayed":true}]},"Connections":[{"Pod":"u"}]}`,
	} {
		f.Add([]byte(seed), uint8(2))
	}
	f.Fuzz(func(t *testing.T, value []byte, n uint8) {
		files, other := sockets(t, int(n%4))
		defer other.Close()
		prepared, err := p.prepare(value, files)
		if err != nil {
			for _, fd := range files {
				if unix.Close(fd) != nil {
					t.Error("a descriptor of a refused offer was closed")
				}
			}
			return
		}
		prepared.Start()
		other.Close()
		for _, c := range p.connections.list() {
			c.abort(fail(reasonReset, "the test is over"))
		}
		<-p.connections.drained()
	})
}
